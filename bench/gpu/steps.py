"""Commands with a time limit: what they said, whether that is success, and how long they took."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
END_SECONDS = 5.0  # for the output of what was ended by force
TAIL_LINES = 20
LEAST_SECONDS = 5.0  # nothing starts with less
OK, FAILED, LEFT_OUT = "ok", "FAILED", "left out"
_PRINTING = threading.Lock()


@dataclass
class Step:
    """One command.

    Attributes:
        name: For the summary.
        command: What to run; empty where it is left out.
        limit: Seconds it may take.
        expected: Seconds it takes on 16 cores and one card, as far as that can be told.
        why: Why it is left out.
        env: Added to the environment.
        folder: Where to run it.
        judge: Says what is wrong with the output of a command that ended with 0; empty if nothing.
        cannot: Says from the output of one that failed why it can't work here, so that it counts
            as left out; empty if it failed.
        budgeted: Takes ``--budget``, the seconds after which it begins nothing more.
        verdict: ``ok``, ``FAILED`` or ``left out``.
        seconds: It took.
        note: What the summary says of it.
    """

    name: str
    command: list[str]
    limit: float
    expected: float = 0.0
    why: str = ""
    env: dict[str, str] = field(default_factory=dict)
    folder: Path = ROOT
    judge: Callable[[str], str] = lambda output: ""
    cannot: Callable[[str], str] = lambda output: ""
    budgeted: float = 0.0
    verdict: str = ""
    seconds: float = 0.0
    note: str = ""

    def run(self, log: Path, left: float) -> None:
        """Runs it, and keeps its output in ``log``."""
        why = self.why or ("no time left" if left < LEAST_SECONDS else "")
        if why:
            self.verdict, self.note = LEFT_OUT, why
            _say(f"\n== {self.name}\nleft out: {why}")
            return
        limit = min(self.limit, left)
        command = list(self.command)
        if self.budgeted:
            command += ["--budget", f"{max(0.0, limit - self.budgeted):.0f}"]
        _say(f"\n== {self.name}\n$ {typed(command)}   (at most {limit:.0f} s)")
        start = time.monotonic()
        code, output = run_limited(command, environment(self.env), limit, self.folder)
        self.seconds = time.monotonic() - start
        lines = output.rstrip().splitlines()
        with _PRINTING:
            with log.open("a") as file:
                file.write(f"\n== {self.name}\n$ {typed(command)}\n{output}\n")
            print("\n".join([f"-- {self.name}", *lines[-TAIL_LINES:]]), flush=True)
        self._judge(code, output, limit)

    def _judge(self, code: int | None, output: str, limit: float) -> None:
        lines = output.rstrip().splitlines()
        if code is None:
            self.note = f"took longer than {limit:.0f} s"
        elif code:
            self.note = f"exit status {code}: {lines[-1] if lines else 'no output'}"[:200]
        else:
            self.note = self._judged(output)
        self.verdict = FAILED if self.note else OK
        if self.note and (why := self.cannot(output)):
            self.verdict, self.note = LEFT_OUT, why[:200]
        if not self.note and lines:
            self.note = lines[-1].strip("= ")[:200]

    def _judged(self, output: str) -> str:
        """What the judge says; one that trips over the output must not take the rest along."""
        try:
            return self.judge(output)
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:200]

    def record(self) -> dict[str, Any]:
        """What is written down of it."""
        kept = ("name", "verdict", "seconds", "expected", "limit", "note")
        return {key: getattr(self, key) for key in kept} | {"command": typed(self.command)}


def run_together(steps: Sequence[Step], log: Path, left: float) -> None:
    """Runs steps at once."""
    with ThreadPoolExecutor(max_workers=len(steps)) as pool:
        for done in [pool.submit(step.run, log, left) for step in steps]:
            done.result()


def _say(text: str) -> None:
    with _PRINTING:
        print(text, flush=True)


def typed(command: Sequence[str]) -> str:
    """A command without this machine's paths."""
    words = ["python3" if word == sys.executable else word for word in command]
    return shlex.join(Path(word).name if Path(word).is_absolute() else word for word in words)


def run_limited(
    command: Sequence[str], env: dict[str, str], limit: float, folder: Path
) -> tuple[int | None, str]:
    """Exit status (None: ended by force, with all that it started) and output of a command."""
    try:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return 127, str(error)
    try:
        output, _ = process.communicate(timeout=limit)
        return process.returncode, output
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        output = _rest_of(process)
        if isinstance(error, subprocess.TimeoutExpired):
            return None, output
        raise


def _rest_of(process: subprocess.Popen[str]) -> str:
    """Output of what was ended; not all of it where a child in a session of its own holds on."""
    try:
        return process.communicate(timeout=END_SECONDS)[0]
    except subprocess.TimeoutExpired as error:
        so_far = error.output or ""  # bytes, even of a process that is read as text
        return so_far.decode(errors="replace") if isinstance(so_far, bytes) else so_far


def environment(added: dict[str, str]) -> dict[str, str]:
    """That of this process, with the package of this source tree first."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **added}

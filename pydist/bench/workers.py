"""Rows measured in other processes: what ends one of them ends the rows of one group alone.

A kernel that crashes, hangs or breaks its CUDA context (as a failed capture may) would otherwise
spoil every row after it. A group of rows, one family of kernels at one size, has a process of its
own. After a row that failed the group goes on in a new process, once; a group that fails again,
or that hangs, is given up.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys

from pydist.bench.case import Case
from pydist.bench.measure import Outcome
from pydist.bench.options import family_of, shown

COMPILE_SECONDS = 180.0  # a row beside torch.compile may take as much more
START_SECONDS = 30.0  # a process imports torch, and loads the device's libraries, in as much more
FAILURES = 2  # a group with as many is given up

# The other build takes the module's place before anything else of the package is imported, so that
# its functions and the types of their arguments belong together.
START = """
import ctypes, sys
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG: whoever ends the command ends this too
descriptor, module = int(sys.argv[1]), sys.argv[2]
if module:
    from importlib import util
    spec = util.spec_from_file_location("pydist._C", module)
    sys.modules["pydist._C"] = util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["pydist._C"])
from pydist.bench.worker import serve
serve(descriptor)
"""


class WorkerDiedError(RuntimeError):
    """A process ended by itself."""


class WorkerHangsError(RuntimeError):
    """A process did not answer in time, and was ended."""


class Worker:
    """A process that measures cases of a plan, each asked for by its number.

    Args:
        options: Those of the command; they say what the plan is.
        module: File of the compiled module to use; empty for the package's own.
    """

    def __init__(self, options: argparse.Namespace, module: str) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        path = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, str(theirs.fileno()), module],
            pass_fds=[theirs.fileno()], env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        theirs.close()
        self._extra = START_SECONDS
        wanted = {name: value for name, value in vars(options).items() if not callable(value)}
        self._pipe.send(argparse.Namespace(**wanted))

    def measure(self, number: int, seconds: float) -> Outcome:
        """What became of a case.

        Args:
            number: The case.
            seconds: How long it may take, beside the start of the process.

        Raises:
            WorkerDiedError: It ended instead.
            WorkerHangsError: It did not answer, and was ended.
        """
        try:
            self._pipe.send(number)
            if self._pipe.poll(seconds + self._extra):
                outcome: Outcome = self._pipe.recv()
                self._extra = 0.0
                return outcome
        except (EOFError, ConnectionError):
            raise WorkerDiedError(f"its process ended with {self._status()}") from None
        self.end()
        raise WorkerHangsError(f"it hangs: no answer in {seconds:g} s")

    def _status(self) -> str:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "no status"
        return signal.Signals(-code).name if code < 0 else f"status {code}"

    def end(self) -> None:
        """Ends it, and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._pipe.close()


def group_of(case: Case) -> str:
    """The group of rows that a case belongs to, in words."""
    beside = ", compiled" if case.compiled else ""
    return f"{family_of(case.kernel)}, {shown(case.numel)}{beside}"


class Workers:
    """Measures cases one after the other, each group of them in a process of its own.

    On CUDA the next process starts, and imports torch, while the one before measures: no time of a
    device is lost. On the CPU that would take cores from what is measured.

    Args:
        options: Those of the command.
        module: See :class:`Worker`.
    """

    def __init__(self, options: argparse.Namespace, module: str = "") -> None:
        self._options, self._module = options, module
        self._spare: Worker | None = None
        self._worker: Worker | None = None
        self._group, self._failures = "", 0

    def measured(self, number: int, case: Case) -> Outcome:
        """What became of a case; where its group was given up, that is said."""
        if (group := group_of(case)) != self._group:
            self._end_worker()
            self._group, self._failures = group, 0
        if self._failures >= FAILURES:
            return Outcome(why=f"its group ({group}) was given up after what failed in it")
        seconds = self._options.row_seconds + (COMPILE_SECONDS if case.compiled else 0.0)
        weight = 1
        try:
            outcome = self._running().measure(number, seconds)
        except WorkerDiedError as error:
            outcome = Outcome(why=str(error), failed=True)
        except WorkerHangsError as error:
            outcome, weight = Outcome(why=str(error), failed=True), FAILURES
        if outcome.failed:
            self._failures += weight
            self._end_worker()
        return outcome

    def end(self) -> None:
        """Ends all processes."""
        self._end_worker()
        if self._spare is not None:
            self._spare.end()
            self._spare = None

    def _start(self) -> Worker:
        return Worker(self._options, self._module)

    def _running(self) -> Worker:
        if self._worker is None:
            self._worker, self._spare = self._spare or self._start(), None
            if self._options.device == "cuda":
                self._spare = self._start()
        return self._worker

    def _end_worker(self) -> None:
        if self._worker is not None:
            self._worker.end()
            self._worker = None

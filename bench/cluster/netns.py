"""Several "hosts" on one machine: Linux network namespaces behind a switch of a given speed.

Each host is a namespace with one interface; all interfaces end in a bridge that lives in a
namespace of its own and has no way out, so no byte ever leaves the machine. Both directions of
every cable are shaped with ``tc tbf``: the host's own egress, and the switch's egress towards the
host. What this shows is the cost of moving bytes through links of that speed; the hosts still
share the processor and the memory of one machine.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import IO, Any, final

PREFIX = "pydist"
INTERFACE = "eth0"
MAX_HOSTS = 200
_SUBNET = "10.213.77"
_PORT = 29500
_UNITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_MTU = 1500


class ClusterError(RuntimeError):
    """The hosts cannot be made here, or a process on one of them failed."""


@dataclass(frozen=True)
class Finished:
    """What one host's process left behind.

    Attributes:
        host: Index of the host.
        returncode: Exit status; negative for a signal, as in :mod:`subprocess`.
        stdout: Everything written to standard output.
        stderr: Everything written to standard error.
    """

    host: int
    returncode: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Shape:
    """Settings of the token buckets for one rate.

    Attributes:
        rate: Bits per second on the wire (Ethernet headers included).
        burst: Bytes the bucket holds, that is, bytes which may leave at once after a pause.
        gso: Largest packet the TCP stack may hand down before it is cut into frames.
        buffer: Bytes that may queue at each end of a cable.
    """

    rate: int
    burst: int
    gso: int
    buffer: int

    @classmethod
    def of(cls, rate: str) -> Shape:
        """Work out the settings for a rate such as ``"1gbit"``.

        Raises:
            ClusterError: If the rate cannot be read.
        """
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(bit|kbit|mbit|gbit)", rate.strip().lower())
        if match is None or float(match[1]) <= 0:
            raise ClusterError(f"cannot read the rate {rate!r}: write it like 1gbit or 100mbit")
        bits = int(float(match[1]) * _UNITS[match[2]])
        # A bucket that is idle between two collectives fills up, and its content then travels
        # for free. 150 microseconds' worth keeps that gift small beside a step of milliseconds
        # and is still more than the timer's slack, without which the rate would not be reached.
        burst = max(4 * _MTU, round(bits / 8 * 150e-6))
        # A packet larger than the bucket would be cut up in software, which costs processor
        # time that the benchmark needs; so ask TCP for packets that fit (headers added).
        gso = min(65536, max(2 * _MTU, burst * 3 // 4))
        # A megabyte a port is what small switches have.
        return cls(rate=bits, burst=burst, gso=gso, buffer=max(1 << 20, 8 * burst))


def check_tools() -> None:
    """Refuse early, with what to do about it, where namespaces cannot be made.

    Raises:
        ClusterError: Without root, or without the ``ip`` and ``tc`` programs.
    """
    # Root first: without it, Debian's search path lacks the folder these programs are in.
    if os.geteuid() != 0:
        raise ClusterError(f"needs root: sudo {sys.executable} {' '.join(sys.argv)}")
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise ClusterError(
            f"{' and '.join(missing)} not found: install iproute2 (Debian: apt install iproute2)"
        )


def _call(*command: str) -> str:
    """Run a short command and return its output; its complaint becomes a ClusterError."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ClusterError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def _namespaces() -> list[str]:
    """Names of all namespaces that some run of this module made."""
    names = (line.split()[0] for line in _call("ip", "netns", "list").splitlines() if line)
    return [name for name in names if re.fullmatch(rf"{PREFIX}-\d+-\w+", name)]


def _remove(names: Sequence[str]) -> None:
    """Kill what still runs in the namespaces, then delete them."""
    for name in names:
        with contextlib.suppress(ClusterError):
            for pid in _call("ip", "netns", "pids", name).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
    for name in names:
        with contextlib.suppress(ClusterError):
            _call("ip", "netns", "delete", name)


def remove_stale() -> list[str]:
    """Delete the namespaces of runs that died without cleaning up.

    Returns:
        The names that were deleted.
    """
    stale = [name for name in _namespaces() if not os.path.exists(f"/proc/{name.split('-')[1]}")]
    _remove(stale)
    return stale


@final
class Cluster:
    """Hosts joined by a switch, for the length of a ``with`` block.

    Args:
        hosts: Number of hosts, 2 to 200.
        rate: Speed of each cable in each direction, such as ``"1gbit"`` or ``"100mbit"``.
    """

    def __init__(self, hosts: int = 4, rate: str = "1gbit") -> None:
        if not 2 <= hosts <= MAX_HOSTS:
            raise ClusterError(f"hosts must be from 2 to {MAX_HOSTS}, not {hosts}")
        self.hosts = hosts
        self.shape = Shape.of(rate)
        self._base = f"{PREFIX}-{os.getpid()}"
        self._switch = f"{self._base}-switch"
        self._running: list[subprocess.Popen[bytes]] = []
        self._handlers: dict[int, Any] = {}

    def name(self, host: int) -> str:
        """Namespace of a host."""
        return f"{self._base}-host{host}"

    def address(self, host: int) -> str:
        """IPv4 address of a host."""
        return f"{_SUBNET}.{host + 1}"

    def __enter__(self) -> Cluster:
        """Make the hosts, after removing what a crashed run may have left."""
        check_tools()
        remove_stale()
        if any(name.startswith(f"{self._base}-") for name in _namespaces()):
            raise ClusterError("this process already has a cluster open")
        atexit.register(self.close)
        self._catch_signals()
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the hosts, whatever happened."""
        self.close()

    def close(self) -> None:
        """Kill what runs on the hosts and remove them; safe to call twice."""
        self._kill()
        own = (self._switch, *(self.name(host) for host in range(self.hosts)))
        _remove([name for name in _namespaces() if name in own])
        atexit.unregister(self.close)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _catch_signals(self) -> None:
        """Turn polite requests to end into an exception, so that the hosts get removed."""
        if threading.current_thread() is not threading.main_thread():
            return

        def leave(number: int, frame: FrameType | None) -> None:
            raise SystemExit(128 + number)

        for number in (signal.SIGTERM, signal.SIGHUP):
            self._handlers[number] = signal.signal(number, leave)

    def _build(self) -> None:
        """Make the switch, then plug in the hosts one by one."""
        _call("ip", "netns", "add", self._switch)
        self._quieten(self._switch)
        _call("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
        _call("ip", "-n", self._switch, "link", "set", "br0", "up")
        for host in range(self.hosts):
            self._plug(host)

    def _plug(self, host: int) -> None:
        """Make one host and its cable: two token buckets, one at each end."""
        name, port = self.name(host), f"port{host}"
        gso = ("gso_max_size", str(self.shape.gso))
        _call("ip", "netns", "add", name)
        self._quieten(name)
        _call(
            *("ip", "-n", self._switch, "link", "add", port, "type", "veth"),
            *("peer", "name", INTERFACE, "netns", name),
        )
        _call("ip", "-n", self._switch, "link", "set", port, "master", "br0", "up")
        _call("ip", "-n", name, "address", "add", f"{self.address(host)}/24", "dev", INTERFACE)
        _call("ip", "-n", name, "link", "set", "lo", "up")
        _call("ip", "-n", name, "link", "set", INTERFACE, *gso)
        _call("ip", "-n", name, "link", "set", INTERFACE, "up")
        for where, device in ((name, INTERFACE), (self._switch, port)):
            _call(
                *("tc", "-n", where, "qdisc", "replace", "dev", device, "root", "tbf"),
                *("rate", f"{self.shape.rate}bit", "burst", f"{self.shape.burst}b"),
                *("limit", f"{self.shape.buffer}b"),
            )

    @staticmethod
    def _quieten(name: str) -> None:
        """Settle what would differ between machines or add stray packets to the counters."""
        for setting in (
            "net.ipv6.conf.all.disable_ipv6=1",
            "net.ipv4.tcp_congestion_control=cubic",
            # The namespaces start afresh; remembering slow connections would couple the runs.
            "net.ipv4.tcp_no_metrics_save=1",
        ):
            key, value = setting.split("=")
            path = "/proc/sys/" + key.replace(".", "/")
            with contextlib.suppress(ClusterError):  # an old kernel may lack one of them
                _call("ip", "netns", "exec", name, "sh", "-c", f"echo {value} > {path}")

    def environment(self, host: int) -> dict[str, str]:
        """Variables with which a process on the host finds the others through ``env://``."""
        return {
            "RANK": str(host),
            "WORLD_SIZE": str(self.hosts),
            "LOCAL_RANK": "0",
            "MASTER_ADDR": self.address(0),
            "MASTER_PORT": str(_PORT),
            "GLOO_SOCKET_IFNAME": INTERFACE,
        }

    def run(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        timeout: float = 600.0,
        echo: bool = False,
    ) -> list[Finished]:
        """Run the same command on every host and wait for all of them.

        Args:
            command: Program and arguments.
            env: Variables to add to this process's own and to :meth:`environment`.
            timeout: Seconds after which everything is killed.
            echo: Host 0 writes to this process's own output, as it goes.

        Returns:
            What each host's process left behind, in the order of the hosts.

        Raises:
            ClusterError: If a process fails, or the time is up. The rest is killed first.
        """
        with contextlib.ExitStack() as stack:
            files = [
                (
                    stack.enter_context(tempfile.TemporaryFile()),
                    stack.enter_context(tempfile.TemporaryFile()),
                )
                for _ in range(self.hosts)
            ]
            stack.callback(self._kill)
            for host, (out, err) in enumerate(files):
                outputs = (None, None) if echo and not host else (out, err)
                self._running.append(self._start(host, command, dict(env or {}), *outputs))
            problem = self._wait(timeout)
            finished = [
                Finished(host, process.wait(), _text(out), _text(err))
                for host, (process, (out, err)) in enumerate(zip(self._running, files, strict=True))
            ]
        if problem is not None:
            host, why = problem
            raise ClusterError(f"host {host} {why}\n{finished[host].stderr[-4000:]}".rstrip())
        return finished

    def _start(
        self,
        host: int,
        command: Sequence[str],
        env: dict[str, str],
        out: IO[bytes] | None,
        err: IO[bytes] | None,
    ) -> subprocess.Popen[bytes]:
        """Start one process; ``ip netns exec`` turns into it, so the id is the one to kill."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name(host), *command],
            env={**os.environ, **self.environment(host), **env},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )

    def _wait(self, timeout: float) -> tuple[int, str] | None:
        """Wait for all; at the first failure or the end of the time kill all and say why."""
        deadline = time.monotonic() + timeout
        while True:
            codes = [process.poll() for process in self._running]
            for host, code in enumerate(codes):
                if code:
                    self._kill(forget=False)
                    return host, f"failed with exit status {code}"
            if None not in codes:
                return None
            if time.monotonic() > deadline:
                self._kill(forget=False)
                return codes.index(None), f"did not finish within {timeout:.0f} seconds"
            time.sleep(0.05)

    def _kill(self, *, forget: bool = True) -> None:
        """Kill every process group that still runs."""
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        for process in self._running:
            process.wait()
        if forget:
            self._running.clear()

    def counters(self) -> list[dict[str, int]]:
        """Bytes and drops so far of each host's interface, as the kernel counts them.

        The kernel counts a large packet before it is cut into frames, hence with a single set of
        headers; the headers of the frames (66 bytes each with TCP) do take their share of the
        rate, but do not show here.

        Returns:
            For each host ``tx_bytes``, ``rx_bytes`` and ``drops`` (packets dropped by the
            buckets at both ends of its cable).
        """
        return [dict(self._count(host)) for host in range(self.hosts)]

    def _count(self, host: int) -> Iterator[tuple[str, int]]:
        """One host's counters as pairs."""
        show = ("-j", "-s", "link", "show", "dev", INTERFACE)
        stats = json.loads(_call("ip", "-n", self.name(host), *show))[0]["stats64"]
        yield "tx_bytes", int(stats["tx"]["bytes"])
        yield "rx_bytes", int(stats["rx"]["bytes"])
        drops = 0
        for where, device in ((self.name(host), INTERFACE), (self._switch, f"port{host}")):
            queues = _call("tc", "-n", where, "-j", "-s", "qdisc", "show", "dev", device)
            drops += sum(int(queue["drops"]) for queue in json.loads(queues))
        yield "drops", drops


def _text(file: IO[bytes]) -> str:
    """All that was written to a temporary file."""
    file.seek(0)
    return file.read().decode(errors="replace")

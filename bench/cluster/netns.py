"""Several "hosts" on one machine: Linux network namespaces behind a switch of a given speed.

Each host is a namespace with one interface. Without a delay all interfaces end in a bridge; both
directions of every cable are shaped with ``tc tbf``: the host's own egress, and the switch's egress
towards the host. With a delay the interfaces are tun devices, ``tbf`` shapes the host's egress, and
a process (``relay.py``) is the switch. The switch lives in a namespace of its own and has no way
out, so no byte ever leaves the machine. What this shows is the cost of moving bytes through links
of that speed; the hosts still share the processor and the memory of one machine.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, final

from links import ClusterError, Network, Shape
from relay import TUN, RelayProcess

PREFIX = "pydist"
INTERFACE = "eth0"
_SUBNET = "10.213.77"
_PORT = 29500
_NEEDED = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}


@dataclass(frozen=True)
class Finished:
    """What one rank's process left behind.

    Attributes:
        rank: The rank.
        returncode: Exit status; negative for a signal, as in :mod:`subprocess`.
        stdout: Everything written to standard output.
        stderr: Everything written to standard error.
    """

    rank: int
    returncode: int
    stdout: str
    stderr: str


def check_tools(*, delay: bool = False) -> None:
    """Refuse early, with what to do about it, where namespaces cannot be made.

    Args:
        delay: Whether the links have a delay.

    Raises:
        ClusterError: Names what is missing: root, its capabilities, a program, or a device.
    """
    # Root first: without it, Debian's search path lacks the folder these programs are in.
    if os.geteuid() != 0:
        raise ClusterError(f"needs root: sudo {sys.executable} {' '.join(sys.argv)}")
    held = re.search(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())
    missing = [name for name, bit in _NEEDED.items() if held and not int(held[1], 16) >> bit & 1]
    if missing:
        raise ClusterError(
            f"root lacks {' and '.join(missing)}: start the container with --privileged"
        )
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise ClusterError(
            f"{' and '.join(missing)} not found: install iproute2 (Debian: apt install iproute2)"
        )
    if delay and not os.path.exists(TUN):
        raise ClusterError(
            f"{TUN} not found, which a delay needs: modprobe tun (a container: --device {TUN})"
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
        network: Hosts, ranks per host, and the speed of the links.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.hosts = network.hosts
        self.shape = network.outer
        self._base = f"{PREFIX}-{os.getpid()}"
        self._switch = f"{self._base}-switch"
        self._running: list[subprocess.Popen[bytes]] = []
        self._relay: RelayProcess | None = None
        self._handlers: dict[int, Any] = {}

    def name(self, host: int) -> str:
        """Namespace of a host."""
        return f"{self._base}-host{host}"

    def address(self, host: int) -> str:
        """IPv4 address of a host."""
        return f"{_SUBNET}.{host + 1}"

    def __enter__(self) -> Cluster:
        """Make the hosts, after removing what a crashed run may have left."""
        check_tools(delay=self.shape.rtt_ms > 0)
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
        if self._relay is not None:
            self._relay.close()
            self._relay = None
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
        if self.shape.rtt_ms > 0:
            addresses = [self.address(host) for host in range(self.hosts)]
            # In the switch's namespace, so that what a crash leaves is found there.
            within = ("ip", "netns", "exec", self._switch)
            self._relay = RelayProcess(within, addresses, self.shape)
        else:
            _call("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
            _call("ip", "-n", self._switch, "link", "set", "br0", "up")
        for host in range(self.hosts):
            self._plug(host)

    def _plug(self, host: int) -> None:
        """Make one host and its cable."""
        name, port = self.name(host), f"port{host}"
        _call("ip", "netns", "add", name)
        self._quieten(name)
        if self._relay is not None:
            _call(
                *("ip", "-n", self._switch, "link", "set", port, "netns", name, "name", INTERFACE)
            )
        else:
            _call(
                *("ip", "-n", self._switch, "link", "add", port, "type", "veth"),
                *("peer", "name", INTERFACE, "netns", name),
            )
            _call("ip", "-n", self._switch, "link", "set", port, "master", "br0", "up")
            _shape(self._switch, port, self.shape)
        gso = ("gso_max_size", str(self.shape.gso))
        _call("ip", "-n", name, "address", "add", f"{self.address(host)}/24", "dev", INTERFACE)
        _call("ip", "-n", name, "link", "set", "lo", "up")
        _call("ip", "-n", name, "link", "set", INTERFACE, *gso)
        _call("ip", "-n", name, "link", "set", INTERFACE, "up")
        _shape(name, INTERFACE, self.shape)
        if self.network.inner is not None:
            _shape(name, "lo", self.network.inner)

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

    def environment(self, rank: int) -> dict[str, str]:
        """Variables that torchrun sets, with which a rank finds the others through ``env://``."""
        host, local_rank = divmod(rank, self.network.local)
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.network.ranks),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(self.network.local),
            "GROUP_RANK": str(host),
            "GROUP_WORLD_SIZE": str(self.hosts),
            "ROLE_RANK": str(rank),
            "ROLE_WORLD_SIZE": str(self.network.ranks),
            "MASTER_ADDR": self.address(0),
            "MASTER_PORT": str(_PORT),
            # Ranks of one host find each other at its address, which is a way over its loopback.
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
        """Run the same command for every rank, on its host, and wait for all of them.

        Args:
            command: Program and arguments.
            env: Variables to add to this process's own and to :meth:`environment`.
            timeout: Seconds after which everything is killed.
            echo: Rank 0 writes to this process's own output, as it goes.

        Returns:
            What each rank's process left behind, in the order of the ranks.

        Raises:
            ClusterError: If a process fails, or the time is up. The rest is killed first.
        """
        with contextlib.ExitStack() as stack:
            files = [
                (
                    stack.enter_context(tempfile.TemporaryFile()),
                    stack.enter_context(tempfile.TemporaryFile()),
                )
                for _ in range(self.network.ranks)
            ]
            stack.callback(self._kill)
            for rank, (out, err) in enumerate(files):
                outputs = (None, None) if echo and not rank else (out, err)
                self._running.append(self._start(rank, command, dict(env or {}), *outputs))
            problem = self._wait(timeout)
            finished = [
                Finished(rank, process.wait(), _text(out), _text(err))
                for rank, (process, (out, err)) in enumerate(zip(self._running, files, strict=True))
            ]
        if problem is not None:
            rank, why = problem
            name = f"rank {rank} on host {rank // self.network.local}"
            raise ClusterError(f"{name} {why}\n{finished[rank].stderr[-4000:]}".rstrip())
        return finished

    def _start(
        self,
        rank: int,
        command: Sequence[str],
        env: dict[str, str],
        out: IO[bytes] | None,
        err: IO[bytes] | None,
    ) -> subprocess.Popen[bytes]:
        """Start one process; ``ip netns exec`` turns into it, so the id is the one to kill."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name(rank // self.network.local), *command],
            env={**os.environ, **self.environment(rank), **env},
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
            for rank, code in enumerate(codes):
                if code:
                    self._kill(forget=False)
                    return rank, f"failed with exit status {code}"
            if self._relay is not None:
                self._relay.check()
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
            queues at both ends of its cable); with a delay also ``longest_queue``, the most bytes
            that waited for the line towards the host.
        """
        towards = self._relay.counters() if self._relay is not None else None
        found = [self._count(host) for host in range(self.hosts)]
        if towards is None:
            for host, counts in enumerate(found):
                counts["drops"] += _dropped(self._switch, f"port{host}")
            return found
        for counts, relayed in zip(found, towards, strict=True):
            counts["drops"] += relayed["dropped"]
            counts["longest_queue"] = relayed["longest_queue"]
        return found

    def _count(self, host: int) -> dict[str, int]:
        """What the host's own end of its cable has counted."""
        show = ("-j", "-s", "link", "show", "dev", INTERFACE)
        stats = json.loads(_call("ip", "-n", self.name(host), *show))[0]["stats64"]
        return {
            "tx_bytes": int(stats["tx"]["bytes"]),
            "rx_bytes": int(stats["rx"]["bytes"]),
            "drops": int(stats["tx"]["dropped"]) + _dropped(self.name(host), INTERFACE),
        }


def _shape(name: str, device: str, shape: Shape) -> None:
    """Give what a device of a namespace sends a rate and a queue."""
    _call(
        *("tc", "-n", name, "qdisc", "replace", "dev", device, "root", "tbf"),
        *("rate", f"{shape.rate}bit", "burst", f"{shape.burst}b", "limit", f"{shape.buffer}b"),
    )


def _dropped(name: str, device: str) -> int:
    """Packets that the queue of a namespace's device has dropped."""
    queues = _call("tc", "-n", name, "-j", "-s", "qdisc", "show", "dev", device)
    return sum(int(queue["drops"]) for queue in json.loads(queues))


def _text(file: IO[bytes]) -> str:
    """All that was written to a temporary file."""
    file.seek(0)
    return file.read().decode(errors="replace")

"""Links with a delay: one process that carries packets between the hosts' tun devices.

This process reads each packet at once, puts it on the line from its sender, then on the line to
its receiver, each with a rate and a queue of finite length, and hands it over when it has left both
and the delay has passed. A token bucket before the sender's device (``netns.py``) keeps what TCP
sends ahead in its own queues. The devices take packets of several TCP segments (``IFF_VNET_HDR``),
so that few packets carry many bytes and TCP counts segments of an Ethernet's size all the same.

``netns.Cluster`` starts it as a :class:`RelayProcess`. A line on standard input asks for the
counters. The end of standard input ends the process: no relay outlives the program that wanted it,
even if that is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import heapq
import json
import os
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address

from links import ClusterError, Shape

TUN = "/dev/net/tun"
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4 = 0x01, 0x02

_HEADER = struct.Struct("=BBHHHH")  # struct virtio_net_hdr
_DESTINATION = slice(_HEADER.size + 16, _HEADER.size + 20)
_LONGEST = _HEADER.size + (1 << 16)
_PRIORITY = 10
_ANSWER_SECONDS = 30.0


@dataclass
class Line:
    """A line of a given rate behind a queue of finite length. Times are nanoseconds.

    Attributes:
        rate: Bits per second.
        limit: Bytes that may wait.
        free: When the line has sent all that it took.
        dropped: Packets that found the queue full.
        longest: Most bytes that have waited.
    """

    rate: int
    limit: int
    free: int = 0
    dropped: int = 0
    longest: int = 0

    def lasts(self, size: int) -> int:
        """Nanoseconds that the line needs for some bytes."""
        return size * 8 * 10**9 // self.rate

    def take(self, first: int, size: int) -> int | None:
        """Puts a packet on the line.

        Args:
            first: When its first bit arrives.
            size: Its bytes.

        Returns:
            When its last bit has left, or ``None`` if the queue was full.
        """
        waiting = (self.free - first) * self.rate // (8 * 10**9)
        if waiting > self.limit:
            self.dropped += 1
            return None
        self.longest = max(self.longest, waiting)
        self.free = max(self.free, first) + self.lasts(size)
        return self.free


def wire_bytes(packet: bytes) -> int:
    """Bytes of a packet once it is cut into segments, each with its headers.

    Args:
        packet: A ``virtio_net_hdr``, then an IPv4 packet of one or more TCP segments.
    """
    segment: int
    tcp: int
    _, _, _, segment, tcp, _ = _HEADER.unpack_from(packet)
    length = len(packet) - _HEADER.size
    if not segment:
        return length
    headers = tcp + 4 * (packet[_HEADER.size + tcp + 12] >> 4)
    return length + headers * (-(-(length - headers) // segment) - 1)


@dataclass
class Port:
    """Where a host is plugged in.

    Attributes:
        device: Descriptor of the host's tun device.
        sends: The line from the host.
        receives: The line to the host.
    """

    device: int
    sends: Line
    receives: Line


@dataclass
class Relay:
    """Packets under way between ports.

    Attributes:
        ports: The port of each IPv4 address.
        delay: Nanoseconds of one direction.
    """

    ports: dict[bytes, Port]
    delay: int
    _under_way: list[tuple[int, int, Port, bytes, int]] = field(default_factory=list)
    _count: int = 0

    def accept(self, now: int, sender: Port, packet: bytes) -> None:
        """Puts a packet on the line of its sender; one for nobody is ignored."""
        receiver = self.ports.get(packet[_DESTINATION])
        if receiver is not None:
            size = wire_bytes(packet)
            self._schedule(sender.sends.take(now, size), receiver, packet, size)

    def deliver(self, now: int) -> float | None:
        """Moves on what is due; returns seconds until something is, ``None`` if nothing waits."""
        while self._under_way and self._under_way[0][0] <= now:
            due, _, receiver, packet, size = heapq.heappop(self._under_way)
            if size:
                # The last bit has left the sender's line; the first was there a packet ago.
                first = due - receiver.receives.lasts(size)
                left = receiver.receives.take(first, size)
                self._schedule(None if left is None else left + self.delay, receiver, packet, 0)
                continue
            try:
                os.write(receiver.device, packet)
            except OSError:  # the host is being removed, or the kernel lacks memory
                receiver.receives.dropped += 1
        return (self._under_way[0][0] - now) / 1e9 if self._under_way else None

    def _schedule(self, due: int | None, receiver: Port, packet: bytes, size: int) -> None:
        """Does what is next with a packet at a time; with one that was dropped, nothing."""
        if due is not None:
            self._count += 1  # of two in one moment, the first comes first; ports do not compare
            heapq.heappush(self._under_way, (due, self._count, receiver, packet, size))

    def counters(self) -> list[dict[str, int]]:
        """What the lines of each host have dropped so far, and the longest queue towards it."""
        return [
            {
                "dropped": port.sends.dropped + port.receives.dropped,
                "longest_queue": port.receives.longest,
            }
            for port in self.ports.values()
        ]

    def run(self) -> None:
        """Carries packets until standard input ends."""
        senders, orders = {port.device: port for port in self.ports.values()}, sys.stdin.fileno()
        watched, wait = [*senders, orders], None
        while True:
            ready, _, _ = select.select(watched, (), (), wait)
            now = time.monotonic_ns()
            for device in ready:
                if device != orders:
                    with contextlib.suppress(BlockingIOError):
                        self.accept(now, senders[device], os.read(device, _LONGEST))
                elif os.read(orders, 1024):
                    print(json.dumps(self.counters()), flush=True)
                else:
                    return
            wait = self.deliver(time.monotonic_ns())


def open_device(name: str) -> int:
    """Makes a tun device in this namespace and returns its descriptor."""
    device = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
    flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(device, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4)
    return device


def main(settings: str) -> None:
    """Makes the devices ``port0``, ``port1``, …, says so, and carries packets.

    Args:
        settings: JSON with ``addresses`` of the hosts, ``rate`` in bits per second, ``buffer`` in
            bytes and ``rtt_ms``.
    """
    chosen = json.loads(settings)
    addresses = [IPv4Address(address).packed for address in chosen["addresses"]]
    line = partial(Line, chosen["rate"], chosen["buffer"])
    ports = {
        address: Port(open_device(f"port{host}"), line(), line())
        for host, address in enumerate(addresses)
    }
    # The wire does not wait for the programs that use it.
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(_PRIORITY))
    gc.disable()  # there are no cycles, and a collection is jitter
    print("ready", flush=True)
    Relay(ports, round(chosen["rtt_ms"] * 1e6 / 2)).run()


# ---------------------------------------------------------------- what starts it


class RelayProcess:
    """A relay at work, which has made a tun device ``port0``, ``port1``, … for each host.

    Args:
        within: Command that runs another one in the namespace where the devices are made.
        addresses: IPv4 addresses of the hosts.
        shape: Rate, queue and round trip of their links.
    """

    def __init__(self, within: Sequence[str], addresses: Sequence[str], shape: Shape) -> None:
        settings = {"addresses": addresses, **vars(shape)}
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [*within, sys.executable, __file__, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        self._answer()

    def counters(self) -> list[dict[str, int]]:
        """See :meth:`Relay.counters`.

        Raises:
            ClusterError: If the relay has ended; with what it wrote.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        found: list[dict[str, int]] = json.loads(self._answer())
        return found

    def check(self) -> None:
        """Raises :class:`ClusterError` if the relay has ended."""
        if self._process.poll() is not None:
            self._answer()

    def close(self) -> None:
        """Ends the relay; safe to call twice."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _answer(self) -> str:
        """The next line that the relay writes."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], _ANSWER_SECONDS)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self._process.kill()
            code = self._process.wait()
            self._errors.seek(0)
            why = self._errors.read().decode(errors="replace").strip()[-4000:]
            raise ClusterError(f"the relay of the links ended ({code}) {why}".rstrip())
        return line


if __name__ == "__main__":
    main(sys.argv[1])

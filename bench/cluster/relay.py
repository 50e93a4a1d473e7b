"""Links with a delay: one process that carries packets between the hosts' tun devices.

A host's kernel paces what the host sends (``tc tbf``, see ``netns.py``). This process reads each
packet at once, puts it on the line of the host that it is for, which has a rate and a queue of
finite length, and hands it over when it has left that line and the delay has passed. The devices
take packets of several TCP segments (``IFF_VNET_HDR``), so that few packets carry many bytes and
TCP counts segments of an Ethernet's size all the same.

``netns.Cluster`` starts it. A line on standard input asks for the counters, its end ends the
process: no relay outlives the program that wanted it.
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
import sys
import time
from dataclasses import dataclass, field
from ipaddress import IPv4Address

TUN = "/dev/net/tun"
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4 = 0x01, 0x02

_HEADER = struct.Struct("=BBHHHH")  # struct virtio_net_hdr
_DESTINATION = slice(_HEADER.size + 16, _HEADER.size + 20)
_LONGEST = _HEADER.size + (1 << 16)
_PRIORITY = 10


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

    def take(self, now: int, size: int) -> int | None:
        """Puts a packet on the line.

        A packet that finds the line idle leaves at once: its sender's line has taken the time for
        its bytes, and a switch passes a packet on while it arrives.

        Args:
            now: When the packet arrives; not before the last one.
            size: Its bytes.

        Returns:
            When its last byte has left, or ``None`` if the queue was full.
        """
        waiting = max(0, self.free - now) * self.rate // (8 * 10**9)
        if waiting + size > self.limit:
            self.dropped += 1
            return None
        self.longest = max(self.longest, waiting)
        self.free = max(now, self.free + size * 8 * 10**9 // self.rate)
        return self.free


def wire_bytes(packet: bytes) -> int:
    """Bytes of a packet once it is cut into segments, each with its headers.

    Args:
        packet: A ``virtio_net_hdr``, then an IPv4 packet of one or more TCP segments.
    """
    _, _, _, segment, tcp, _ = _HEADER.unpack_from(packet)
    length = len(packet) - _HEADER.size
    if not segment:
        return length
    headers = tcp + 4 * (packet[_HEADER.size + tcp + 12] >> 4)
    return length + headers * (-(-(length - headers) // segment) - 1)


@dataclass
class Relay:
    """Packets under way between devices.

    Attributes:
        devices: For each host the descriptor of its device.
        lines: For each host the line towards it.
        delay: Nanoseconds of one direction.
        lost: For each host packets that its device refused, as it was down.
    """

    devices: list[int]
    lines: dict[bytes, tuple[int, Line]]
    delay: int
    lost: int = 0
    _under_way: list[tuple[int, int, int, bytes]] = field(default_factory=list)
    _count: int = 0

    def accept(self, now: int, packet: bytes) -> None:
        """Puts a packet on its line; one for nobody is dropped."""
        device, line = self.lines.get(packet[_DESTINATION], (None, None))
        if device is None or line is None:
            return
        left = line.take(now, wire_bytes(packet))
        if left is not None:
            self._count += 1  # keeps the order of packets that arrive in one moment
            heapq.heappush(self._under_way, (left + self.delay, self._count, device, packet))

    def deliver(self, now: int) -> float | None:
        """Hands over what is due; returns seconds until the next packet is, ``None`` if none is."""
        while self._under_way and self._under_way[0][0] <= now:
            _, _, device, packet = heapq.heappop(self._under_way)
            try:
                os.write(device, packet)
            except OSError:
                self.lost += 1
        return (self._under_way[0][0] - now) / 1e9 if self._under_way else None

    def counters(self) -> dict[str, object]:
        """What the lines have dropped and queued so far, in the order of the hosts."""
        lines = [line for _, line in self.lines.values()]
        return {
            "dropped": [line.dropped for line in lines],
            "longest_queue": [line.longest for line in lines],
            "lost": self.lost,
        }

    def run(self) -> None:
        """Carries packets until standard input ends."""
        watched, wait = [*self.devices, sys.stdin.fileno()], None
        while True:
            ready, _, _ = select.select(watched, (), (), wait)
            now = time.monotonic_ns()
            for device in ready:
                if device != watched[-1]:
                    with contextlib.suppress(BlockingIOError):
                        self.accept(now, os.read(device, _LONGEST))
                elif not os.read(device, 1024):
                    return
                else:
                    print(json.dumps(self.counters()), flush=True)
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
    devices = [open_device(f"port{host}") for host in range(len(addresses))]
    lines = {
        address: (device, Line(chosen["rate"], chosen["buffer"]))
        for address, device in zip(addresses, devices, strict=True)
    }
    # The wire does not wait for the programs that use it.
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(_PRIORITY))
    gc.disable()  # there are no cycles, and a collection is jitter
    print("ready", flush=True)
    Relay(devices, lines, round(chosen["rtt_ms"] * 1e6 / 2)).run()


if __name__ == "__main__":
    main(sys.argv[1])

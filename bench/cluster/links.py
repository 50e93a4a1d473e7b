"""The emulated network as one describes it: topology, rates, round trip; and its options."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_HOSTS = 200
MTU = 1500
_UNITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_LOOPBACK_PACKET = 1 << 16


class ClusterError(RuntimeError):
    """The hosts cannot be made here, or a process on one of them failed."""


@dataclass(frozen=True)
class Shape:
    """Settings of a link.

    Attributes:
        rate: Bits per second on the wire (Ethernet headers included, but for links with a delay).
        burst: Bytes the token bucket holds, that is, bytes which may leave at once after a pause.
        gso: Largest packet the TCP stack may hand down before it is cut into frames.
        buffer: Bytes that may queue at each end of a cable; packets beyond are dropped.
        rtt_ms: Milliseconds that the wire adds to a round trip, half of them each way.
    """

    rate: int
    burst: int
    gso: int
    buffer: int
    rtt_ms: float = 0.0

    @classmethod
    def of(cls, rate: str, rtt_ms: float = 0.0) -> Shape:
        """Work out the settings for a rate such as ``"1gbit"``.

        Raises:
            ClusterError: If the rate cannot be read, or the round trip is negative or a minute.
        """
        bits = _bits_per_second(rate)
        if not 0 <= rtt_ms < 60_000:
            raise ClusterError(f"rtt_ms must be from 0 to below 60000, not {rtt_ms}")
        # A bucket that is idle between two collectives fills up, and its content then travels
        # for free. 150 microseconds' worth keeps that gift small beside a step of milliseconds
        # and is still more than the timer's slack, without which the rate would not be reached.
        # With a delay the relay charges for them, and two milliseconds' worth saves packets: TCP
        # itself makes them as long as a millisecond.
        burst = max(4 * MTU, round(bits / 8 * (2e-3 if rtt_ms else 150e-6)))
        # A packet larger than the bucket would be cut up in software, which costs processor
        # time that the benchmark needs; so ask TCP for packets that fit (headers added).
        gso = min(65536, max(2 * MTU, burst // 2 if rtt_ms else burst * 3 // 4))
        # A megabyte a port is what small switches have; routers of long lines have what is
        # under way in a round trip.
        buffer = max(1 << 20, 8 * burst, round(bits / 8 * rtt_ms / 1e3))
        return cls(rate=bits, burst=burst, gso=gso, buffer=buffer, rtt_ms=rtt_ms)

    @classmethod
    def inside(cls, rate: str) -> Shape:
        """The settings of a link inside a host, whose loopback has packets of 64 KiB."""
        bits = _bits_per_second(rate)
        burst = max(2 * _LOOPBACK_PACKET, round(bits / 8 * 150e-6))
        return cls(rate=bits, burst=burst, gso=_LOOPBACK_PACKET, buffer=max(1 << 20, 8 * burst))


def _bits_per_second(rate: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(bit|kbit|mbit|gbit)", rate.strip().lower())
    bits = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if bits < 1:
        raise ClusterError(f"cannot read the rate {rate!r}: write it like 1gbit or 100mbit")
    return bits


@dataclass(frozen=True)
class Network:
    """Hosts behind equal links.

    Attributes:
        hosts: Number of hosts, 2 to 200.
        rate: Speed of each host's link in each direction, such as ``"1gbit"`` or ``"100mbit"``.
        rtt_ms: Milliseconds that the wire adds to the round trip between two hosts.
        local: Ranks per host.
        inner_rate: Speed of the link that the ranks of one host share; ``None``: its loopback's.
    """

    hosts: int = 4
    rate: str = "1gbit"
    rtt_ms: float = 0.0
    local: int = 1
    inner_rate: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be made.

        Raises:
            ClusterError: Names the argument and its value.
        """
        if not 2 <= self.hosts <= MAX_HOSTS:
            raise ClusterError(f"hosts must be from 2 to {MAX_HOSTS}, not {self.hosts}")
        if self.local < 1:
            raise ClusterError(f"local must be at least 1, not {self.local}")
        _ = self.outer, self.inner

    @classmethod
    def of(cls, options: argparse.Namespace) -> Network:
        """The network that the options of :func:`network_options` ask for."""
        names = ("hosts", "rate", "rtt_ms", "local", "inner_rate")
        return cls(**{name: getattr(options, name) for name in names})

    @property
    def ranks(self) -> int:
        """Ranks on all hosts."""
        return self.hosts * self.local

    @property
    def outer(self) -> Shape:
        """Settings of the hosts' links."""
        return Shape.of(self.rate, self.rtt_ms)

    @property
    def inner(self) -> Shape | None:
        """Settings of the link inside a host; ``None``: not shaped."""
        return None if self.inner_rate is None else Shape.inside(self.inner_rate)

    def record(self) -> dict[str, Any]:
        """What the results of a benchmark say of the network."""
        inner = self.inner
        return {
            "topology": f"{self.hosts}x{self.local}",
            "link": vars(self.outer),
            "inner_link": None if inner is None else vars(inner),
        }

    def __str__(self) -> str:
        """A title, such as ``4 hosts of 2 ranks at 100mbit, round trip 50 ms``."""
        ranks = f" of {self.local} ranks" if self.local > 1 else ""
        inside = f" ({self.inner_rate} inside)" if self.inner_rate else ""
        delay = f", round trip {self.rtt_ms:g} ms" if self.rtt_ms else ""
        return f"{self.hosts} hosts{ranks} at {self.rate}{inside}{delay}"


class _Topology(argparse.Action):
    """Reads ``4`` or ``4x2`` into ``hosts`` and ``local``."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option: str | None = None,
    ) -> None:
        match = re.fullmatch(r"(\d{1,4})(?:x(\d{1,4}))?", str(values))
        if match is None:
            parser.error(f"{option}: write hosts or hosts x ranks, like 4 or 4x2, not {values!r}")
        namespace.hosts, namespace.local = int(match[1]), int(match[2] or 1)


def network_options(hosts: int = 4, local: int = 1) -> argparse.ArgumentParser:
    """The options of the network, for ``parents=`` of a benchmark's parser.

    Args:
        hosts: Default number of hosts.
        local: Default ranks per host.
    """
    parser = argparse.ArgumentParser(add_help=False)
    network = parser.add_argument_group("network")
    network.add_argument(
        "--topology", "--hosts", action=_Topology, default=argparse.SUPPRESS, metavar="HOSTSxRANKS",
        help=f"hosts (2 to {MAX_HOSTS}) and ranks per host, such as 4 or 4x2; "
        f"default {hosts}x{local}",
    )  # fmt: skip
    network.add_argument(
        "--rate", default="1gbit", help="of each host's link, each way; default %(default)s"
    )
    network.add_argument(
        "--inner-rate", metavar="RATE",
        help="of the link that the ranks of one host share; default: as fast as its loopback",
    )  # fmt: skip
    network.add_argument(
        "--rtt-ms", "--delay-ms", dest="rtt_ms", type=float, default=0.0, metavar="MS",
        help="what the wire adds to a round trip between hosts, half of it each way; default 0",
    )  # fmt: skip
    parser.set_defaults(hosts=hosts, local=local)
    return parser

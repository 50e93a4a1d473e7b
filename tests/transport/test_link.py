"""Which algorithm is chosen from what was measured between the ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ranks_transfers as cases
from ranks import Worlds

from pydist.transport.exchange import LATENCY_BYTES, MOST_GATHERED_BYTES, choose_algorithm
from pydist.transport.link import Link


def sizes(payload: int) -> Any:
    """What is asked of a coder whose payload and reduced payload have so many bytes."""
    return SimpleNamespace(
        units=1, message_bytes=lambda units: payload, reduced_bytes=lambda units: payload
    )


@pytest.mark.parametrize(
    ("rtt", "rate", "worth"),
    [
        (0.2e-3, 125e6, LATENCY_BYTES),  # 12.5 KB
        (10e-3, 12.5e6, 62_500),
        (50e-3, 12.5e6, 312_500),
        (100e-3, 1.25e9, MOST_GATHERED_BYTES),
    ],
)
def test_gathers_while_more_bytes_take_less_than_a_phase(
    rtt: float, rate: float, worth: int
) -> None:
    link, ranks = Link(rtt / 2, rate), 8
    more = ranks - 1 - 2 * (ranks - 1) / ranks  # payloads that a gather sends more
    for payload, chosen in ((worth / more - 1, "all_gather"), (worth / more + 1, "two_phase")):
        assert choose_algorithm("auto", sizes(int(payload)), ranks, link) == chosen
    for algorithm in ("two_phase", "all_gather"):
        assert choose_algorithm(algorithm, sizes(1 << 20), ranks, link) == algorithm
    assert choose_algorithm("auto", sizes(1 << 20), 2, link) == "all_gather", "never more bytes"


@pytest.mark.multiprocess
@pytest.mark.timeout(60)
def test_all_ranks_go_by_one_measurement(worlds: Worlds) -> None:
    links = worlds(3).run(cases.measured)
    assert links[0] == links[1] == links[2]
    assert links[0].seconds > 0 and links[0].rate > 0

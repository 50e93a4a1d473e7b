"""Messages go from rank to rank directly, and find their receives posted."""

from __future__ import annotations

from typing import Any

import pytest
import ranks_transfers as cases
from ranks import Worlds

from pydist import QSGD, Raw, Ternary
from pydist.transport.transfers import Kind

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(60)]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_direct_transfers(worlds: Worlds, ranks: int) -> None:
    worlds(ranks).run(cases.rows_to_everyone)
    worlds(ranks).run(cases.shorter_messages)


def test_what_was_posted_for_a_refused_call_takes_nothing(worlds: Worlds) -> None:
    worlds(3).run(cases.refused_then_made)


@pytest.mark.parametrize("codec", [Raw(), QSGD(4, entropy="elias"), Ternary()], ids=repr)
@pytest.mark.parametrize("algorithm", ["two_phase", "all_gather"])
def test_receives_are_posted_a_message_ahead(worlds: Worlds, algorithm: str, codec: Any) -> None:
    """Half a round trip for each message: what it answers is not awaited before it is expected."""
    messages = ["agreement", "scales", "phase 1", "phase 2", "confirmation"]
    if algorithm == "all_gather":
        messages.remove("phase 2")
    if not isinstance(codec, Ternary):
        messages.remove("scales")
    for events in worlds(3).run(cases.posted_ahead, algorithm, codec):
        assert [what for event, what in events if event == "arrive"] == messages
        for before, message in zip(messages, messages[1:], strict=False):
            assert events.index(("post", message)) < events.index(("arrive", before)), events
        assert ("post", "agreement") in events, "the next call's"


def test_tags_of_calls_differ() -> None:
    tags = [kind.tag(number) for number in range(100) for kind in Kind]
    assert len(set(tags)) == len(tags)
    assert 0 <= min(kind.tag(2**31) for kind in Kind)
    assert max(kind.tag(2**40 + i) for kind in Kind for i in range(7)) < 2**31

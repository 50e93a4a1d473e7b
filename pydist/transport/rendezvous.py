"""How the ranks of a group find each other in the store before they have connections.

A meeting may fail (a rank comes too late, or not at all) and be tried again, by any ranks and any
number of times: nothing is counted, so no failure shifts what follows.

1. Every rank writes that it is here, with a token that is new each time, and a text.
2. The group's first rank lists all tokens in a roster, and again whenever one has changed.
3. Who finds its own token in the roster acknowledges it. A rank that gave up does not.
4. When all have acknowledged one roster, the first rank says so. The roster's name is unique.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from pydist.errors import PydistError

FIRST_PAUSE, LONGEST_PAUSE = 0.0005, 0.02
"""Seconds between two looks at the store; they double from the first to the longest."""


@dataclass(frozen=True)
class Roster:
    """Who has met.

    Attributes:
        name: Unique, the same on all ranks.
        texts: What each rank brought, in rank order.
    """

    name: str
    texts: list[str]


class _Meeting:
    """The meeting of one group, advanced one look at the store at a time."""

    def __init__(self, group: dist.ProcessGroup, purpose: str, text: str) -> None:
        self._store = dist.distributed_c10d._get_default_store()
        self._ranks = dist.get_process_group_ranks(group)
        self._rank, self._size = dist.get_rank(group), group.size()
        self._place = f"pydist/{group.group_name}/{purpose}"
        self._token = uuid.uuid4().hex
        self._name = ""
        self._entries: list[list[str]] = []
        self._store.set(self._here(self._rank), json.dumps([self._token, text]))

    def _here(self, rank: int) -> str:
        return f"{self._place}/here/{rank}"

    def _acknowledged(self, rank: int) -> str:
        return f"{self._place}/{self._name}/{rank}"

    def advance(self) -> bool:
        """Looks at the store once; whether all have met."""
        return self._lead() if self._rank == 0 else self._follow()

    def _lead(self) -> bool:
        here = [self._here(rank) for rank in range(self._size)]
        if not self._store.check(here):
            return False
        entries = [json.loads(self._store.get(key)) for key in here]
        if entries != self._entries:
            self._entries, self._name = entries, uuid.uuid4().hex
            roster = json.dumps({"name": self._name, "entries": entries})
            self._store.set(f"{self._place}/roster", roster)
        others = [self._acknowledged(rank) for rank in range(1, self._size)]
        if others and not self._store.check(others):
            return False
        self._store.set(f"{self._place}/{self._name}/go", "")
        return True

    def _follow(self) -> bool:
        roster = f"{self._place}/roster"
        if self._store.check([roster]):
            found = json.loads(self._store.get(roster))
            entries = found["entries"]
            mine = len(entries) == self._size and entries[self._rank][0] == self._token
            if mine and found["name"] != self._name:
                self._name, self._entries = found["name"], entries
                self._store.set(self._acknowledged(self._rank), "")
        return bool(self._name) and self._store.check([f"{self._place}/{self._name}/go"])

    def roster(self) -> Roster:
        """Who has met."""
        return Roster(f"{self._place}/{self._name}", [text for _, text in self._entries])

    def missing(self) -> list[int]:
        """Ranks, as the world counts them, that have not come."""
        absent = [r for r in range(self._size) if not self._store.check([self._here(r)])]
        if not absent and self._rank != 0:
            absent = [0]  # it has come before, but does not answer now
        elif not absent:
            others = range(1, self._size)
            absent = [r for r in others if not self._store.check([self._acknowledged(r)])]
        return [self._ranks[rank] for rank in absent]


def meet(
    groups: Sequence[dist.ProcessGroup], purpose: str, timeout: timedelta, text: str = ""
) -> list[Roster]:
    """Waits until all ranks of all groups are here; ranks may name their groups in any order.

    Args:
        groups: Groups that this rank belongs to.
        purpose: What the meeting is about; the same on all ranks.
        timeout: How long to wait.
        text: What this rank has to say to the others.

    Returns:
        The roster of each group.

    Raises:
        PydistError: A rank did not come in time; names it. It may be tried again.
    """
    meetings = {group: _Meeting(group, purpose, text) for group in set(groups)}
    waiting, pause = list(meetings.values()), FIRST_PAUSE
    deadline = time.monotonic() + timeout.total_seconds()
    while waiting := [meeting for meeting in waiting if not meeting.advance()]:
        if time.monotonic() > deadline:
            absent = sorted({rank for meeting in waiting for rank in meeting.missing()})
            who = f"rank{'s' if len(absent) > 1 else ''} {', '.join(map(str, absent))}"
            raise PydistError(
                f"{purpose}: {who} did not come within {timeout.total_seconds():g} s; the call "
                "may be tried again on all ranks"
            )
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
    return [meetings[group].roster() for group in groups]

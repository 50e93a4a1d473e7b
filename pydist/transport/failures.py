"""What went wrong on which rank: ranks tell each other over the store, as their connections end.

A rank that fails writes why, then ends its connections, so that nobody waits for it. The others
find their own connections ended, write that, and look who has a reason. A rank that writes nothing
is gone.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

COLLECT_SECONDS = 1.0
"""How long to wait for what the others have to say; a rank that is silent then is lost."""

_PAUSE = 0.01


# Gloo tells the wait that ended first "Timed out waiting 3000ms for …", and the others of that rank
# "Application timeout caused pair closure".
_IN_VAIN = re.compile("timed out|timeout", re.IGNORECASE)


class LinkError(RuntimeError):
    """An exchange of messages ended without a result: a peer is gone, stuck, or has failed."""


@dataclass(frozen=True)
class Report:
    """What a rank says of a failure.

    Attributes:
        cause: Why it failed itself; empty where its connections ended, or it waited in vain.
        link: What it was told then.
    """

    cause: str = ""
    link: str = ""

    @classmethod
    def of(cls, error: BaseException) -> Report:
        """The report of what a rank's own thread ran into."""
        if isinstance(error, LinkError):
            return cls(link=str(error))
        return cls(cause=str(error) or type(error).__name__)


class Failures:
    """The reports of a communicator's ranks.

    Args:
        store: Where they are.
        name: Unique, the same on all ranks.
        ranks: The ranks, as the world counts them.
        rank: This rank's place among them.
        timeout: Seconds that an exchange waits, for messages.
    """

    def __init__(self, store: Any, name: str, ranks: list[int], rank: int, timeout: float) -> None:
        self._store, self._name, self._ranks, self._rank = store, name, ranks, rank
        self._timeout = timeout
        self.closing = False  # this rank ends: it does not wait for what others have to say

    def publish(self, report: Report) -> None:
        """Tells the others; quietly, as the store may be gone, too."""
        try:
            self._store.set(f"{self._name}/failed/{self._rank}", json.dumps(asdict(report)))
        except Exception:
            self._store = None

    def _read(self, found: dict[int, Report]) -> None:
        for place in range(len(self._ranks)):
            key = f"{self._name}/failed/{place}"
            if self._store is not None and place not in found and self._store.check([key]):
                found[place] = Report(**json.loads(self._store.get(key)))

    def explain(self, mine: Report, hung_up: Collection[int] = ()) -> str:
        """Waits for the others' reports and says what went wrong, and where.

        Args:
            mine: This rank's.
            hung_up: Places of the peers that ended their connections first.
        """
        found = {self._rank: mine}
        deadline = time.monotonic() + COLLECT_SECONDS
        while len(found) < len(self._ranks) and time.monotonic() < deadline:
            try:
                self._read(found)
            except Exception:
                self._store = None
            if self.closing or self._store is None or any(r.cause for r in found.values()):
                break
            time.sleep(_PAUSE)
        causes = [
            f"rank {self._ranks[place]}: {found[place].cause}"
            for place in sorted(found)
            if found[place].cause
        ]
        return "; ".join(causes) or self._who_is_lost(found, mine, hung_up)

    def _who_is_lost(self, found: dict[int, Report], mine: Report, hung_up: Collection[int]) -> str:
        lost = [place for place in range(len(self._ranks)) if place not in found]
        gone = [place for place in lost if place in hung_up]
        if gone or self._store is None:  # without a store nobody can say anything
            lost = gone  # the others are busy, and have not noticed yet
        if not lost:
            return f"the connections ended: {mine.link}"
        names = ", ".join(str(self._ranks[place]) for place in lost)
        who = f"rank{'s' if len(lost) > 1 else ''} {names}"
        # A rank that waited in vain ends its connections, which is what the others then see.
        if any(_IN_VAIN.search(report.link) for report in found.values()):
            return f"no sign of {who} within {self._timeout:g} s"
        return f"{who} {'were' if len(lost) > 1 else 'was'} lost: the connection ended"

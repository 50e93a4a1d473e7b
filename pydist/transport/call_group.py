"""Calls that are made or left out together."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from pydist.errors import PydistError


class CallGroup:
    """Calls that make sense together only, such as the buckets of one step.

    When the ranks disagree on one of them, all ranks leave out those behind it: some may have more
    of them than others, and would wait for a partner that never comes.
    """

    def __init__(self) -> None:
        self.error: PydistError | None = None

    @contextlib.contextmanager
    def member(self) -> Generator[None, None, None]:
        """Runs a member's agreement; to be entered in the order of the calls.

        Raises:
            PydistError: Of the member that failed first.
        """
        if self.error is not None:
            raise self.error
        try:
            yield
        except PydistError as error:
            self.error = error
            raise

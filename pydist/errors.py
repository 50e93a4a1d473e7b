"""The exceptions of pydist."""

from __future__ import annotations


class PydistError(RuntimeError):
    """A collective or an optimizer step went wrong; the message says what and where."""


class MismatchError(PydistError):
    """Ranks disagree on what they are doing; raised on every rank with field, values and ranks."""

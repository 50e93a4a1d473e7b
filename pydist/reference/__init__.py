"""The executable specification: every kernel again, plain and slow, in NumPy.

Signs and Lion are here by name; other families are modules of their own: :mod:`.blocks`,
:mod:`.ternary`, :mod:`.topk`, :mod:`.elias`, :mod:`.raw`, :mod:`.message`.
"""

from __future__ import annotations

from pydist.reference import blocks, elias, message, raw, ternary, topk
from pydist.reference.signs import (
    Storage,
    Ties,
    count_votes,
    lion_apply,
    lion_pack,
    majority_vote,
    pack_signs,
    round_to,
    unpack_votes,
)

__all__ = [
    "Storage", "Ties", "blocks", "count_votes", "elias", "lion_apply", "lion_pack",
    "majority_vote", "message", "pack_signs", "raw", "round_to", "ternary", "topk",
    "unpack_votes",
]  # fmt: skip

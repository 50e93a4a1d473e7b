"""What is timed: every kernel, the bytes it must move, and its rivals; a module a family.

A case makes a set of buffers; its kernel and its rivals run on that set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydist.bench.case import Case, Maker
from pydist.bench.cases import blocks, elias, lion, raw, signs, ternary, topk
from pydist.bench.options import FAMILIES

_CASES = {
    "signs": signs.cases,
    "lion": lion.cases,
    "blocks": blocks.cases,
    "elias": elias.cases,
    "ternary": ternary.cases,
    "topk": topk.cases,
    "raw": raw.cases,
}


def cases(maker: Maker, kernels: Sequence[str]) -> Iterator[Case]:
    """The cases of these kernels, family by family."""
    for family, make in _CASES.items():
        if not set(kernels).isdisjoint(FAMILIES[family]):
            yield from (case for case in make(maker) if case.kernel in kernels)

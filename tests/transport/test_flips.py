"""One bit flipped on its way: no crash, no silent difference, every rank raises."""

from __future__ import annotations

import pytest
import ranks_flips as cases
from ranks import Worlds

pytestmark = pytest.mark.multiprocess


def check(worlds: Worlds, ranks: int, call: str, name: str, algorithm: str, count: int) -> None:
    outcomes = worlds(ranks).run(cases.flips, call, name, algorithm, count, timeout=30 + 3 * count)
    for flip in zip(*outcomes, strict=True):
        where = f"{call} {name} {algorithm}: exchange {flip[0][0]}, bit {flip[0][1]}: {flip}"
        raised = [kind == "PydistError" for _, _, (kind, _), _, _ in flip]
        assert raised[1], f"not noticed: {where}"
        if not all(raised):  # the call's last exchange: the others have the result, and it is right
            assert all(right for _, _, _, right, _ in flip[:1] + flip[2:]), where
        assert all(again[0] == "PydistError" for *_, again in flip), f"the group goes on: {where}"


@pytest.mark.parametrize(
    ("call", "name", "algorithm"),
    [
        ("all_reduce", "vote", "all_gather"),
        ("all_reduce", "elias", "two_phase"),
        ("all_reduce", "ternary", "two_phase"),
        ("ddp", "", "two_phase"),
    ],
)
def test_flipped_bits(worlds: Worlds, call: str, name: str, algorithm: str) -> None:
    check(worlds, 2, call, name, algorithm, 10)


@pytest.mark.soak
@pytest.mark.parametrize("algorithm", ["two_phase", "all_gather"])
@pytest.mark.parametrize("name", [*cases.CODECS, "ddp"])
def test_many_flipped_bits(worlds: Worlds, name: str, algorithm: str) -> None:
    check(worlds, 3, "ddp" if name == "ddp" else "all_reduce", name, algorithm, 200)

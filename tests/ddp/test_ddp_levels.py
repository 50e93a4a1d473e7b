"""The DDP hook on two levels: bit-identical to its specification; nothing of one level is lost."""

from __future__ import annotations

from typing import Any

import pytest
import ranks_ddp as one_level
import ranks_ddp_levels as cases
import torch
from ranks import Worlds
from test_collectives import same_on_all_ranks

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(180)]

DTYPES = ["float32", "float16", "bfloat16"]
EXTRAS: list[tuple[dict[str, Any], int | None]] = [
    ({}, None),
    ({"algorithm": "two_phase"}, 700),
    ({"exact_skip": True}, None),
    ({"momentum": 0.5, "clip_norm": 0.01}, None),
    ({"residual_dtype": torch.bfloat16, "algorithm": "all_gather"}, None),
    ({"error_feedback": False}, 300),
]


def cases_of(codecs: list[str], shift: int) -> list[tuple[Any, ...]]:
    """Every codec, in another mode, with another dtype and another extra."""
    modes, result = list(one_level.MODES), []
    for i, codec in enumerate(codecs):
        extra, chunk = EXTRAS[(i + shift) % len(EXTRAS)]
        if codec in ("ternary", "trits", "coded"):  # the oracle has their sums, not their means
            extra = {"op": "sum", "algorithm": "two_phase"}
        elif codec in ("votes", "qsgd2", "qsgd4_l2"):
            extra = {k: v for k, v in extra.items() if k != "error_feedback"}
        result.append(
            (codec, DTYPES[(i + shift) % 3], modes[(i + shift) % len(modes)], extra, chunk)
        )
    return result


SOME = [
    "sign_l1",
    "qsgd4",
    "int8",
    "mixed",
    "sparse",
    "elias",
    "votes",
    "raw16",
    "trits",
    "schedule",
]


@pytest.mark.parametrize("local", [2, 4])
def test_conforms(worlds: Worlds, local: int) -> None:
    listed = SOME[:: 4 if local == 4 else 2]  # one node of four, and two of two
    same_on_all_ranks(worlds(4).run(cases.conforms, local, cases_of(listed, local), timeout=120))


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("shift", range(6))
@pytest.mark.parametrize("shape", [(4, 2), (6, 2), (6, 3)])
def test_conforms_everywhere(worlds: Worlds, shape: tuple[int, int], shift: int) -> None:
    listed = cases_of([*one_level.CODECS, "schedule"], shift)
    same_on_all_ranks(worlds(shape[0]).run(cases.conforms, shape[1], listed, timeout=900))


def test_equals_simulation(worlds: Worlds) -> None:
    worlds(4).run(cases.equals_simulation, 2)


def test_inner_codecs(worlds: Worlds) -> None:
    same_on_all_ranks(worlds(4).run(cases.inner_codecs, 2))


@pytest.mark.parametrize(
    "sizes, variables, expected",
    [
        ([2, 2], "torchrun", 2),
        ([2, 2], "others", 2),
        ([1, 3], "torchrun", 1),
        ([1, 1, 1, 1], "torchrun", 1),
        ([4], "none", 1),
    ],
)
def test_levels_of_nodes(worlds: Worlds, sizes: list[int], variables: str, expected: int) -> None:
    found = worlds(4).run(cases.of_nodes, sizes, variables)
    uneven = sizes == [1, 3]
    for per_node, texts, _ in found:
        assert per_node == expected and bool(texts) == uneven, (per_node, texts)
    same_on_all_ranks([gradients for _, _, gradients in found])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.5, "exact_skip": True},
        {"algorithm": "two_phase", "codec": cases.SCHEDULE},
    ],
)
def test_resumes(worlds: Worlds, options: dict[str, Any]) -> None:
    same_on_all_ranks(worlds(4).run(cases.resumed, 2, options))


def test_other_levels(worlds: Worlds) -> None:
    worlds(4).run(cases.regrouped, [1, 2, 4, 1], {"algorithm": "two_phase"})


@pytest.mark.parametrize("in_node", [False, True])
def test_into_local_steps(worlds: Worlds, in_node: bool) -> None:
    worlds(4).run(cases.into_local, 2, in_node)


def test_several_backwards(worlds: Worlds) -> None:
    same_on_all_ranks(worlds(4).run(cases.several_backwards, 2))


def test_copies(worlds: Worlds) -> None:
    same_on_all_ranks(worlds(4).run(cases.copied, 2))


def test_lets_go(worlds: Worlds) -> None:
    worlds(4).run(cases.lets_go, 2)


def test_other_blocks(worlds: Worlds) -> None:
    worlds(4).run(cases.other_blocks, 2)


def test_divides_memory(worlds: Worlds) -> None:
    worlds(4).run(cases.divides_memory, 2)


@pytest.mark.parametrize("value, bad", [(float("nan"), 0), (float("inf"), 3)])
def test_not_finite(worlds: Worlds, value: float, bad: int) -> None:
    worlds(4).run(cases.not_finite, 2, value, bad)


@pytest.mark.parametrize("who", [1, 2])
def test_differs(worlds: Worlds, who: int) -> None:
    words = ("codec is", "inner is", "levels is", "elements [1, 4]")
    for rank, found in enumerate(worlds(4).run(cases.differs, 2, who)):
        for (kind, message), expected in zip(found, words, strict=True):
            assert kind in ("MismatchError", "PydistError"), f"rank {rank}: {kind}: {message}"
            assert expected in message, f"rank {rank}: {message}"


def test_wrong_arguments(worlds: Worlds) -> None:
    words = (
        "levels must be 'auto'", "were both given", "mesh must be a DeviceMesh",
        "do not form a grid", "needs levels='auto'", "codec must be a pydist codec",
        "exclude levels",
    )  # fmt: skip
    for found in worlds(4).run(cases.wrong):
        for (kind, message), expected in zip(found, words, strict=True):
            assert expected in message, f"{kind}: {message}"

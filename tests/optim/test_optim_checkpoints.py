"""Optimizers are copied, saved and loaded as users do it: bit for bit, or refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import ranks_optim_checkpoints as cases
from ranks import Worlds
from torch.distributed.checkpoint import state_dict

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(120)]

KIND = pytest.mark.parametrize("kind", cases.KINDS)


@KIND
def test_copies_go_on(worlds: Worlds, kind: str) -> None:
    worlds(2).run(cases.copies, kind)


def test_copies_of_attached(worlds: Worlds) -> None:
    worlds(2).run(cases.copies_of_attached)


def test_copies_with_groups(worlds: Worlds) -> None:
    for rank, (lost, foreign) in enumerate(worlds(2).run(cases.copies_with_groups)):
        assert lost[0] == "ValueError" and "bind(group)" in lost[1], lost
        assert foreign[0] == "ValueError"
        assert f"state of rank {1 - rank} of 2, and this is rank {rank} of 2" in foreign[1]


# --------------------------------------------------------------------------- torch's checkpoints


def skip_unless_flattened(flatten: bool) -> None:
    """The states of all ranks are a dictionary; torch 2.9 flattens numbers and tensors alone."""
    if flatten and "nest" not in str(state_dict._flatten_optim_state_dict.__doc__):
        pytest.skip("this torch flattens no nested states")


@KIND
@pytest.mark.parametrize(
    ("how", "until", "flatten"),
    [
        ("plain", 0, False),
        ("plain", 4, True),
        ("ddp", 3, False),
        ("renamed", 3, False),
        ("groups", 3, False),
        ("groups", 0, True),
    ],
)
def test_torch_checkpoint(
    worlds: Worlds, tmp_path: Path, kind: str, how: str, until: int, flatten: bool
) -> None:
    skip_unless_flattened(flatten)
    worlds(2).run(cases.torch_checkpoint, kind, how, until, flatten, str(tmp_path))


@pytest.mark.parametrize("kind", cases.VOTING)
@pytest.mark.parametrize(("until", "flatten"), [(0, True), (3, False)])
def test_torch_checkpoint_of_attached(
    worlds: Worlds, tmp_path: Path, kind: str, until: int, flatten: bool
) -> None:
    skip_unless_flattened(flatten)
    args = (kind, "attached", until, flatten, str(tmp_path))
    worlds(2).run(cases.torch_checkpoint, *args)


@pytest.mark.parametrize(("ranks", "inside"), [(2, 2), (4, 2)], ids=["fsdp", "hsdp"])
def test_torch_checkpoint_of_shards(
    worlds: Worlds, tmp_path: Path, ranks: int, inside: int
) -> None:
    worlds(ranks).run(cases.fsdp_checkpoint, inside, str(tmp_path))


@pytest.mark.parametrize("kind", ["lion", "adam", "zero_one"])
def test_full_state_of_rank_0(worlds: Worlds, kind: str) -> None:
    for rank, raised in enumerate(worlds(2).run(cases.full_state, kind)):
        assert raised[-1] == ("", "")
        if rank:
            assert raised[0][0] == "ValueError"
            assert "rank 1 of 2 is of step 0, its options are of step 4" in raised[0][1]
            assert "consolidate_state_dict()" in raised[0][1]


@KIND
def test_torch_checkpoint_of_another_world(worlds: Worlds, tmp_path: Path, kind: str) -> None:
    saved = worlds(3).run(cases.save_in_a_folder, kind, str(tmp_path))
    results = worlds(2).run(cases.load_from_a_folder, kind, str(tmp_path), saved)
    if kind != "zero_one":  # which is between two syncs
        assert results[0] == results[1], "replicas differ"


# --------------------------------------------------------------------------- refused, or mapped

REFUSED = {
    "other optimizer": r"missing: is it another optimizer's\?|state of '0.weight' has",
    "names": "it is of other parameters",
    "step": "step must be from 0|of step -1",
    "foreign": "it must have the entries 'state' and 'param_groups'",
    "nothing": "it must be a dict, or those of all ranks in order, got an empty sequence",
    "none": "got NoneType",
    "fewer": r"param_groups have \[2\] parameters, the optimizer's \[6\]",
    "rank": "give the states of all 2 ranks",
    "short": r"has shape \[2\], the parameter \[33, 6\]",
}


@KIND
def test_refused_whole(worlds: Worlds, kind: str) -> None:
    for raised in worlds(2).run(cases.refused, kind):
        for name, (error, text) in raised.items():
            assert error == "ValueError" and re.search(REFUSED[name], text), (name, error, text)


@KIND
def test_matched_by_name(worlds: Worlds, kind: str) -> None:
    worlds(2).run(cases.matched, kind)


@pytest.mark.parametrize("kind", ["adam", "lamb", "zero_one"])
def test_state_that_differs_on_a_rank(worlds: Worlds, kind: str) -> None:
    for error, text in worlds(2).run(cases.different_on_a_rank, kind):
        assert error == "MismatchError" and "loaded state of '2.weight'" in text, (error, text)

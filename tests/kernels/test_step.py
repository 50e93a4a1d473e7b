"""A step that lies in memory, ``step=`` as int64[1]: CUDA graphs advance it between replays."""

from __future__ import annotations

from typing import Any

import emulated
import numpy as np
import pytest
import torch
from guarded import guarded
from wrong import BETAS, Arrays

from pydist import arrays, ops
from pydist.formats import wire
from pydist.reference import signs as reference

N = 1001


def kept(a: Arrays, step: int) -> Any:
    return a.door.native(np.array([step], dtype=np.int64))


def tied(a: Arrays, step: Any) -> Any:
    payloads = np.zeros((2, 128), dtype=np.uint8)
    payloads[0] = 255
    return a.majority_vote(a.door.native(payloads), seed=7, step=step, n=N).tolist()


def drawn(a: Arrays, step: Any) -> Any:
    options = {**BETAS, "binarization_range": 1.0, "seed": 7, "rank": 1}
    return a.lion_pack_(a.u(N, dtype="float32"), a.f(N), step=step, **options).tolist()


@pytest.mark.parametrize("call", [tied, drawn], ids=["ties", "draws"])
def test_a_step_in_memory_is_a_step(a: Arrays, call: Any) -> None:
    for step in (0, 5, 2**40 + 1):
        assert call(a, kept(a, step)) == call(a, step)
    assert call(a, kept(a, 5)) != call(a, kept(a, 6))


def test_it_is_read_anew_in_each_call(a: Arrays) -> None:
    step = kept(a, 3)
    first = tied(a, step)
    step += 1
    assert first == tied(a, 3) and tied(a, step) == tied(a, 4)


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "dtype": (lambda a: a.u(1, dtype="int32"), TypeError, "step must be int64, got int32"),
    "size": (lambda a: a.u(2, dtype="int64"), ValueError, "step must have 1 elements.*got 2"),
    "negative": (lambda a: kept(a, -1), ValueError, r"step must be in \[0, 2\*\*63\), got -1"),
}


@pytest.mark.parametrize("call", [tied, drawn], ids=["ties", "draws"])
@pytest.mark.parametrize("what", WRONG)
def test_wrong_steps(a: Arrays, what: str, call: Any) -> None:
    make, exception, message = WRONG[what]
    with pytest.raises(exception, match=message):
        call(a, make(a))


def test_a_step_on_another_device() -> None:

    votes = torch.zeros(2, 4, dtype=torch.uint8)
    with pytest.raises((ValueError, RuntimeError), match="meta"):
        ops.majority_vote(votes, step=torch.zeros(1, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=emulated.MARKS) for seed in emulated.SEEDS]
)
def test_cuda_kernels_read_it_where_it_lies(seed: int) -> None:
    """Emulated: the launch carries the step's address, so what is there at the time counts."""

    def put(x: Any) -> Any:
        return guarded(np.asarray(x), at_end=True)

    rng = np.random.default_rng(0)
    size = wire.payload_bytes(N)
    payloads = put(rng.integers(0, 256, (4, size), dtype=np.uint8))
    grad = put(rng.standard_normal(N).astype(np.float32))
    step = put(np.zeros(1, dtype=np.int64))
    options = {**BETAS, "binarization_range": 1.0, "seed": 2, "rank": 1}
    for now in (5, 6, 2**40 + 3):
        step[0] = now
        planes, ballot = put(np.zeros((1, size), np.uint8)), put(np.zeros(size, np.uint8))
        with emulated.running(seed):
            arrays.majority_vote(payloads, seed=3, step=step, n=N, out=planes)
        expected = reference.majority_vote(payloads, ties="hash", seed=3, step=now, n=N)
        assert (planes == expected).all()
        kept = put(np.zeros(N, np.float32))
        with emulated.running(seed):
            arrays.lion_pack_(grad, kept, **options, step=step, out=ballot)
        wanted = reference.lion_pack(
            grad, np.zeros(N), **BETAS, binarization_range=1.0, seed=2, rank=1, step=now
        )
        assert (ballot == wanted[0]).all()


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_step_without_dimensions(kind: str) -> None:
    """Its value counts, not the object: the next call sees that it has changed."""
    a = Arrays(kind)
    step: Any = torch.tensor(3) if kind == "torch" else np.array(3)
    options = {**BETAS, "binarization_range": 1.0, "seed": 2}
    votes = []
    for _ in range(2):
        momentum = a.door.native(np.zeros(N, dtype=np.float32))
        votes.append(a.lion_pack_(a.f(N), momentum, **options, step=step).tolist())
        step += 1
    wanted = [
        a.lion_pack_(a.f(N), a.door.native(np.zeros(N, np.float32)), **options, step=n).tolist()
        for n in (3, 4)
    ]
    assert votes == wanted and votes[0] != votes[1]
    assert tied(a, np.int64(5)) == tied(a, 5)

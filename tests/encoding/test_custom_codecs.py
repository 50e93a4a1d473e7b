"""Codecs written in Python work wherever those of kernels do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import ranks_custom as cases
import torch
from ranks import Worlds
from ranks_custom import CODECS, TWIN, Natural, Same
from torch import Tensor

import pydist
from pydist import simulate
from pydist.encoding.choose import all_reduce_coder
from pydist.encoding.custom import Draws, check_custom
from pydist.reference.signs import draws16
from pydist.transport.coder import Worker

multiprocess = pytest.mark.multiprocess


@multiprocess
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(("ranks", "n"), [(1, 5), (2, 3001), (3, 1), (4, 777)])
def test_collectives_equal_simulate(worlds: Worlds, name: str, ranks: int, n: int) -> None:
    dtype = torch.bfloat16 if ranks == 3 else torch.float32
    answers = worlds(ranks).run(cases.equals_simulate, name, n, dtype)
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize("n", [0, 1, 31, 33, 4097])
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_results_are_those_of_the_twin(n: int, ranks: int, dtype: torch.dtype) -> None:
    tensors = [cases.some(rank, n, dtype) for rank in range(ranks)]
    for call in (simulate.all_reduce, simulate.all_gather):
        assert torch.equal(call(tensors, Same()), call(tensors, TWIN))
    if n % ranks == 0:
        ours, twins = (simulate.reduce_scatter(tensors, codec) for codec in (Same(), TWIN))
        assert all(torch.equal(a, b) for a, b in zip(ours, twins, strict=True))
    two_levels = [cases.some(rank, n, dtype) for rank in range(4)]
    ours, twins = (simulate.all_reduce(two_levels, codec, nodes=2) for codec in (Same(), TWIN))
    assert torch.equal(ours, twins)


@multiprocess
@pytest.mark.parametrize(
    "options",
    [
        {"error_feedback": False},
        {"error_feedback": True},
        {"error_feedback": "worker", "residual_dtype": torch.bfloat16},
        {"error_feedback": "auto", "algorithm": "all_gather", "momentum": 0.5},
    ],
    ids=str,
)
def test_ddp_equals_the_twin(worlds: Worlds, options: dict[str, Any]) -> None:
    answers = worlds(3).run(cases.ddp_equals_twin, options)
    assert answers[0] == answers[1] == answers[2]


@multiprocess
@pytest.mark.parametrize("name", ["natural", "scaled"])
def test_ddp(worlds: Worlds, name: str) -> None:
    answers = worlds(2).run(cases.ddp_trains, name)
    assert answers[0] == answers[1]


@multiprocess
@pytest.mark.parametrize(
    ("what", "options"),
    [
        (("gradients",), {"error_feedback": True}),
        (("gradients", "parameters"), {"error_feedback": False}),
    ],
)
def test_fsdp_equals_the_twin(
    worlds: Worlds, what: tuple[str, ...], options: dict[str, Any]
) -> None:
    answers = worlds(3).run(cases.fsdp_equals_twin, what, options)
    assert answers[0] == answers[1] == answers[2]


@multiprocess
def test_optimizer_equals_the_twin(worlds: Worlds) -> None:
    answers = worlds(2).run(cases.optimizer_equals_twin)
    assert answers[0] == answers[1]


@multiprocess
def test_values_that_are_not_finite(worlds: Worlds) -> None:
    assert worlds(3).run(cases.not_finite) == [[True]] * 3


@multiprocess
def test_a_wrong_size_is_an_error_on_every_rank(worlds: Worlds) -> None:
    for message in worlds(3).run(cases.lies):
        assert "Longer(liar=1).encode must return uint8 [" in message, message


@multiprocess
def test_other_codecs_on_other_ranks(worlds: Worlds) -> None:
    for message in worlds(2).run(cases.disagrees):
        assert 'codec is "Natural(stochastic=True)" on rank 0' in message, message


# --------------------------------------------------------------------------- natural compression


def test_natural_compression_is_unbiased_and_of_small_variance() -> None:
    x = torch.linspace(-3, 3, 1001)
    codec = Natural()
    total, square = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(2000):
        draws = Draws(1, 0, 0, step, 0, 0, len(x), x.device)
        value = codec.decode(codec.encode(x, draws), len(x))
        total += value
        square += (value - x).square()
    assert ((total / 2000 - x).abs() <= 0.04 * x.abs()).all()
    assert (square / 2000 <= 0.14 * x.square()).all()  # 1/8, and what 2,000 draws leave


def test_natural_compression_of_special_values() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -2.0, 0.75, 2.0**-70, 2.0**70])
    codec = Natural(stochastic=False)
    value = codec.decode(codec.encode(x, None), len(x))
    assert value.tolist() == [0.0, 0.0, 1.0, -2.0, 0.5, 0.0, 2.0**63]


def test_draws_are_those_of_the_kernels() -> None:
    draws = Draws(7, 3, 1, 2**33 + 5, 12, 1000, 77, torch.device("cpu"))
    wanted = draws16(7, 3 << 2 | 1, 5, 12, 1000, 77).astype(np.float32) / 65536
    assert draws.uniform().numpy().tobytes() == wanted.tobytes()


# --------------------------------------------------------------------------- wrong codecs


@dataclass(frozen=True)
class Wrong(pydist.Codec):
    block: Any = 32
    extra: Any = 0
    answer: Any = None

    def payload_bytes(self, n: int) -> Any:
        return n + (self.extra if n % 32 else 0)

    def encode(self, x: Tensor) -> Any:
        return x.to(torch.uint8) if self.answer is None else self.answer

    def decode(self, payload: Tensor, n: int) -> Any:
        return payload.double()


@pytest.mark.parametrize(
    ("codec", "error", "message"),
    [
        (Wrong(block=0), ValueError, "Wrong.block must be at least 1, got 0"),
        (Wrong(block=1.5), TypeError, "Wrong.block must be an int, got 1.5"),
        (Wrong(extra=40), ValueError, r"Wrong.payload_bytes\(1\) must be from 0 to 32"),
        (Wrong(answer=[]), TypeError, "codec Wrong must be hashable"),
        (Wrong(extra=0.5), TypeError, r"Wrong.payload_bytes\(\d+\) must be an int"),
    ],
)
def test_sizes_that_do_not_fit(codec: pydist.Codec, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_custom(codec)
    with pytest.raises(error, match=message):
        simulate.all_reduce([torch.ones(40)], codec)


def test_wrong_answers() -> None:
    with pytest.raises(
        ValueError, match=r"encode must return uint8 \[40\] of 40 elements, got torch.f"
    ):
        simulate.all_reduce([torch.ones(40)], Wrong(answer=torch.Tensor([1.0])))
    with pytest.raises(ValueError, match=r"decode must return float32 \[40\], got torch.float64"):
        simulate.all_reduce([torch.ones(40)], Wrong())


@dataclass(frozen=True)
class Nothing(pydist.Codec):
    """Forgot its methods."""


@dataclass(frozen=True)
class Half(pydist.Codec):
    def encode(self, x: Tensor) -> Any:
        return x.half().view(torch.uint8)


class Plain(Same):
    """No dataclass: its repr has an address."""

    __repr__ = object.__repr__
    __hash__ = object.__hash__


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        (Nothing(), "codec Nothing has no encode"),
        (Half(), "codec Half has encode and no decode"),
        (Plain(), "codec Plain must have a repr that is equal on all ranks"),
    ],
)
def test_codecs_that_are_not_finished(codec: pydist.Codec, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        simulate.all_reduce([torch.ones(40)], codec)


@dataclass(frozen=True)
class Uneven(Same):
    """Longer than its blocks at a length that no check of its sizes looks at."""

    block = 1

    def payload_bytes(self, n: int) -> int:
        return 4 * n + (n == 40)

    def encode(self, x: Tensor) -> Tensor:
        return torch.zeros(self.payload_bytes(len(x)), dtype=torch.uint8)


def test_a_length_at_which_a_payload_is_too_long() -> None:
    with pytest.raises(ValueError, match=r"payload_bytes\(40\) must be at most 160, got 161"):
        simulate.all_reduce([torch.ones(40)], Uneven())


@dataclass(frozen=True)
class Doubles(pydist.Codec):
    """Needs aligned payloads, and elements; returns strided bytes."""

    block = 4
    contracts = True

    def payload_bytes(self, n: int) -> int:
        return 8 * n

    def encode(self, x: Tensor) -> Tensor:
        assert x.abs().max() >= 0  # of no elements there is none
        return x.double().view(torch.uint8).repeat_interleave(2)[::2]

    def decode(self, payload: Tensor, n: int) -> Tensor:
        return payload.view(torch.float64).float()


@pytest.mark.parametrize("n", [1, 777, 3001])
def test_bytes_behind_payloads_are_zeros(n: int) -> None:
    """Whatever was in a message's memory: ranks compare checksums of all bytes."""
    worker = Worker(0, 2, 0)
    coder = all_reduce_coder(torch.ones(n), Natural(), worker, op="mean", ties="hash", seed=0)
    rows = torch.full((2, coder.message_bytes(n)), 0xFF, dtype=torch.uint8)
    coder.encode(rows[:1], n, 0, n)
    assert not rows[0, n:].any()
    out = torch.full((coder.reduced_bytes(n),), 0xFF, dtype=torch.uint8)
    coder.reduce(rows[:1].repeat(2, 1), out, n, 0, n, coder.flags)
    assert not out[n:].any()
    assert len(out) > n


@multiprocess
def test_payloads_of_any_alignment(worlds: Worlds) -> None:
    answers = worlds(3).run(cases.shards_without_elements, Doubles())
    assert answers[0] == answers[1] == answers[2]


@multiprocess
def test_other_blocks_on_other_ranks(worlds: Worlds) -> None:
    for message in worlds(2).run(cases.other_blocks):
        assert "block is 32 on rank 0 and 96 on rank 1" in message, message


def test_codecs_of_kernels_have_no_methods() -> None:
    with pytest.raises(NotImplementedError, match="BlockInt is encoded by kernels"):
        TWIN.encode(torch.ones(3))

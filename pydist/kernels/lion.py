"""Lion's two halves: a worker's vote with its new momentum, and the voted update."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydist import _C
from pydist.formats import wire
from pydist.kernels.call import Call
from pydist.kernels.checks import (
    FLOAT_NAMES,
    FLOATS,
    ITEMSIZE,
    check_bit,
    check_device,
    check_disjoint,
    check_dtype,
    check_flags,
    check_planes,
    check_range,
    check_rank,
    check_rates,
    check_seed,
    check_state,
    check_step,
)
from pydist.kernels.launch import address_of
from pydist.kernels.register import Shape, kernel
from pydist.kernels.signs import Segments, payload_shape, words_of

if TYPE_CHECKING:
    from pydist.kernels.register import A


@dataclass(frozen=True)
class LionOptions:
    """Scalars of :func:`lion_pack_`.

    Attributes:
        beta1: Weight of the old momentum in the vote.
        beta2: Weight of the old momentum in the new one.
        zero_bit: What a direction of exactly zero votes, 0 or 1.
        binarization_range: ``None`` votes the sign; r votes +1 with probability
            ``(1 + c / r) / 2``.
        seed: Seed of those draws, 0 … 2**32 - 1.
        rank: This rank, so that ranks draw differently.
        step: Step of the draws.
    """

    beta1: float
    beta2: float
    zero_bit: int = 1
    binarization_range: float | None = None
    seed: int = 0
    rank: int = 0
    step: int = 0

    def native(self, step_at: int = 0) -> _C.LionPackArgs:
        """The checked options as the compiled module takes them.

        Args:
            step_at: Where a device is to read the step instead; 0 for nowhere.
        """
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        check_bit("zero_bit", self.zero_bit)
        check_seed(self.seed)
        check_rank(self.rank)
        check_step(self.step)
        check_range(self.binarization_range)
        r = self.binarization_range
        return _C.LionPackArgs(
            self.beta1, 1.0 - self.beta1, self.beta2, 1.0 - self.beta2, self.zero_bit,
            0.0 if r is None else 1.0 / r, self.seed, self.rank << 2, self.step % 2**32,
            step_at,
        )  # fmt: skip


@functools.lru_cache(maxsize=256, typed=True)
def _native(
    beta1: float, beta2: float, zero_bit: int, spread: float | None, seed: int, rank: int,
    step: int, step_at: int,
) -> _C.LionPackArgs:  # fmt: skip
    """Checked options, which are the same for all parameters of a step."""
    return LionOptions(beta1, beta2, zero_bit, spread, seed, rank, step).native(step_at)


def _of_grad(given: Mapping[str, Any]) -> tuple[Shape, str]:
    return payload_shape(given["grad"].numel(), given["segments"]), "uint8"


@kernel(result=_of_grad, writes=("momentum", "momentum_out", "flags"))
def lion_pack_(
    grad: A,
    momentum: A,
    *,
    beta1: float,
    beta2: float,
    zero_bit: int = 1,
    momentum_out: A | None = None,
    flags: A | None = None,
    binarization_range: float | None = None,
    seed: int = 0,
    rank: int = 0,
    step: int | A = 0,
    segments: Segments = None,
    out: A | None = None,
    threads: int | None = None,
) -> A:
    """A worker's vote and its new momentum, in one pass.

    Votes the sign of ``beta1 * m + (1 - beta1) * g`` and then sets
    ``m = beta2 * m + (1 - beta2) * g`` (Distributed Lion, arXiv 2404.00438, Algorithm 1). An
    element whose gradient or new momentum is not finite keeps its old momentum.

    Args:
        grad: float32, float16 or bfloat16, any shape.
        momentum: float32 or bfloat16, as many elements; updated in place.
        beta1: Weight of the old momentum in the vote.
        beta2: Weight of the old momentum in the new one.
        zero_bit: Vote of a direction of exactly zero.
        momentum_out: Receives the new momentum instead; ``momentum`` then stays as it was.
        flags: int32[1]; 1 is OR-ed in where something is not finite.
        binarization_range: r votes +1 with probability ``(1 + c / r) / 2`` instead of the sign.
        seed: Seed of those draws.
        rank: This rank, so that ranks draw differently.
        step: Step of the draws; or int64[1] on the device of ``grad``, as in
            :func:`pydist.ops.majority_vote`.
        segments: int64 [k, 4] in host memory (:func:`pydist.segments`); default one segment.
        out: Receives the payload, and is returned.
        threads: CPU threads; default those of torch for tensors, all cores for arrays.

    Returns:
        uint8 payload, ``ceil(n / 32) * 4`` bytes (each segment padded so).

    Raises:
        TypeError: A dtype is not supported, or arrays are of several kinds.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    call = Call("grad", grad, threads)
    g = call.input("grad", grad)
    name, target = "momentum", momentum
    if momentum_out is not None:
        name, target = "momentum_out", momentum_out
        call.check_apart("momentum", momentum, name, target)
    if out is not None:
        call.check_apart("out", out, name, target)
    new = call.update(name, target)
    old = new if momentum_out is None else call.input("momentum", momentum)
    check_state(g, old, new)
    rows, size, gaps = words_of(g, segments, old.address, new.address, ITEMSIZE[new.dtype])
    payload = call.result(out, "uint8", (size,), g, old, new, gaps=gaps)
    _, raised = call.flags(flags, g, old, new, payload)
    known, step_at = call.step(step, g)
    args = _native(beta1, beta2, zero_bit, binarization_range, seed, rank, known, step_at)
    call.launch(
        "lion_pack", rows, FLOATS[g.dtype], FLOATS[old.dtype], payload.address, args, raised
    )
    return payload.array


@kernel(writes=("param",))
def lion_apply_(
    param: A,
    planes: A,
    *,
    lr: float,
    weight_decay: float = 0.0,
    ranks: int | None = None,
    skip: A | None = None,
    segments: Segments = None,
    threads: int | None = None,
) -> None:
    """Weight decay and the voted update, in place and in one pass.

    ``x = x * (1 - lr * weight_decay) - lr * delta``, where delta is the majority (sign planes) or
    the mean vote (count planes of ``ranks`` voters).

    Args:
        param: float32, float16 or bfloat16, any shape; updated.
        planes: uint8 [p, bytes] of :func:`pydist.ops.majority_vote` or
            :func:`pydist.ops.count_votes`.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        ranks: Voters behind count planes; ``None`` for sign planes.
        skip: int32[1]; where it is not 0, nothing is changed.
        segments: int64 [k, 4] in host memory (:func:`pydist.segments`); default one segment.
        threads: CPU threads; default those of torch for tensors, all cores for arrays.

    Raises:
        TypeError: A dtype is not supported, or arrays are of several kinds.
        ValueError: Another argument is out of range; the message names it and its value.
    """
    call = Call("param", param, threads)
    x = call.update("param", param)
    votes = call.input("planes", planes)
    skipped = call.option("skip", skip)
    check_dtype(x, FLOAT_NAMES)
    count, size = check_planes(votes, ranks)
    check_flags(skipped, x)
    check_device(x, votes, skipped)
    check_disjoint(x, votes)
    rows, needed, _ = words_of(x, segments)
    if size != needed:
        raise ValueError(f"planes must have {needed} bytes per plane for param, got {size}")
    args = lion_apply_args(lr, weight_decay, count, size, ranks)
    call.launch("lion_apply", rows, FLOATS[x.dtype], votes.address, args, address_of(skipped))


def lion_apply_args(
    lr: float, weight_decay: float, count: int, plane_bytes: int, ranks: int | None
) -> _C.LionApplyArgs:
    """The scalars of :func:`lion_apply_`, each rounded once from double to float32."""
    check_rates(lr, weight_decay)
    step = lr if ranks is None else lr / ranks
    words = plane_bytes // wire.WORD_BYTES
    return _C.LionApplyArgs(1.0 - lr * weight_decay, step, count, words, ranks or 0)

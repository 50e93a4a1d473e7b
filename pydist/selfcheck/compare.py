"""One kernel and its reference on the same input: bit-identical, or :class:`DifferenceError`."""

from __future__ import annotations

from pydist.formats import wire
from pydist.kernels.lion import LionOptions
from pydist.reference import signs as reference
from pydist.reference.signs import U8, Storage
from pydist.selfcheck.bits import (
    Bits,
    assert_same_bits,
    assert_same_flags,
    storage_of,
    store,
    widen,
)
from pydist.selfcheck.runner import Runner


def check_pack_signs(
    run: Runner, x: Bits, *, zero_bit: int = 1, segments: wire.IntArray | None = None
) -> None:
    """Raises DifferenceError unless ``pack_signs`` equals its reference."""
    what = f"pack_signs on {run.name} ({storage_of(x)}, n={x.size}, zero_bit={zero_bit})"
    payload, flags = run.pack_signs(x, zero_bit=zero_bit, segments=segments)
    expected, raised = reference.pack_signs(widen(x), zero_bit=zero_bit, segments=segments)
    assert_same_bits(payload, expected, f"{what}: payload")
    assert_same_flags(flags, raised, what)


def check_unpack_votes(
    run: Runner,
    planes: U8,
    n: int,
    *,
    ranks: int | None = None,
    mean: bool = False,
    storage: Storage = "float32",
) -> None:
    """Raises DifferenceError unless ``unpack_votes`` equals its reference."""
    what = f"unpack_votes on {run.name} ({storage}, n={n}, ranks={ranks}, mean={mean})"
    values = run.unpack_votes(planes, n, ranks=ranks, mean=mean, storage=storage)
    expected = reference.unpack_votes(planes, n, ranks=ranks, mean=mean)
    assert_same_bits(values, store(expected, storage), what)


def check_count_votes(run: Runner, payloads: U8) -> None:
    """Raises DifferenceError unless ``count_votes`` equals its reference."""
    what = f"count_votes on {run.name} (payloads {list(payloads.shape)})"
    assert_same_bits(run.count_votes(payloads), reference.count_votes(payloads), what)


def check_majority_vote(
    run: Runner,
    payloads: U8,
    *,
    ties: reference.Ties = "hash",
    seed: int = 0,
    step: int = 0,
    n: int | None = None,
    segments: wire.IntArray | None = None,
) -> None:
    """Raises DifferenceError unless ``majority_vote`` equals its reference."""
    what = f"majority_vote on {run.name} (payloads {list(payloads.shape)}, ties={ties}, n={n})"
    planes = run.majority_vote(payloads, ties=ties, seed=seed, step=step, n=n, segments=segments)
    expected = reference.majority_vote(
        payloads, ties=ties, seed=seed, step=step, n=n, segments=segments
    )
    assert_same_bits(planes, expected, what)


def check_lion_pack(
    run: Runner,
    grad: Bits,
    momentum: Bits,
    options: LionOptions,
    segments: wire.IntArray | None = None,
) -> None:
    """Raises DifferenceError unless ``lion_pack`` equals its reference."""
    what = (
        f"lion_pack on {run.name} ({storage_of(grad)}, momentum {storage_of(momentum)}, "
        f"n={grad.size}, {options})"
    )
    payload, new, flags = run.lion_pack(grad, momentum, options, segments)
    expected, expected_new, raised = reference.lion_pack(
        widen(grad), widen(momentum), beta1=options.beta1, beta2=options.beta2,
        zero_bit=options.zero_bit, momentum_storage=storage_of(momentum),
        binarization_range=options.binarization_range, seed=options.seed, rank=options.rank,
        step=options.step, segments=segments,
    )  # fmt: skip
    assert_same_bits(payload, expected, f"{what}: payload")
    assert_same_bits(new, store(expected_new, storage_of(momentum)), f"{what}: momentum")
    assert_same_flags(flags, raised, what)


def check_lion_apply(
    run: Runner,
    param: Bits,
    planes: U8,
    *,
    lr: float,
    weight_decay: float = 0.0,
    ranks: int | None = None,
) -> None:
    """Raises DifferenceError unless ``lion_apply`` equals its reference."""
    storage = storage_of(param)
    what = (
        f"lion_apply on {run.name} ({storage}, n={param.size}, lr={lr}, "
        f"weight_decay={weight_decay}, ranks={ranks})"
    )
    new = run.lion_apply(param, planes, lr=lr, weight_decay=weight_decay, ranks=ranks)
    expected = reference.lion_apply(
        widen(param), planes, lr=lr, weight_decay=weight_decay, ranks=ranks, storage=storage
    )
    assert_same_bits(new, store(expected, storage), what)

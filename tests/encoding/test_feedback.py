"""Rules, shares, messages and residuals of the DDP hook, in one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pydist import QSGD, BlockFloat, BlockInt, Raw, Sign, Ternary, TopK
from pydist.encoding.bucket import BucketCoder, BucketPlan
from pydist.encoding.shares import Part, Shares, share_of
from pydist.formats import wire
from pydist.reference import blocks as rb
from pydist.training.options import Options
from pydist.training.residuals import Residuals, any_nonzero, contracts, forbids
from pydist.transport.coder import Worker

# --------------------------------------------------------------------------- rules


def test_where_error_feedback_goes() -> None:
    on = [Sign("l1"), Sign("l2"), BlockInt(2), BlockInt(8), BlockFloat(), BlockFloat("e5m2"),
          QSGD(3), QSGD(8), BlockInt(3, rounding="stochastic"), TopK(),
          TopK(0.1, block=32)]  # fmt: skip
    off = [Sign(None), QSGD(2), QSGD(4, norm="l2"), QSGD(8, norm="l2"), Raw(), Raw("bfloat16"),
           Ternary()]  # fmt: skip
    assert all(contracts(codec) for codec in on) and not any(contracts(codec) for codec in off)
    diverges = {Sign(None), QSGD(2), QSGD(2, norm="l2"), QSGD(4, norm="l2"),
                BlockInt(2, rounding="stochastic"), Ternary(None)}  # fmt: skip
    assert all(forbids(codec) for codec in diverges)
    assert not any(forbids(codec) for codec in [*on, QSGD(8, norm="l2"), Raw()])
    for codec in diverges:
        for forced in (True, "worker"):
            with pytest.raises(ValueError, match=f"error_feedback={forced}: "):
                options(codec, error_feedback=forced)
    assert f"relative variance of {QSGD(4, norm='l2')} can reach 3.23" in str(
        forbids(QSGD(4, norm="l2"))
    )


def options(codec: Any, **others: Any) -> Options:
    usual: dict[str, Any] = {
        "error_feedback": "auto", "warmup_steps": 0, "min_numel": 10, "exclude": None, "seed": 0,
        "op": "mean", "algorithm": "auto", "residual_dtype": torch.float32, "exact_skip": False,
    }  # fmt: skip
    return Options(codec, **usual | others)


@pytest.mark.parametrize(
    ("argument", "value", "kind"),
    [
        ("error_feedback", "yes", ValueError),
        ("warmup_steps", -1, ValueError),
        ("warmup_steps", 1.5, TypeError),
        ("min_numel", -1, ValueError),
        ("exclude", "*.bias", TypeError),
        ("seed", -1, ValueError),
        ("op", "vote", ValueError),
        ("algorithm", "ring", ValueError),
        ("residual_dtype", torch.float16, ValueError),
    ],
)
def test_wrong_options(argument: str, value: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=argument):
        options(QSGD(4), **{argument: value})


def test_wrong_codec() -> None:
    with pytest.raises(TypeError, match="codec must be a pydist codec, got str"):
        options({"*": "qsgd"})


def test_choice_of_a_codec() -> None:
    rules = options({"*.bias": None, "a.*": BlockInt(4), "*": QSGD(4)}, exclude=["*norm*"])
    x, tiny = torch.zeros(2000), torch.zeros(9)
    assert rules.choose("a.weight", x, x.dtype).codec == BlockInt(4)
    assert rules.choose("b.weight", x, x.dtype).codec == QSGD(4)
    assert rules.choose("a.bias", x, x.dtype).reason == "no codec for its name"
    assert rules.choose("b.norm.weight", x, x.dtype).reason == "excluded by '*norm*'"
    assert rules.choose("b.weight", tiny, x.dtype).reason == "fewer than 10 elements"
    wide = options(QSGD(4, block=65536))
    assert wide.choose("w", x, x.dtype).reason == "would not be smaller"
    assert options(TopK(1.0)).choose("w", x, x.dtype).reason == "would not be smaller"
    assert options(TopK()).choose("w", x, x.dtype).feedback
    assert not options(Ternary()).choose("w", x, x.dtype).feedback
    picky = options(QSGD(4), exclude=lambda name, p: p.dim() == 1)
    assert picky.choose("w", x, x.dtype).reason == "excluded by predicate"


# --------------------------------------------------------------------------- messages


@pytest.mark.parametrize("owners", [1, 3])
def test_bytes_of_a_bucket(owners: int) -> None:
    """docs/wire_format.md, once more: sections, shares, slices and padding."""
    codecs = [BlockInt(3, block=32), None, Sign("l1", block=64), None, BlockInt(3, block=32)]
    sizes, ordinals = [300, 33, 65, 100, 32], [4, 0, 9, 2, 7]
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(n, generator=generator) for n in sizes]
    parts, at = [], 0
    for ordinal, n in zip(ordinals, sizes, strict=True):
        parts.append(Part(ordinal, at, n))
        at += n
    plan = BucketPlan(parts, codecs, [False] * 5, torch.float32, 3, owners)
    coder = BucketCoder(
        plan, torch.cat(values), Worker(1, 3, 6), mean=True, seed=2, feedback=[None] * 3,
        staged=False,
    )  # fmt: skip
    sections = [(BlockInt(3, block=32), [0, 4]), (None, [1, 3]), (Sign("l1", block=64), [2])]
    shares = []  # by section and owner: the units' codes, and their scales
    for codec, indices in sections:
        unit = codec.block if codec is not None else 32
        by_owner = []
        for owner in range(owners):
            codes, scales = [], []
            for i in indices:
                low, high = share_of(sizes[i], ordinals[i], unit, owner, owners)
                for begin in range(low, high, unit):
                    x = values[i][begin : min(begin + unit, high)].numpy()
                    if codec is None:
                        codes.append(x.tobytes().ljust(4 * unit, b"\0"))
                        scales.append(b"")
                        continue
                    form = codec.block_format
                    payload, _ = rb.quantize(x, form, zero_bit=1)
                    codes.append(payload[:-4].tobytes().ljust(form.block_bytes, b"\0"))
                    scales.append(payload[-4:].tobytes())
            by_owner.append((codes, scales))
        shares.append(by_owner)
    slices = max(len(codes) for by_owner in shares for codes, _ in by_owner)
    assert (plan.slices, coder.units) == (slices, slices * owners)
    for begin, end in ((0, slices), (1, 3)):
        size = coder.message_bytes(end - begin)
        rows = torch.full((owners, size), 0xAA, dtype=torch.uint8)
        coder.encode(rows, end - begin, begin * owners, end * owners)
        for owner, row in enumerate(rows):
            wanted = b""
            for by_owner in shares:
                most = max(len(codes) for codes, _ in by_owner)
                room = -(-(end - begin) * most // slices)
                for kind in (0, 1):  # codes, scales
                    width = max(len(x) for both in by_owner for x in both[kind])
                    units = by_owner[owner][kind]
                    part = units[begin * len(units) // slices : end * len(units) // slices]
                    wanted += b"".join(part).ljust(room * width, b"\0")
            assert row.numpy().tobytes() == wanted, (owner, begin)


# --------------------------------------------------------------------------- residuals


@pytest.mark.parametrize("owners", [1, 2, 3, 7])
def test_every_unit_has_one_owner(owners: int) -> None:
    rng = np.random.default_rng(owners)
    sizes = [0, 1, 31, 32, 33, 100, 1001, 5000, 64, 64, 64]
    parts, at = [], 0
    for ordinal, n in zip(rng.permutation(40).tolist(), sizes, strict=False):
        parts.append(Part(ordinal, at, n))
        at += n
    shares = Shares(parts, 32, owners)
    for pieces in (1, 5, shares.most):
        seen = np.zeros(at, dtype=int)
        for begin in range(pieces):
            piece = shares.piece(begin, begin + 1, pieces)
            assert piece.room == shares.room(1, pieces)
            taken = np.zeros(owners * piece.room, dtype=int)
            for row, part, owner in zip(piece.rows, piece.part, piece.owner, strict=True):
                x, n, word = (int(row[c]) for c in (wire.X, wire.N, wire.WORD))
                seen[x : x + n] += 1
                taken[owner * piece.room + word : owner * piece.room + word - (-n // 32)] += 1
                assert 0 <= word < piece.room
                first = parts[part].offset + int(row[wire.FIRST])
                assert first == x and row[wire.FIRST] % 32 == 0
                low, high = share_of(parts[part].numel, parts[part].ordinal, 32, owner, owners)
                assert low <= row[wire.FIRST] and row[wire.FIRST] + n <= high
            assert taken.max(initial=0) <= 1, "two rows share a unit"
        assert (seen == 1).all()


def test_many_small_parameters_are_spread() -> None:
    parts = [Part(ordinal, 2 * ordinal, 2) for ordinal in range(0, 2000, 2)]
    units = Shares(parts, 32, 4).units
    assert units.sum() == 1000 and units.max() < 300, units


def test_an_owner_that_changes() -> None:
    """What leaves goes to the worker's side, times the world size; what stays, stays."""
    part, cpu = Part(3, 0, 100), torch.device("cpu")
    for mean, weight in ((True, 4), (False, 1)):
        residuals = Residuals(torch.float32, 4, mean)
        residuals.worker_of(part, cpu).fill_(1.0)
        residuals.owner_of(part, (20, 60), False, cpu).copy_(torch.arange(20.0, 60.0))
        moved = residuals.owner_of(part, (40, 90), False, cpu)
        assert moved.tolist() == [*range(40, 60), *[0] * 30]
        wanted = torch.ones(100)
        wanted[20:40] += weight * torch.arange(20.0, 40.0)
        assert torch.equal(residuals.worker[3], wanted)
        # Everyone owns everything: the others' part is elsewhere, so all of it is sent anew.
        whole = residuals.owner_of(part, (0, 100), True, cpu)
        wanted[40:60] += weight * torch.arange(40.0, 60.0)
        assert not whole.any() and torch.equal(residuals.worker[3], wanted)
        # Back to shares: all ranks had the same, so each keeps its own and nothing moves.
        whole.copy_(torch.arange(100.0))
        mine = residuals.owner_of(part, (10, 30), False, cpu)
        assert mine.tolist() == list(range(10, 30))
        assert torch.equal(residuals.worker[3], wanted)


def test_memory_and_scale_of_residuals() -> None:
    residuals = Residuals(torch.bfloat16, 2, True)
    held = residuals.worker_of(Part(0, 0, 10), torch.device("cpu"))
    assert residuals.memory_bytes == 20
    held.fill_(3.0)
    residuals.rescale(0.5)
    assert held.tolist() == [1.5] * 10
    assert residuals.norm() == pytest.approx(1.5 * 10**0.5, rel=1e-12)
    held.fill_(torch.finfo(torch.bfloat16).max)
    residuals.rescale(4.0)
    assert not held.any(), "what cannot be stored is dropped, never infinite"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_which_gradients_are_zero(dtype: torch.dtype) -> None:
    flat = torch.zeros(700, dtype=dtype)
    flat[100], flat[299] = -0.0, 1e-7 if dtype != torch.float16 else 6e-8
    flat[301] = float("nan")
    parts = [Part(0, 0, 200), Part(1, 200, 100), Part(2, 300, 100), Part(3, 400, 0)]
    assert any_nonzero(flat, parts).tolist() == [False, True, True, False]

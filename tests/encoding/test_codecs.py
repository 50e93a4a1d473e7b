"""Block codecs over real ranks and in simulation: the specification's bits, whatever the route."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ranks_codecs as cases
import torch
from ranks import Worlds
from test_collectives import same_on_all_ranks

import pydist
from pydist import QSGD, BlockFloat, BlockInt, Raw, Sign, Ternary, TopK, ops, simulate
from pydist.encoding.choose import all_reduce_coder
from pydist.reference import blocks as rb
from pydist.reference import raw as reference_raw
from pydist.reference import topk as rt
from pydist.transport import exchange
from pydist.transport.coder import Worker

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(180)]

HALVES = [cases.CODECS[::2], cases.CODECS[1::2]]


EVERY_DTYPE = pytest.param(True, marks=pytest.mark.soak, id="every dtype")


@pytest.mark.parametrize("every_dtype", [pytest.param(False, id="in turn"), EVERY_DTYPE])
@pytest.mark.parametrize("codecs", HALVES, ids=["even", "odd"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equals_reference(worlds: Worlds, ranks: int, codecs: list[Any], every_dtype: bool) -> None:
    args = codecs, [0, 1, 31, 257], every_dtype
    same_on_all_ranks(worlds(ranks).run(cases.equals_reference, *args, timeout=150))


@pytest.mark.parametrize(("ranks", "codecs"), [(2, HALVES[0]), (3, HALVES[1]), (4, HALVES[0])])
def test_equals_simulation_in_many_chunks(worlds: Worlds, ranks: int, codecs: list[Any]) -> None:
    same_on_all_ranks(worlds(ranks).run(cases.equals_simulation, codecs, 5003, 1000))


@pytest.mark.parametrize("ranks", [2, 3])
def test_equals_simulation_beyond_one_chunk(worlds: Worlds, ranks: int) -> None:
    codecs = [QSGD(4), BlockInt(8), Sign("l1"), BlockFloat(block=65536)]
    same_on_all_ranks(worlds(ranks).run(cases.equals_simulation, codecs, 1_000_003, None))


@pytest.mark.parametrize("chunk", [None, 20], ids=["one_chunk", "chunks"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_votes(worlds: Worlds, ranks: int, chunk: int | None) -> None:
    worlds(ranks).run(cases.votes, [0, 1, 33, 1001], chunk)


@pytest.mark.parametrize("ranks", [1, 3])
def test_not_finite_on_one_rank_is_nan_on_all(worlds: Worlds, ranks: int) -> None:
    worlds(ranks).run(cases.not_finite)
    worlds(ranks).run(cases.overflow)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_shape_and_place(worlds: Worlds, ranks: int) -> None:
    worlds(ranks).run(cases.shapes)


@pytest.mark.parametrize("ranks", [3, 4])
def test_all_kinds_in_flight(worlds: Worlds, ranks: int) -> None:
    worlds(ranks).run(cases.in_flight)


DIFFERENCES = {
    "entropy": (QSGD(4), QSGD(4, entropy="elias"), None),
    "codec": (QSGD(4), BlockInt(4), None),
    "bits": (QSGD(4), QSGD(5), None),
    "block": (BlockInt(4), BlockInt(4, block=64), None),
    "norm": (QSGD(4), QSGD(4, norm="l2"), None),
    "format": (BlockFloat("e4m3"), BlockFloat("e5m2"), None),
    "dtype": (Raw(), Raw("float32"), None),
    "clip": (Ternary(), Ternary(2), None),
    "density": (TopK(0.1), TopK(0.2), None),
    "op": (QSGD(4), QSGD(4), "sum"),
}


CALLS = ["all_reduce", "reduce_scatter", "all_gather"]


@pytest.mark.parametrize(
    ("call", "name"),
    [(c, name) for c in CALLS for name in DIFFERENCES if (c, name) != ("all_gather", "op")],
)
def test_difference(worlds: Worlds, name: str, call: str) -> None:
    usual, other, op = DIFFERENCES[name]
    field, values = ("op", ("mean", "sum")) if op else ("codec", (usual, other))
    for kind, message in worlds(3).run(cases.differs, call, usual, other, op):
        assert kind == "MismatchError", message
        assert f'{field} is "{values[0]}" on ranks 0, 1' in message.replace("\\", ""), message
        assert f'"{values[1]}" on rank 2' in message, message


@pytest.mark.parametrize("ranks", [1, 3])
def test_wrong_arguments(worlds: Worlds, ranks: int) -> None:
    worlds(ranks).run(cases.wrong)


@pytest.mark.parametrize("ranks", [2, 3])
def test_traffic(worlds: Worlds, ranks: int) -> None:
    """4 bits per element and 4 bytes per block of 512, plus a header a message."""
    blocks = 10
    share = (ranks - 1) * (blocks * (512 * 4 // 8 + 4) + 16)
    # Two phases of an all-reduce; the one phase of a scatter and of a gather.
    ends = 3 * (ranks - 1) * 16
    expected = {"agreement": ends, "phase 1": 3 * share, "phase 2": share, "confirmation": ends}
    assert worlds(ranks).run(cases.traffic, 512 * blocks) == [expected] * ranks


# --------------------------------------------------------------------------- variable lengths


@pytest.mark.parametrize("ranks", [2, 3])
def test_traffic_of_variable_lengths(worlds: Worlds, ranks: int) -> None:
    """What was sent is what the payloads take: here of zeros, far less than 4 bits per element."""
    blocks = 10
    message = blocks * (4 + 4) + -(-blocks // 4) * 4 + 16  # place, scale, a byte of zeros; header
    for sent, payload in worlds(ranks).run(cases.elias_traffic, 512 * blocks):
        assert payload + 16 == message
        share = (ranks - 1) * message
        assert sent == {
            "agreement": 3 * (ranks - 1) * 16, "phase 1": 3 * share, "phase 2": share,
            "confirmation": 3 * (ranks - 1) * 16,
            "sizes": 4 * (ranks - 1) * 8,
        }  # fmt: skip


@pytest.mark.parametrize("damage", ["block", "length"])
@pytest.mark.parametrize(
    ("algorithm", "phase"),
    [("two_phase", "phase 1"), ("two_phase", "phase 2"), ("all_gather", "phase 1")],
)
def test_damaged_parcel(worlds: Worlds, algorithm: str, phase: str, damage: str) -> None:
    what = (
        "block 0 is malformed: its place in the table" if damage == "block" else "bytes, expected"
    )
    results = worlds(3).run(cases.damaged_parcel, algorithm, phase, damage)
    for rank, (first, second) in enumerate(results):
        assert first[0] == "PydistError" and second[0] == "PydistError", (first, second)
        # Whoever sees it first says so; the others may see their connections end before.
        if rank == 0 or "malformed" in first[1]:
            assert "malformed message from rank 1: " in first[1] and what in first[1], first


# --------------------------------------------------------------------------- messages


@pytest.mark.parametrize("codec", [x for x in cases.CODECS if x.block_format], ids=str)
def test_bytes_of_shards(codec: Any) -> None:
    """Codes, then scales; units past the end are zeros and not what was in memory."""
    form, worker = codec.block_format, Worker(1, 3, 6)
    x = cases.inputs(1, 7 * form.block + 5, torch.float32, seed=1)[0]
    coder = all_reduce_coder(x, codec, worker, op="mean", ties="hash", seed=4)
    assert coder.units == 8
    units, rows = 3, torch.full((3, coder.message_bytes(3) + 16), 0xFF, dtype=torch.uint8)
    coder.encode(rows[:, 16:], units, 0, coder.units)
    payload, _ = rb.quantize(x.numpy(), form, draws=rb.Draws(4, 1, 0, 6))
    codes, scales = payload[: form.code_bytes(x.numel())], payload[form.code_bytes(x.numel()) :]
    for i, row in enumerate(rows[:, 16:].numpy()):
        part = codes[i * units * form.block_bytes :][: units * form.block_bytes]
        wanted = part.tobytes().ljust(units * form.block_bytes, b"\0")
        wanted += scales[i * units * 4 :][: units * 4].tobytes().ljust(units * 4, b"\0")
        assert row.tobytes() == wanted, f"row {i}"
    assert bool((rows[:, :16] == 0xFF).all())
    out = torch.full((coder.reduced_bytes(units),), 0xFF, dtype=torch.uint8)
    coder.reduce(rows[2:, 16:].repeat(3, 1), out, units, 8, 8, coder.flags)
    assert not out.any(), "a shard without data"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_bytes_of_plain_values(dtype: Any) -> None:
    """Values as the specification has them; units past the end are zeros."""
    n = 7 * 32 + 5
    x = cases.inputs(1, n, torch.float32, seed=1)[0]
    coder = all_reduce_coder(x, Raw(dtype), Worker(1, 3, 6), op="mean", ties="hash", seed=4)
    rows = torch.full((3, coder.message_bytes(3) + 16), 0xFF, dtype=torch.uint8)
    coder.encode(rows[:, 16:], 3, 0, coder.units)
    payload, _ = reference_raw.to_bytes(x.numpy(), dtype)
    sent = rows[:, 16:].numpy().tobytes()
    assert sent == payload.tobytes().ljust(len(sent), b"\0")
    assert bool((rows[:, :16] == 0xFF).all())
    out = torch.full((coder.reduced_bytes(3),), 0xFF, dtype=torch.uint8)
    coder.reduce(rows[2:, 16:].repeat(3, 1), out, 3, 8, 8, coder.flags)
    assert not out.any(), "a shard without data"
    few = all_reduce_coder(x[:5], Raw(dtype), Worker(0, 1, 0), op="sum", ties="hash", seed=0)
    assert few.message_bytes(1) == len(reference_raw.to_bytes(x[:5].numpy(), dtype)[0])


@pytest.mark.parametrize("ranks", [2, 3])
def test_plain_values_beyond_the_wires_range(worlds: Worlds, ranks: int) -> None:
    worlds(ranks).run(cases.beyond_range)


@pytest.mark.parametrize("codec", [c for c in cases.CODECS if isinstance(c, TopK)], ids=str)
def test_bytes_of_topk_shards(codec: TopK) -> None:
    """Block after block; units past the end are zeros and not what was in memory."""
    form, worker = codec.topk_format, Worker(1, 3, 6)
    x = cases.inputs(1, 7 * form.block + 5, torch.float32, seed=1)[0]
    coder = all_reduce_coder(x, codec, worker, op="mean", ties="hash", seed=4)
    assert coder.units == 8
    units, rows = 3, torch.full((3, coder.message_bytes(3)), 0xFF, dtype=torch.uint8)
    coder.encode(rows, units, 0, coder.units)
    payload, _ = rt.select(x.numpy(), form, seed=4, step=6)
    assert rows.numpy().tobytes() == payload.tobytes().ljust(rows.numel(), b"\0")
    out = torch.full((coder.reduced_bytes(units),), 0xFF, dtype=torch.uint8)
    coder.reduce(rows[2:].repeat(3, 1), out, units, 8, 8, coder.flags)
    assert not out.any(), "a shard without data"


def test_malformed_topk_messages_are_refused() -> None:
    x = torch.randn(200)
    coder = all_reduce_coder(x, TopK(0.1, block=64), Worker(0, 2, 0), op="sum", ties="hash", seed=0)
    rows = torch.full((2, coder.message_bytes(4)), 0xFF, dtype=torch.uint8)
    out = torch.empty(coder.reduced_bytes(4), dtype=torch.uint8)
    with pytest.raises(ValueError, match="malformed top-k payload: row 0, block 0"):
        coder.reduce(rows, out, 4, 0, 4, coder.flags)
    with pytest.raises(ValueError, match="malformed top-k payload: row 0, block 0"):
        coder.decode(rows[:1], 4, 0, 4)


def test_a_small_tensor_travels_small() -> None:
    """Less than a block is not filled up to one."""
    coder = all_reduce_coder(
        torch.ones(5), QSGD(4, block=65536), Worker(0, 1, 0), op="sum", ties="hash", seed=0
    )
    small = all_reduce_coder(torch.ones(5), TopK(), Worker(0, 1, 0), op="sum", ties="hash", seed=0)
    assert small.message_bytes(1) == TopK().topk_format.payload_bytes(5) == 12
    assert coder.message_bytes(1) == QSGD(4, block=65536).block_format.payload_bytes(5) == 8


# --------------------------------------------------------------------------- simulation alone


@pytest.mark.parametrize("codec", [QSGD(4, block=32), Sign(None), Raw(), Ternary()], ids=str)
def test_simulated_nan(codec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "CHUNK_BYTES", 100)
    tensors = [torch.ones(3000) for _ in range(3)]
    tensors[1][-1] = float("nan")
    assert bool(simulate.all_reduce(tensors, codec).isnan().all())
    assert bool(simulate.all_gather(tensors, codec).isnan().all())
    assert all(bool(x.isnan().all()) for x in simulate.reduce_scatter(tensors, codec))


def test_simulation_leaves_its_input_alone() -> None:
    tensors = [torch.randn(4, 25) for _ in range(3)]
    before = [x.clone() for x in tensors]
    for codec in (QSGD(4), Sign(None)):
        assert simulate.all_reduce(tensors, codec).shape == (4, 25)
        assert simulate.all_gather(tensors, codec).shape == (3, 100)
        simulate.reduce_scatter([x[:3] for x in tensors], codec)
        assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


def test_mean_of_64_workers_is_unbiased() -> None:
    """64 workers with one vector: their mean comes closer than one of them, as draws differ."""
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    one = simulate.all_gather([x], QSGD(4))[0] - x
    many = simulate.all_gather([x] * 64, QSGD(4)).mean(0) - x
    # Standard deviation falls by 8; equal draws would leave it as it is.
    assert float(many.norm() / one.norm()) < 1 / 6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: simulate.all_reduce([], QSGD(4)), "tensors must be 1 … 65534 tensors, got 0"),
        (lambda: simulate.all_reduce([torch.ones(3), torch.ones(4)], QSGD(4)),
         r"tensors\[1\] has shape"),
        (lambda: simulate.all_gather([torch.ones(3), torch.ones(3).half()], QSGD(4)),
         r"inputs\[1\] has dtype torch.float16, inputs\[0\] has torch.float32"),
        (lambda: simulate.reduce_scatter([torch.ones(5)] * 2, QSGD(4)),
         "inputs must have a multiple of 2 elements, got 5"),
        (lambda: simulate.all_reduce([torch.ones(5)], BlockInt(4), op="vote"), "op='vote' needs"),
        (lambda: simulate.all_reduce([torch.ones(5)], QSGD(4), step=-1), "step must be in"),
    ],
)  # fmt: skip
def test_wrong_simulations(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_example_in_the_documentation() -> None:
    gradients = [torch.randn(10_000) for _ in range(32)]
    exact = torch.stack(gradients).mean(0)
    errors = [
        float((simulate.all_reduce(gradients, pydist.QSGD(b), step=7) - exact).norm())
        for b in (2, 4, 8)
    ]
    assert errors[0] > errors[1] > errors[2]


# --------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("n", [0, 1, 31, 160, 257, 5003])
@pytest.mark.parametrize("codec", [Sign(None), *cases.CODECS], ids=str)
def test_a_codec_knows_the_bytes_of_its_payload(codec: Any, n: int) -> None:
    x = torch.randn(n)
    if isinstance(codec, Raw):
        width = 4 if codec.dtype is None else getattr(torch, codec.dtype).itemsize
        assert codec.payload_bytes(n) == -(-n * width // 4) * 4
    elif isinstance(codec, Ternary):
        scalers = ops.ternary_scale(x, codec)
        assert codec.payload_bytes(n) == ops.ternary_pack(x, scalers).numel()
    elif isinstance(codec, TopK):
        assert codec.payload_bytes(n) == ops.topk_select(x, codec).numel()
    elif codec.block_format is None:
        assert codec.payload_bytes(n) == ops.pack_signs(x).numel()
    else:
        plain = replace(codec, entropy=None) if isinstance(codec, QSGD) else codec
        assert codec.payload_bytes(n) == ops.quantize(x, plain).numel()


def test_a_codec_without_sizes_says_so() -> None:
    with pytest.raises(NotImplementedError, match="Nothing has no payload_bytes"):
        type("Nothing", (pydist.Codec,), {})().payload_bytes(3)


def test_arrays_are_simulated_as_tensors_are() -> None:
    tensors = [torch.randn(100) for _ in range(3)]
    arrays, codec = [x.numpy() for x in tensors], QSGD(4)
    for function in (simulate.all_reduce, simulate.all_gather):
        found = function(arrays, codec, step=3)
        assert type(found) is np.ndarray
        np.testing.assert_array_equal(found, function(tensors, codec, step=3).numpy())
    tensors = [torch.randn(99) for _ in range(3)]
    arrays = [x.numpy() for x in tensors]
    shares = zip(
        simulate.reduce_scatter(arrays, codec), simulate.reduce_scatter(tensors, codec), strict=True
    )
    assert all(np.array_equal(a, b.numpy()) for a, b in shares)

"""Every kernel is bit-identical to the reference: instruction sets, types, lengths, places."""

from __future__ import annotations

import emulated
import numpy as np
import pytest
from bitwise import assert_same_bits
from doors import DOOR_GROUPS, HOST_DOORS, Door
from guarded import guarded

from pydist import selfcheck
from pydist.formats import wire
from pydist.kernels.launch import launch
from pydist.kernels.lion import LionOptions
from pydist.reference import signs as reference
from pydist.selfcheck import cases

LENGTHS = (0, 1, 7, 8, 31, 32, 33, 1001)
MANY_RANKS = (*range(1, 10), 16, 17, 255, 256, 257)
BETAS = {"beta1": 0.9, "beta2": 0.99}
LARGE = 2**20 + 3


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240401)


# --------------------------------------------------------------------------- lengths and types


def test_pack_signs(door: Door, rng: np.random.Generator) -> None:
    for storage in door.storages:
        for n in LENGTHS:
            for zero_bit in (0, 1):
                for finite in (True, False):
                    x = cases.some_bits(rng, n, storage, finite=finite)
                    selfcheck.check_pack_signs(door, x, zero_bit=zero_bit)


def test_unpack_votes(door: Door, rng: np.random.Generator) -> None:
    for storage in door.storages:
        for n in LENGTHS:
            for planes in (1, 2):
                votes = cases.some_payloads(rng, planes, n)
                selfcheck.check_unpack_votes(door, votes, n, storage=storage)
            for ranks in (1, 3, 8, 65535):
                counts = cases.some_payloads(rng, wire.planes_for(ranks), n)
                for mean in (False, True):
                    selfcheck.check_unpack_votes(
                        door, counts, n, ranks=ranks, mean=mean, storage=storage
                    )


@pytest.mark.parametrize("ranks", MANY_RANKS)
def test_votes(door: Door, rng: np.random.Generator, ranks: int) -> None:
    for n in (0, 1, 33, 1001):
        payloads = cases.some_payloads(rng, ranks, n)
        selfcheck.check_count_votes(door, payloads)
        for ties in cases.TIES:
            for step in (6, 7):
                selfcheck.check_majority_vote(door, payloads, ties=ties, seed=9, step=step, n=n)
    selfcheck.check_majority_vote(door, cases.some_payloads(rng, ranks, 64), ties="hash")


@pytest.mark.parametrize("keys", DOOR_GROUPS)
def test_votes_of_as_many_ranks_as_there_may_be(
    keys: list[tuple[str, str]], rng: np.random.Generator
) -> None:
    payloads = rng.integers(0, 256, (wire.MAX_RANKS, 4), dtype=np.uint8)
    payloads[:, 0] = 255  # everyone: the largest count there is
    payloads[: wire.MAX_RANKS // 2, 1], payloads[wire.MAX_RANKS // 2 :, 1] = 0, 255
    for ranks in (wire.MAX_RANKS, wire.MAX_RANKS - 1):  # odd; even, with ties in byte 1
        counts = reference.count_votes(payloads[:ranks])
        planes = reference.majority_vote(payloads[:ranks], ties="zero")
        assert planes[1, 1] == (255 if ranks % 2 else 0)
        for key in keys:
            door = Door(*key)
            got = door.count_votes(payloads[:ranks])
            assert_same_bits(got, counts, f"count_votes of {ranks} ranks on {door.name}")
            got = door.majority_vote(
                payloads[:ranks], ties="zero", seed=0, step=0, n=None, segments=None
            )
            assert_same_bits(got, planes, f"majority_vote of {ranks} ranks on {door.name}")


def test_every_count_from_none_to_all(door: Door) -> None:
    for ranks in (2, 3, 8, 40):
        voted = np.arange(ranks + 1) > np.arange(ranks)[:, None]  # element i gets i votes
        payloads = np.stack([reference.pack_bits(row) for row in voted])
        counts = reference.unpack_votes(door.count_votes(payloads), ranks + 1, ranks=ranks)
        assert counts.tolist() == [2 * i - ranks for i in range(ranks + 1)]
        planes = door.majority_vote(
            payloads, ties="zero", seed=0, step=0, n=ranks + 1, segments=None
        )
        assert reference.unpack_votes(planes, ranks + 1).tolist() == [
            np.sign(2 * i - ranks) for i in range(ranks + 1)
        ]


@pytest.mark.parametrize("separate", [False, True], ids=["in-place", "momentum_out"])
def test_lion_pack(door: Door, rng: np.random.Generator, separate: bool) -> None:
    door = door.using(separate=separate)
    for storage in door.storages:
        for momentum_storage in sorted({"float32", "bfloat16"} & set(door.storages)):
            for n in LENGTHS:
                for spread in (None, 1.0):
                    options = LionOptions(
                        **BETAS, zero_bit=n % 2, binarization_range=spread, seed=3, rank=5, step=n
                    )
                    grad = cases.some_bits(rng, n, storage)
                    momentum = cases.some_bits(rng, n, momentum_storage)
                    selfcheck.check_lion_pack(door, grad, momentum, options)


def test_lion_apply(door: Door, rng: np.random.Generator) -> None:
    for storage in door.storages:
        for n in LENGTHS:
            param = cases.some_bits(rng, n, storage)
            for planes in (1, 2):
                votes = cases.some_payloads(rng, planes, n)
                selfcheck.check_lion_apply(door, param, votes, lr=3e-4, weight_decay=0.1)
            for ranks in (1, 3, 8, 65535):
                counts = cases.some_payloads(rng, wire.planes_for(ranks), n)
                selfcheck.check_lion_apply(
                    door, param, counts, lr=0.3, weight_decay=0.01, ranks=ranks
                )


# --------------------------------------------------------------------------- places in memory


@pytest.mark.parametrize("layout", ["offset", "strided", "unaligned"])
def test_layouts(door: Door, rng: np.random.Generator, layout: str) -> None:
    if layout not in door.layouts:
        pytest.skip("there are no such arrays")
    door = door.using(layout=layout)
    for storage in door.storages:
        for n in (0, 1, 33, 1001):
            x = cases.some_bits(rng, n, storage)
            selfcheck.check_pack_signs(door, x)
            selfcheck.check_unpack_votes(door, cases.some_payloads(rng, 2, n), n)
            payloads = cases.some_payloads(rng, 6, n)
            selfcheck.check_count_votes(door, payloads)
            selfcheck.check_majority_vote(door, payloads, ties="zero", n=n)
            selfcheck.check_lion_apply(door, x, cases.some_payloads(rng, 1, n), lr=0.1)
            for separate in (False, True):
                momentum = cases.some_bits(rng, n, "float32")
                run = door.using(separate=separate)
                selfcheck.check_lion_pack(run, x, momentum, LionOptions(**BETAS))


def test_shapes_and_permuted_dimensions(door: Door, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 5, 7)).astype(np.float32)
    votes = cases.some_payloads(rng, 1, x.size)
    turned = np.ascontiguousarray(x.transpose(2, 0, 1)).transpose(1, 2, 0)  # same values
    assert not turned.flags.c_contiguous
    payload = door.call("pack_signs", door.native(turned))
    assert_same_bits(payload, reference.pack_signs(x)[0], "pack_signs of a permuted array")
    door.call("lion_apply_", door.native(turned), door.native(votes), lr=0.1, weight_decay=0.5)
    expected = reference.lion_apply(x, votes, lr=0.1, weight_decay=0.5).reshape(x.shape)
    assert_same_bits(np.ascontiguousarray(turned), expected, "lion_apply_ of a permuted array")


# --------------------------------------------------------------------------- threads


@pytest.mark.parametrize("keys", DOOR_GROUPS)
def test_large_arrays_with_one_thread_and_several(
    keys: list[tuple[str, str]], rng: np.random.Generator
) -> None:
    x = cases.some_bits(rng, LARGE, "float32")
    m = cases.some_bits(rng, LARGE, "bfloat16")
    payloads = cases.some_payloads(rng, 4, LARGE)
    options = LionOptions(**BETAS, binarization_range=2.0, seed=1, rank=2, step=3)
    vote = {"ties": "hash", "seed": 5, "step": 7, "n": LARGE}
    planes = reference.majority_vote(payloads, **vote)
    counts = reference.count_votes(payloads)
    lion = reference.lion_pack(
        x, selfcheck.widen(m), **BETAS, momentum_storage="bfloat16",
        binarization_range=2.0, seed=1, rank=2, step=3,
    )  # fmt: skip
    expected = {
        "pack_signs": reference.pack_signs(x)[0],
        "count_votes": counts,
        "majority_vote": planes,
        "unpack_votes": reference.unpack_votes(counts, LARGE, ranks=4),
        "lion_pack": lion[0],
        "momentum": selfcheck.store(lion[1], "bfloat16"),
        "lion_apply": reference.lion_apply(x, planes, lr=0.1, weight_decay=0.1),
    }
    for kind, isa in keys:
        for threads in (1,) if kind == "emulated" else (1, 3):
            door = Door(kind, isa, "dense", threads)
            got = {
                "pack_signs": door.pack_signs(x, zero_bit=1, segments=None)[0],
                "count_votes": door.count_votes(payloads),
                "majority_vote": door.majority_vote(payloads, **vote, segments=None),
                "unpack_votes": door.unpack_votes(
                    counts, LARGE, ranks=4, mean=False, storage="float32"
                ),
                "lion_apply": door.lion_apply(x, planes, lr=0.1, weight_decay=0.1, ranks=None),
            }
            if "bfloat16" in door.storages:
                got["lion_pack"], got["momentum"], _ = door.lion_pack(x, m, options, None)
            for name, bits in got.items():
                assert_same_bits(bits, expected[name], f"{name} on {door.name}")


def test_flags_raised_by_any_thread(door: Door) -> None:
    for place in (0, 2**17 - 1, 2**17, 2**18 + 1):  # in every task of the thread pool
        x = np.ones(2**18 + 2, dtype=np.float32)
        x[place] = np.inf
        _, flags = door.using(threads=3).pack_signs(x, zero_bit=1, segments=None)
        assert flags == wire.FLAG_NON_FINITE, f"infinity at {place}"


# --------------------------------------------------------------------------- segments


def test_segments(door: Door, rng: np.random.Generator) -> None:
    tables = [
        wire.segments([]),
        wire.segments([0]),
        wire.segments([0, 5, 0, 0, 64, 1, 0]),
        wire.segments([31, 32, 33], ordinals=[2, 0, 1], firsts=[1, 127, 128]),
        wire.segments([1000], firsts=[2**33 + 5]),
        wire.segments([70, 70], ordinals=[2**32 - 1, 2**32], firsts=[0, 37]),
        np.array([[96, 40, 0, 0], [320, 3, 1, 5]], dtype=np.int64),  # gaps before and between
        wire.segments([33, 4200, 1]),  # a whole chunk of a CUDA warp, not at a multiple of 16 bytes
        wire.segments([1024, 1024, 4096, 40]),  # rows that begin where such a chunk ends
    ]
    for table in tables:
        _check_table(door, rng, table)


def _check_table(door: Door, rng: np.random.Generator, table: wire.IntArray) -> None:
    n = int(table[:, 1].sum())
    grad = cases.some_bits(rng, n, "float32")
    momentum = cases.some_bits(rng, n, "float32")
    selfcheck.check_pack_signs(door, grad, segments=table)
    for spread in (None, 1.5):
        options = LionOptions(**BETAS, binarization_range=spread, seed=8, rank=1, step=2)
        selfcheck.check_lion_pack(door, grad, momentum, options, table)
    payloads = cases.some_payloads(rng, 4, 32 * wire.segments_words(table) + 32)  # spare bytes
    for ties in cases.TIES:
        selfcheck.check_majority_vote(door, payloads, ties=ties, seed=1, step=5, segments=table)


def test_gap_before_a_single_segment_is_zero() -> None:
    door = Door("torch", HOST_DOORS[0][1])
    x = np.ones(2**16, dtype=np.float32)
    table = np.array([[2**16, 2**16, 0, 0]], dtype=np.int64)
    for _ in range(8):  # fresh memory may be zero by chance; memory used before is not
        door.pack_signs(x, zero_bit=1, segments=None)
        payload, _ = door.pack_signs(x, zero_bit=1, segments=table)
        assert not payload[: 2**13].any()


def test_a_parameter_cut_in_pieces_votes_as_a_whole(door: Door, rng: np.random.Generator) -> None:
    n, cut = 1000, 352
    payloads = cases.some_payloads(rng, 2, n)
    whole = door.majority_vote(payloads, ties="hash", seed=4, step=9, n=n, segments=None)
    for first, length in ((0, cut), (cut, n - cut)):
        part = slice(first // 8, first // 8 + wire.payload_bytes(length))
        table = wire.segments([length], firsts=[first])
        planes = door.majority_vote(
            payloads[:, part], ties="hash", seed=4, step=9, n=None, segments=table
        )
        assert_same_bits(planes, whole[:, part], f"elements from {first} on")


def test_apply_with_segments_reads_each_parameters_bits(
    door: Door, rng: np.random.Generator
) -> None:
    table = wire.segments([5, 0, 70, 32])
    table[1:, 0] += 64
    x = rng.standard_normal(107).astype(np.float32)
    planes = cases.some_payloads(rng, 1, 32 * wire.segments_words(table))
    new = x.copy()
    door.call(
        "lion_apply_", door.native(new), door.native(planes), lr=0.5, weight_decay=0.1,
        segments=door.native(table),
    )  # fmt: skip
    begin = 0
    for offset, length, _, _ in table.tolist():
        here = slice(begin, begin + length)
        expected = reference.lion_apply(
            x[here], planes[:, offset // 8 :][:, : wire.payload_bytes(length)],
            lr=0.5, weight_decay=0.1,
        )  # fmt: skip
        assert_same_bits(new[here], expected, f"segment at {offset}")
        begin += length


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=emulated.MARKS) for seed in emulated.SEEDS]
)
def test_a_row_cut_out_of_a_table(seed: int) -> None:
    """Alone in its launch it has all of the work, whatever its table says was before it."""
    assert emulated.EMULATOR is not None
    emulated.EMULATOR.configure(seed)
    rows = wire.rows_of(wire.segments([4096, 100]))[1:]
    assert rows[0, wire.WORDS_BEFORE] == 128
    x = guarded(np.full(100, -1.0, dtype=np.float32), at_end=True)
    payload = guarded(np.full(4 * 132, 0xA5, dtype=np.uint8), at_end=True)
    rows[:, wire.X] = x.ctypes.data
    launch(emulated.target(), "pack_signs", rows, 0, payload.ctypes.data, 1, 0)
    assert not payload[512:].any() and (payload[:512] == 0xA5).all()

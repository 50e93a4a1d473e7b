"""Kernels on a CUDA device equal those of the CPU, which equal the reference; `make gpu`.

Tests marked gpu are skipped, with the reason, where there is no device. Their twins on the CPU
run everywhere, so that what runs on the day there is a GPU has run before.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from codec_calls import codec_calls, on_host
from devices import OffsetMemory, cuda, missing_device, on_cuda, on_each_device
from torch import Tensor

from pydist import arrays, cli, ops, selfcheck
from pydist.formats import wire
from pydist.selfcheck import cases

LION = {"beta1": 0.9, "beta2": 0.99}
SPREAD = {**LION, "binarization_range": 1.5, "seed": 3, "rank": 2}


@on_cuda
def test_pydist_check(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check"]) == 0, capsys.readouterr().out
    assert "cuda:0" in capsys.readouterr().out


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("kernel", selfcheck.KERNELS)
@on_each_device
def test_every_kernel_anywhere_in_memory(device: str, kernel: str, offset: int) -> None:
    run = selfcheck.KernelRunner(OffsetMemory(device, offset))
    _, difference = cases.check_kernel(run, kernel)
    if difference:
        raise difference


# --------------------------------------------------------------------------- against the CPU


def values(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers, zeros of both signs, infinities and NaN among them."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    for i, special in enumerate((0.0, -0.0, 1e-40, float("inf"), float("nan"), -float("inf"))):
        x[i::97] = special
    return x.to(dtype)


def votes(ranks: int, n: int, seed: int) -> Tensor:
    shape = (ranks, wire.payload_bytes(n))
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def all_kernels(n: int, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Tensor]:
    """What every operator answers: whole, in segments, strided, into memory that is there."""
    table = torch.from_numpy(wire.segments([n // 3, 1, n - n // 3 - 1], ordinals=[4, 0, 9]))
    x = values(n, dtype, seed).to(device)
    ballot = votes(6, n, seed).to(device)
    wide = votes(6, n + 96, seed + 1).to(device)
    flags = torch.zeros(1, dtype=torch.int32, device=device)
    step = torch.tensor([seed + 5], device=device)
    found: dict[str, Tensor] = {"flags": flags}
    found["signs"] = ops.pack_signs(x, flags=flags)
    found["signs segments"] = ops.pack_signs(x, zero_bit=0, segments=table)
    found["signs strided"] = ops.pack_signs(x[::2])
    room = torch.full_like(found["signs"], 0xA5)
    found["signs out"] = ops.pack_signs(x, out=room)
    found["values"] = ops.unpack_signs(found["signs"], n, dtype=dtype)
    found["counts"] = ops.count_votes(ballot)
    found["mean"] = ops.unpack_votes(found["counts"], n, ranks=6, mean=True, dtype=dtype)
    for ties in ("hash", "zero", "positive"):
        found[ties] = ops.majority_vote(ballot, ties=ties, seed=7, step=seed, n=n)
    found["hash segments"] = ops.majority_vote(wide, seed=7, step=step, segments=table)
    for name in ("float32", "bfloat16"):
        for options in ({**LION, "zero_bit": 0}, {**SPREAD, "step": step}):
            momentum = values(n, getattr(torch, name), seed + 2).nan_to_num(0, 1, -1).to(device)
            key = f"lion {name} {'draws' if 'rank' in options else ''}"
            found[key] = ops.lion_pack_(x, momentum, segments=table, **options)
            found[f"{key} momentum"] = momentum
    param = values(n, dtype, seed + 3).to(device)
    found["param"] = param
    ops.lion_apply_(param, found["zero"], lr=0.1, weight_decay=0.3)
    ops.lion_apply_(param, found["counts"], lr=0.1, ranks=6)
    twice = values(2 * n, dtype, seed + 4).to(device)
    ops.lion_apply_(twice[::2], found["hash"], lr=0.1)
    found["strided param"] = twice
    return found


def assert_equal(there: dict[str, Tensor], here: dict[str, Tensor]) -> None:
    for name, expected in here.items():
        got = there[name].cpu().contiguous().view(-1).view(torch.uint8)
        wanted = expected.contiguous().view(-1).view(torch.uint8)
        assert torch.equal(got, wanted), f"{name}: byte {int((got != wanted).nonzero()[0])}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@on_each_device
def test_every_operator(device: str, dtype: torch.dtype) -> None:
    for n in (3, 33, 1001, 4096, 100_003):
        assert_equal(all_kernels(n, dtype, device), all_kernels(n, dtype, "cpu"))


@pytest.mark.parametrize("device", ["cpu", cuda("cuda:1")])
def test_a_device_that_is_not_the_current_one(device: str) -> None:
    assert_equal(all_kernels(1001, torch.float32, device), all_kernels(1001, torch.float32, "cpu"))
    if device != "cpu":
        assert torch.cuda.current_device() == 0


@on_each_device
def test_several_streams_at_once(device: str) -> None:
    streams = [torch.cuda.Stream(device) if device != "cpu" else None for _ in range(4)]
    found = []
    for repeat in range(3):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
                found.append(all_kernels(100_003, torch.float32, device, seed=4 * repeat + i))
    if device != "cpu":
        torch.cuda.synchronize()
    for seed, there in enumerate(found):
        assert_equal(there, all_kernels(100_003, torch.float32, "cpu", seed=seed))


# --------------------------------------------------------------------------- more than 2**31


HUGE = {"cpu": (2**15 + 37, 2**10), "cuda:0": (2**31 + 37, 2**20)}


def repeated(pattern: Tensor, n: int) -> Tensor:
    whole = n // len(pattern) * len(pattern)
    x = pattern.new_empty(n)
    x[:whole].view(-1, len(pattern)).copy_(pattern)
    x[whole:] = pattern[: n - whole]
    return x


def assert_repeats(x: Tensor, pattern: Tensor) -> None:
    """In slices, so that comparing takes little memory."""
    whole = len(x) // len(pattern)
    rows = x[: whole * len(pattern)].view(whole, -1)
    for part in rows.split(64):
        assert bool((part == pattern).all())
    assert torch.equal(x[whole * len(pattern) :], pattern[: len(x) - whole * len(pattern)])


@on_each_device
def test_more_elements_than_an_int_counts(device: str) -> None:
    n, period = HUGE[device]
    if device != "cpu" and torch.cuda.mem_get_info()[0] < 16 * n:
        free = torch.cuda.mem_get_info()[0] >> 30
        pytest.skip(f"{free} GiB of device memory are free, this needs {16 * n >> 30}")
    tail = n % period
    random = torch.Generator(device).manual_seed(1)
    pattern = torch.randn(period, device=device, generator=random).bfloat16()
    momentum_pattern = torch.randn(period, device=device, generator=random).bfloat16()
    x, momentum = repeated(pattern, n), repeated(momentum_pattern, n)
    payload = ops.pack_signs(x)
    assert_repeats(payload[: n // period * period // 8], ops.pack_signs(pattern))
    assert torch.equal(payload[n // period * period // 8 :], ops.pack_signs(pattern[:tail]))
    signs = torch.where(pattern < 0, -1.0, 1.0).bfloat16()  # of a zero, which randn may draw: +1
    assert_repeats(ops.unpack_signs(payload, n, dtype=torch.bfloat16), signs)
    ops.lion_pack_(x, momentum, **LION)
    ops.lion_pack_(pattern, momentum_pattern, **LION)
    assert_repeats(momentum, momentum_pattern)
    ops.lion_apply_(x, payload[None], lr=0.1)
    ops.lion_apply_(pattern, ops.pack_signs(pattern)[None], lr=0.1)
    assert_repeats(x, pattern)
    # What depends on an element's place: windows, which are told where they are.
    draws = ops.lion_pack_(x, momentum, **SPREAD)
    ballot = torch.stack([payload, ~payload])
    ties = ops.majority_vote(ballot, seed=3, n=n)[0]
    for first in (0, n // 2 // 32 * 32, (n - 1000) // 32 * 32):
        size = min(4096, n - first)
        table = torch.tensor([[0, size, 0, first]])
        there = slice(first // 8, first // 8 + wire.payload_bytes(size))
        window = x[first : first + size]
        at = repeated(momentum_pattern, n)[first : first + size].clone()
        assert torch.equal(draws[there], ops.lion_pack_(window, at, segments=table, **SPREAD))
        part = ops.majority_vote(ballot[:, there], seed=3, segments=table)[0]
        assert torch.equal(ties[there], part)


# --------------------------------------------------------------------------- graphs, compilation


def training_step(state: dict[str, Tensor]) -> None:
    """A stochastic vote, the majority with a hashed tie, the update; and the step goes on."""
    ops.lion_pack_(
        state["grad"], state["momentum"], **SPREAD, step=state["step"], out=state["ballot"][0]
    )
    ops.majority_vote(state["ballot"], seed=1, step=state["step"], n=1001, out=state["planes"])
    ops.lion_apply_(state["param"], state["planes"], lr=0.01)
    state["step"].add_(1)


def fresh(device: str, step: int) -> dict[str, Tensor]:
    state = {
        "grad": values(1001, torch.float32, 1).nan_to_num(0, 1, -1),
        "momentum": torch.zeros(1001),
        "ballot": votes(2, 1001, 2),
        "planes": torch.zeros(1, wire.payload_bytes(1001), dtype=torch.uint8),
        "param": torch.zeros(1001),
        "step": torch.tensor([step]),
    }
    return {name: x.to(device) for name, x in state.items()}


@on_each_device
def test_random_numbers_advance_when_a_graph_is_replayed(device: str) -> None:
    state, expected = fresh(device, 5), fresh("cpu", 5)
    if device == "cpu":
        replay = lambda: training_step(state)  # noqa: E731
    else:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            training_step(fresh(device, 0))  # loads the kernels
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            training_step(state)
        replay = graph.replay
    ballots = []
    for _ in range(4):
        replay()
        training_step(expected)
        assert_equal(state, expected)
        ballots.append(state["ballot"][0].tolist())
    assert ballots[1] != ballots[2] != ballots[3], "the same draws in each replay"


@on_cuda
def test_a_table_of_segments_is_not_captured(device: str) -> None:
    x = torch.ones(100, device=device)
    table = torch.from_numpy(wire.segments([50, 50]))
    ops.pack_signs(x, segments=table)
    with pytest.raises(RuntimeError, match="segments has 2 rows"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            ops.pack_signs(x, segments=table)
    assert ops.pack_signs(x).tolist()[:12] == [255] * 12, "the device is of no use afterwards"


@on_each_device
def test_a_compiled_function(device: str) -> None:
    def step(x: Tensor, grad: Tensor, momentum: Tensor, count: Tensor) -> Tensor:
        payload = ops.lion_pack_(grad * 2.0, momentum, **SPREAD, step=count)
        planes = ops.majority_vote(torch.stack([payload, ~payload]), step=count, n=x.numel())
        ops.lion_apply_(x, planes, lr=0.1)
        return x + 1.0

    def inputs() -> list[Tensor]:
        made = [values(1001, torch.float32, i).nan_to_num(0, 1, -1) for i in range(3)]
        return [x.to(device) for x in (*made, torch.tensor([9]))]

    eager, traced = inputs(), inputs()
    expected = step(*eager)
    torch._dynamo.reset()
    backend = "aot_eager" if device == "cpu" else "inductor"  # which takes half a minute there
    result = torch.compile(step, fullgraph=True, backend=backend)(*traced)
    assert_equal({"result": result}, {"result": expected.cpu()})
    names = ("x", "grad", "momentum", "count")
    assert_equal(dict(zip(names, traced, strict=True)),
                 {n: x.cpu() for n, x in zip(names, eager, strict=True)})  # fmt: skip


# --------------------------------------------------------------------------- CuPy


def all_arrays(xp: Any) -> dict[str, Any]:
    """What every function of the other door answers, on NumPy or CuPy arrays."""
    n = 1001
    found: dict[str, Any] = {}
    for dtype in ("float32", "float16"):
        x = xp.asarray(values(n, torch.float32, 1).numpy().astype(dtype))
        momentum = xp.asarray(values(n, torch.float32, 2).nan_to_num(0, 1, -1).numpy())
        ballot = xp.asarray(votes(6, n, 3).numpy())
        flags, step = xp.zeros(1, dtype="int32"), xp.full(1, 5, dtype="int64")
        table = wire.segments([500, 501])
        payload = arrays.pack_signs(x, flags=flags)
        planes = arrays.majority_vote(ballot, seed=7, step=step, n=n)
        counts = arrays.count_votes(ballot, out=xp.empty((3, ballot.shape[1]), dtype="uint8"))
        drawn = arrays.lion_pack_(x, momentum, **SPREAD, step=step, segments=table)
        param = xp.asarray(values(2 * n, torch.float32, 4).numpy().astype(dtype))
        arrays.lion_apply_(param[::2], planes, lr=0.1)
        arrays.lion_apply_(param[1::2], counts, lr=0.1, ranks=6)
        found |= {
            f"{dtype} {name}": array
            for name, array in {
                "flags": flags, "payload": payload, "planes": planes, "counts": counts,
                "drawn": drawn, "momentum": momentum, "param": param,
                "strided": arrays.pack_signs(x[::3]),
                "signs": arrays.unpack_signs(payload, n, dtype=dtype),
                "mean": arrays.unpack_votes(counts, n, ranks=6, mean=True),
            }.items()
        }  # fmt: skip
    return found


@pytest.mark.parametrize("stream", ["default", "other"])
@on_each_device
def test_arrays(device: str, stream: str) -> None:
    def all_calls(xp: Any) -> dict[str, Any]:
        return all_arrays(xp) | dict(codec_calls(arrays, xp.asarray))

    expected = all_calls(np)
    if device == "cpu":
        found = all_calls(np)
    else:
        cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
        on = cupy.cuda.Stream(non_blocking=True) if stream == "other" else contextlib.nullcontext()
        with on:
            found = {name: cupy.asnumpy(x) for name, x in all_calls(cupy).items()}
    for name, wanted in expected.items():
        assert found[name].tobytes() == wanted.tobytes(), name


def test_every_function_of_arrays_is_called() -> None:
    called: set[str] = set()

    class Noted:
        __name__ = "pydist.arrays"

        def __getattr__(self, name: str) -> Any:
            called.add(name)
            return getattr(arrays, name)

    dict(codec_calls(Noted(), np.asarray))
    signs = {"pack_signs", "majority_vote", "count_votes", "lion_pack_", "lion_apply_",
             "unpack_signs", "unpack_votes"}  # fmt: skip
    assert called | signs == set(arrays.__all__), "all_arrays has the others"


@on_each_device
def test_every_codec(device: str) -> None:
    """The other front end, held against NumPy arrays."""
    expected = dict(codec_calls(arrays, np.asarray))
    found = codec_calls(ops, lambda x: torch.from_numpy(np.array(x)).to(device))
    for name, x in found:
        assert on_host(x).tobytes() == expected.pop(name).tobytes(), name
    assert not expected


def test_what_is_missing_is_said() -> None:
    assert not missing_device(0) or "without CUDA" in missing_device(0)
    assert missing_device(1000)

"""What ranks do in test_modes.py: calls under the modes that torch keeps a thread."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import pydist
from pydist import simulate

CODECS = {
    "sign": pydist.Sign("l1"),
    "qsgd": pydist.QSGD(4),
    "elias": pydist.QSGD(4, norm="l2", entropy="elias"),
    "ternary": pydist.Ternary(clip=2.5),
    "topk": pydist.TopK(0.05),
    "raw": pydist.Raw(),
}


@contextlib.contextmanager
def _set(setter: Callable[[Any], None], value: Any, usual: Any) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(usual)


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default_dtype": lambda: _set(torch.set_default_dtype, torch.float64, torch.float32),
    "half default_dtype": lambda: _set(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default_device": lambda: _set(torch.set_default_device, "meta", None),
    "device context": lambda: torch.device("meta"),
    "deterministic": lambda: _set(torch.use_deterministic_algorithms, True, False),
    "flush_denormal": lambda: _set(torch.set_flush_denormal, True, False),
}


def data(rank: int, n: int = 3000) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(rank)
    return torch.randn(n, generator=generator, device="cpu", dtype=torch.float32)


def results(rank: int, ranks: int, name: str) -> list[Tensor]:
    """What the collectives give, and one process that simulates them."""
    codec, found = CODECS[name], []
    for contiguous in (True, False):
        x = data(rank) if contiguous else data(rank, 6000).view(-1, 2).t()[0]
        found.append(pydist.all_reduce(x, codec, step=3))
    out = torch.empty(3000 * ranks, device="cpu", dtype=torch.float32)
    found.append(pydist.all_gather(out, data(rank), codec, step=4))
    if name != "topk":
        part = torch.empty(1500, device="cpu", dtype=torch.float32)
        found.append(pydist.reduce_scatter(part, data(rank, 1500 * ranks), codec, step=5))
    found.append(pydist.all_reduce(data(rank), codec, async_op=True, step=6).wait())
    found.append(simulate.all_reduce([data(i) for i in range(ranks)], codec, step=3))
    return [x.clone() for x in found]


def under_mode(rank: int, ranks: int, mode: str) -> None:
    for name in CODECS:
        expected = results(rank, ranks, name)
        outside = data(rank).requires_grad_(mode == "no_grad")
        with MODES[mode]():
            for got, wanted in zip(results(rank, ranks, name), expected, strict=True):
                assert got.device.type == "cpu" and got.dtype == torch.float32
                assert torch.equal(got, wanted), name
            inside = data(rank)
            pydist.all_reduce(outside.detach(), CODECS[name], step=3)
            pending = pydist.all_reduce(data(rank), CODECS[name], async_op=True, step=3)
        # What a mode has made is reduced outside of it, and what was begun in it ends there.
        assert torch.equal(pending.wait(), expected[0]), name
        pydist.all_reduce(inside, CODECS[name], step=3)
        assert torch.equal(inside.clone(), expected[0]) and torch.equal(
            outside.detach(), expected[0]
        )
        for got, wanted in zip(results(rank, ranks, name), expected, strict=True):
            assert torch.equal(got, wanted), f"{name}, after the mode"

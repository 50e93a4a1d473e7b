"""What `codecs.py` sets beside pydist's codecs: torch's casts and PowerSGD, bitsandbytes, hivemind.

The last two are no dependency of anything else here; `found()` says why one is missing. hivemind
1.1.12 needs an older NumPy than pydist is developed with: `pip install bitsandbytes hivemind
"numpy<2.3"` into an environment of their own.
"""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import torch
from methods import Layers, Method, Sent, Slot
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook


class Whole(Method):
    """A method that turns one tensor into an object and back, without remembering anything."""

    def compress(self, x: Tensor) -> Any:
        """What is sent of `x`."""
        raise NotImplementedError

    def expand(self, sent: Any) -> Tensor:
        """The float32 tensor that the receiver makes of it."""
        raise NotImplementedError

    def size(self, sent: Any) -> int:
        """Bytes of what is sent."""
        raise NotImplementedError

    def send(self, layers: Layers, history: Sequence[Layers] = ()) -> Sent:
        sent = [self.compress(x) for x in layers]
        values = [self.expand(y).view(x.shape) for x, y in zip(layers, sent, strict=True)]
        return Sent(values, sum(self.size(y) for y in sent))

    def encode(self, slot: Slot) -> None:
        slot.sent = self.compress(slot.x)

    def decode(self, slot: Slot) -> None:
        slot.out = self.expand(slot.sent)


# ---------------------------------------------------------------- torch


class Cast(Whole):
    """A cast; 8-bit floats also scaled such that the largest value of a tensor is theirs.

    Args:
        dtype: What is sent.
        scaled: Whether a float32 scale goes with it.
    """

    family = "casts of torch"

    def __init__(self, dtype: torch.dtype, *, scaled: bool = False) -> None:
        self.dtype, self._scales = dtype, scaled
        short = str(dtype)[6:].removesuffix("fn")
        self.name = f"{short}, a scale a tensor" if scaled else short

    def compress(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self._scales:
            return x.to(self.dtype), None
        scale = x.abs().amax().clamp_min(1e-30) / torch.finfo(self.dtype).max
        return (x / scale).to(self.dtype), scale

    def expand(self, sent: tuple[Tensor, Tensor | None]) -> Tensor:
        values, scale = sent
        return values.float() if scale is None else values.float().mul_(scale)

    def size(self, sent: tuple[Tensor, Tensor | None]) -> int:
        return sent[0].nbytes + (0 if sent[1] is None else 4)

    def mean(self, workers: Sequence[Layers], history: Sequence[Sequence[Layers]] = ()) -> Layers:
        """16 bits: as torch's hook, which divides, then lets an all-reduce add in that type."""
        if self.dtype.itemsize == 1:
            return super().mean(workers)
        found = []
        for parts in zip(*workers, strict=True):
            total = torch.zeros_like(parts[0], dtype=self.dtype)
            for x in parts:
                total += x.to(self.dtype).div_(len(workers))
            found.append(total.float())
        return found


class PowerSGD(Method):
    """The low-rank approximation of torch's hook (arXiv 1905.13727), without error feedback.

    Matrices [rows, columns] travel as P [rows, rank] and Q [columns, rank]; what would not shrink
    to half goes as float32, as in the hook, whose own functions decide and orthogonalize.

    Args:
        rank: Columns of P and Q.
        warm: Begin with the Q of the step before, instead of random numbers.
    """

    _LEAST_RATE = 2  # the hook's default of min_compression_rate

    def __init__(self, rank: int, *, warm: bool) -> None:
        self.rank, self.warm = rank, warm
        start = "warm start" if warm else "random start"
        self.name, self.family = f"PowerSGD({rank}), {start}", f"PowerSGD of torch, {start}"

    def _shrinks(self, x: Tensor) -> bool:
        if x.ndim < 2:
            return False
        rows, columns = x.flatten(1).shape
        return powerSGD_hook._should_compress(rows, columns, self.rank, self._LEAST_RATE)[0]

    def _first(self, x: Tensor, i: int) -> Tensor:
        """A random Q [1, columns, rank] for parameter `i`."""
        columns, generator = x.flatten(1).shape[1], torch.Generator().manual_seed(i)
        q = torch.randn(1, columns, self.rank, generator=generator)
        powerSGD_hook._orthogonalize(q)
        return q

    @staticmethod
    def _factors(matrices: Sequence[Tensor], q: Tensor) -> tuple[Tensor, Tensor]:
        """P and Q that all workers share, from their matrices [1, rows, columns] and a first Q."""
        p = torch.stack([torch.bmm(m, q) for m in matrices]).mean(0)
        powerSGD_hook._orthogonalize(p)
        return p, torch.stack([torch.bmm(m.mT, p) for m in matrices]).mean(0)

    def send(self, layers: Layers, history: Sequence[Layers] = ()) -> Sent:
        values = self.mean([layers], [[earlier] for earlier in history])
        size = 0
        for x in layers:
            rows, columns = x.flatten(1).shape if x.ndim > 1 else (0, 0)
            size += 4 * (self.rank * (rows + columns) if self._shrinks(x) else x.numel())
        return Sent(values, size)

    def mean(self, workers: Sequence[Layers], history: Sequence[Sequence[Layers]] = ()) -> Layers:
        found = []
        for i, parts in enumerate(zip(*workers, strict=True)):
            if not self._shrinks(parts[0]):
                found.append(torch.stack(parts).mean(0))
                continue
            q = self._first(parts[0], i)
            for earlier in history if self.warm else ():
                _, q = self._factors([layers[i].flatten(1)[None] for layers in earlier], q)
                powerSGD_hook._orthogonalize(q)
            p, q = self._factors([x.flatten(1)[None] for x in parts], q)
            found.append(torch.bmm(p, q.mT).view(parts[0].shape))
        return found

    def encode(self, slot: Slot) -> None:
        """As one square matrix, the shape that costs the fewest calls and bytes."""
        side = int(slot.x.numel() ** 0.5)
        matrix = slot.x[: side * side].view(1, side, side)
        if not hasattr(slot, "q"):
            slot.q = self._first(matrix[0], 0)
        slot.sent = self._factors([matrix], slot.q)

    def decode(self, slot: Slot) -> None:
        p, q = slot.sent
        size = p.shape[1] * q.shape[1]
        torch.bmm(p, q.mT, out=slot.out[:size].view(1, p.shape[1], -1))


# ---------------------------------------------------------------- bitsandbytes, hivemind


class BitsAndBytes(Whole):
    """Codes of a fixed table of 256 or 16 values, times the largest magnitude of a block.

    Args:
        kind: `"8 bits"`, `"nf4"` or `"fp4"`.
        block: Elements of a block.
    """

    def __init__(self, kind: str, block: int) -> None:
        self._functions: Any = importlib.import_module("bitsandbytes.functional")
        self._kind, self._block = kind, block
        self.name, self.family = f"bitsandbytes {kind}, blocks of {block}", "bitsandbytes"

    def compress(self, x: Tensor) -> tuple[Tensor, Any]:
        if self._kind == "8 bits":
            return self._functions.quantize_blockwise(x.flatten(), blocksize=self._block)
        return self._functions.quantize_4bit(
            x.flatten(), blocksize=self._block, quant_type=self._kind
        )

    def expand(self, sent: tuple[Tensor, Any]) -> Tensor:
        if self._kind == "8 bits":
            return self._functions.dequantize_blockwise(*sent)
        return self._functions.dequantize_4bit(*sent)

    def size(self, sent: tuple[Tensor, Any]) -> int:
        """Codes and scales; the table is the same for all."""
        codes, state = sent
        return codes.nbytes + state.absmax.nbytes


class Hivemind(Whole):
    """What hivemind's averagers send; its own serialized form, table and all.

    Args:
        kind: The name in its `CompressionType`.
    """

    family = "hivemind"

    def __init__(self, kind: str) -> None:
        types: Any = importlib.import_module("hivemind.proto.runtime_pb2")
        self._functions: Any = importlib.import_module("hivemind.compression")
        self._type = types.CompressionType.Value(kind)
        self.name = f"hivemind {kind}"

    def compress(self, x: Tensor) -> Any:
        return self._functions.serialize_torch_tensor(x, self._type)

    def expand(self, sent: Any) -> Tensor:
        return self._functions.deserialize_torch_tensor(sent)

    def size(self, sent: Any) -> int:
        return len(sent.buffer)


# Another library's methods: name, and how to make it.
OTHERS: dict[str, Callable[[], Whole]] = {
    "bitsandbytes 8 bits, blocks of 256": lambda: BitsAndBytes("8 bits", 256),
    "bitsandbytes 8 bits, blocks of 4096": lambda: BitsAndBytes("8 bits", 4096),
    "bitsandbytes nf4, blocks of 64": lambda: BitsAndBytes("nf4", 64),
    "bitsandbytes fp4, blocks of 64": lambda: BitsAndBytes("fp4", 64),
    "hivemind UNIFORM_8BIT": lambda: Hivemind("UNIFORM_8BIT"),
    "hivemind QUANTILE_8BIT": lambda: Hivemind("QUANTILE_8BIT"),
    "hivemind BLOCKWISE_8BIT": lambda: Hivemind("BLOCKWISE_8BIT"),
}


def found() -> tuple[list[Method], dict[str, str]]:
    """The rivals that work here, and why the others do not, by name."""
    rivals: list[Method] = [
        Cast(torch.bfloat16),
        Cast(torch.float16),
        *(Cast(t) for t in (torch.float8_e4m3fn, torch.float8_e5m2)),
        *(Cast(t, scaled=True) for t in (torch.float8_e4m3fn, torch.float8_e5m2)),
        *(PowerSGD(rank, warm=warm) for warm in (False, True) for rank in (1, 2, 4)),
    ]
    missing = {}
    warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
    for name, make in OTHERS.items():
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # they chat
                method = make()
                method.send([torch.linspace(-1, 1, 1 << 13)])
            rivals.append(method)
        except Exception as error:  # of another library, which may fail in any way
            missing[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return rivals, missing

"""What people use today, beside the kernels: torch, NumPy, CuPy, Triton, DeepSpeed.

A rival that answers with a tensor must give the kernel's own answer, which is checked before
anything is timed. One that returns nothing is spared part of the work, or does another; its name
says which.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pydist.bench.timing import Buffers

LION: dict[str, Any] = {"beta1": 0.9, "beta2": 0.99}
APPLY: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.1}


@dataclass(frozen=True)
class Rival:
    """Another way to the same end.

    Attributes:
        name: For the table.
        run: Does it once; a tensor that it returns must equal the kernel's.
        threaded: Whether torch's number of threads changes anything.
        make: Buffers of its own, where it can't use the kernel's; its answer is its own then.
    """

    name: str
    run: Callable[[Buffers], Tensor | None]
    threaded: bool = True
    make: Callable[[], Buffers] | None = None


def installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


# ---------------------------------------------------------------- torch


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def torch_pack(votes: Tensor) -> Tensor:
    """Bits of a bool tensor, eight a byte, the first in the lowest bit."""
    bits = votes.view(-1, 8).to(torch.uint8)
    return (bits << _shifts(votes.device)).sum(-1, dtype=torch.uint8)


def torch_bits(payloads: Tensor) -> Tensor:
    """0 or 1 an element, uint8 [..., 8 * bytes]."""
    return ((payloads.unsqueeze(-1) >> _shifts(payloads.device)) & 1).flatten(-2)


def torch_unpack(payload: Tensor, dtype: torch.dtype) -> Tensor:
    """±1 an element."""
    return torch_bits(payload).to(dtype).mul_(2).sub_(1)


def torch_count(payloads: Tensor) -> Tensor:
    """Counts, a byte an element."""
    return torch_bits(payloads).sum(0, dtype=torch.uint8)


def torch_majority(payloads: Tensor) -> Tensor:
    """Unpack all, add, compare, pack; ties are +1."""
    return torch_pack(2 * torch_count(payloads) >= len(payloads)).unsqueeze(0)


def torch_lion_vote(grad: Tensor, momentum: Tensor) -> None:
    """Direction, sign and new momentum; the sign stays a float an element."""
    momentum.lerp(grad.to(momentum.dtype), 1 - LION["beta1"]).sign_()
    momentum.lerp_(grad.to(momentum.dtype), 1 - LION["beta2"])


def torch_lion_apply(param: Tensor, vote: Tensor) -> None:
    """Decay and update from a vote that is a float an element already."""
    param.mul_(1 - APPLY["lr"] * APPLY["weight_decay"]).add_(vote, alpha=-APPLY["lr"])


# Compiled, the sign that nobody reads would be left out: these pack it, as the kernel does.


def torch_quantize(x: Tensor, bits: int, block: int) -> None:
    """Symmetric integers with the maximum of each whole block as scale; a byte an element."""
    whole = x.numel() // block
    rows = x[: whole * block].view(whole, block).float()
    scale = (2 ** (bits - 1) - 1) / rows.abs().amax(1, keepdim=True)
    (rows * scale).round_().to(torch.int8)


def torch_scaler(x: Tensor) -> None:
    """What a scaler is made of."""
    x.std()
    x.abs().amax()


def torch_ternary(x: Tensor, scaler: Tensor) -> None:
    """Signs of the elements that a draw keeps; a byte an element."""
    kept = torch.rand_like(x).mul_(scaler) < x.abs()  # the scaler stays on the device
    (x.sign() * kept).to(torch.int8)


def torch_topk(x: Tensor, k: int) -> None:
    """The largest of a whole tensor and where they are, as compressors take them from torch."""
    positions = x.abs().topk(k, sorted=False).indices
    x[positions]


def torch_lion_pack(grad: Tensor, momentum: Tensor, out: Tensor) -> None:
    """Vote, packed, and new momentum; lerp rounds otherwise than the kernel."""
    grad = grad.to(momentum.dtype)
    out.copy_(torch_pack(momentum.lerp(grad, 1 - LION["beta1"]) >= 0))
    momentum.lerp_(grad, 1 - LION["beta2"])


def torch_unpack_apply(param: Tensor, payload: Tensor) -> None:
    """Decay and update from a packed vote."""
    vote = torch_unpack(payload, param.dtype).view_as(param)
    param.mul_(1 - APPLY["lr"] * APPLY["weight_decay"]).add_(vote, alpha=-APPLY["lr"])


# ---------------------------------------------------------------- NumPy and CuPy


def numpy_pack(x: Tensor) -> Tensor:
    """numpy.packbits on a CPU tensor."""
    import numpy as np

    return torch.from_numpy(np.packbits(x.numpy() >= 0, bitorder="little"))


def numpy_unpack(payload: Tensor, dtype: torch.dtype) -> Tensor:
    """numpy.unpackbits, made ±1."""
    import numpy as np

    values: Any = np.unpackbits(payload.numpy(), bitorder="little").astype(str(dtype)[6:])
    values *= 2
    values -= 1
    return torch.from_numpy(values)


def cupy_pack(x: Tensor) -> Tensor:
    """cupy.packbits on a CUDA tensor."""
    cupy = importlib.import_module("cupy")
    packed = cupy.packbits(cupy.from_dlpack(x) >= 0, bitorder="little")
    answer: Tensor = from_dlpack(packed)
    return answer


def cupy_unpack(payload: Tensor, dtype: torch.dtype) -> Tensor:
    """cupy.unpackbits, made ±1."""
    cupy = importlib.import_module("cupy")
    values = cupy.unpackbits(cupy.from_dlpack(payload), bitorder="little").astype(str(dtype)[6:])
    values *= 2
    values -= 1
    answer: Tensor = from_dlpack(values)
    return answer


# ---------------------------------------------------------------- quantizers


def deepspeed_quantize(x: Tensor, bits: int, block: int) -> None:
    """Symmetric integers and a scale per block; its extension is compiled at the first call."""
    builders = importlib.import_module("deepspeed.ops.op_builder")
    module = builders.QuantizerBuilder().load()
    module.quantize(x, max(1, x.numel() // block), bits, module.Symmetric)


def triton_pack(x: Tensor) -> Tensor:
    """A plain Triton kernel; compiled at the first call."""
    answer: Tensor = importlib.import_module("pydist.bench.triton_pack").pack(x)
    return answer


# ---------------------------------------------------------------- which of them are here


def _array_library(device: str, name: str) -> str | None:
    if name == "bfloat16":
        return None  # neither knows it
    if device == "cpu":
        return "numpy"
    return "cupy" if installed("cupy") else None


def packers(device: str, name: str) -> list[Rival]:
    """Beside pack_signs."""
    found = [Rival("torch expression", lambda s: torch_pack(s.x >= 0))]
    library = _array_library(device, name)
    if library == "numpy":
        found.append(Rival("numpy.packbits(x >= 0)", lambda s: numpy_pack(s.x), False))
    if library == "cupy":
        found.append(Rival("cupy.packbits(x >= 0)", lambda s: cupy_pack(s.x)))
    if device == "cuda" and installed("triton"):
        found.append(Rival("Triton, a plain kernel", lambda s: triton_pack(s.x)))
    return found


def unpackers(device: str, name: str) -> list[Rival]:
    """Beside unpack_signs."""
    dtype = getattr(torch, name)
    found = [Rival("torch expression", lambda s: torch_unpack(s.payload, dtype))]
    library = _array_library(device, name)
    if library == "numpy":
        run = numpy_unpack
        found.append(Rival("numpy.unpackbits", lambda s: run(s.payload, dtype), False))
    if library == "cupy":
        found.append(Rival("cupy.unpackbits", lambda s: cupy_unpack(s.payload, dtype)))
    return found


def quantizers(name: str, bits: int, block: int) -> list[Rival]:
    """Beside quantize on CUDA, at equal bits and block sizes."""
    if name != "float16" or bits not in (4, 8) or not installed("deepspeed"):
        return []
    run = deepspeed_quantize
    return [Rival(f"DeepSpeed, {bits} bits, blocks of {block}", lambda s: run(s.x, bits, block))]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under torch.compile, for one size."""
    result: Callable[..., Any] = torch.compile(function, dynamic=False, fullgraph=True)
    return result

"""bitsandbytes' quantizers beside pydist's, at equal block sizes, from its CUDA library alone.

The library is called as the package calls it, into memory that is there. So a wheel's
``libbitsandbytes_cuda*.so`` is enough, on a machine that is offline or whose packages don't fit it:
``PYDIST_BITSANDBYTES`` names the file, else that of the installed package is taken.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
from pathlib import Path

import torch
from torch import Tensor

from pydist.bench.rivals import Rival
from pydist.bench.timing import Buffers

VARIABLE = "PYDIST_BITSANDBYTES"
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # elements that share an absmax
_SUFFIX = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_KIND = {4: "_nf4", 8: ""}  # 8 bits look each value up in a table of 256


def library() -> Path | None:
    """The shared library for this torch's CUDA; None where there is none."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    spec = importlib.util.find_spec("bitsandbytes")
    if spec is None or not spec.submodule_search_locations:
        return None
    wanted = int((torch.version.cuda or "0").replace(".", ""))
    found = {}
    for path in Path(spec.submodule_search_locations[0]).glob("libbitsandbytes_cuda*.so"):
        if match := re.fullmatch(r"libbitsandbytes_cuda(\d+)\.so", path.name):
            found[int(match[1])] = path
    fits = [version for version in found if version // 10 == wanted // 10 and version <= wanted]
    return found[max(fits)] if fits else None


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def _function(name: str, *, stream: bool) -> ctypes._NamedFuncPointer:
    """One of its functions: (table, input, absmax, output, block, elements[, stream])."""
    path = library()
    if path is None:
        raise RuntimeError(f"bitsandbytes has no library for CUDA {torch.version.cuda}")
    function = getattr(_load(path), name)
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int32] * 2
    function.argtypes += [ctypes.c_void_p] if stream else []
    function.restype = None
    return function


def _buffers(numel: int, dtype: torch.dtype, bits: int, block: int, device: str) -> Buffers:
    return Buffers(
        x=torch.randn(numel, device=device).to(dtype),
        codes=torch.zeros(numel * bits // 8, dtype=torch.uint8, device=device),
        absmax=torch.ones(-(-numel // block), device=device),
        table=torch.linspace(-1, 1, 256, device=device),
        out=torch.zeros(numel, dtype=dtype, device=device),
    )


def _table(s: Buffers, bits: int) -> int | None:
    return s.table.data_ptr() if bits == 8 else None


def _rivals(what: str, numel: int, name: str, bits: int, block: int) -> list[Rival]:
    if bits not in _KIND or block not in BLOCKS or library() is None:
        return []
    dtype: torch.dtype = getattr(torch, name)
    function = f"c{what}_blockwise_{_SUFFIX[name]}{_KIND[bits]}"

    def quantize(s: Buffers) -> None:  # on the default stream, which is torch's unless told
        call = _function(function, stream=False)
        x, absmax, codes = s.x.data_ptr(), s.absmax.data_ptr(), s.codes.data_ptr()
        call(_table(s, bits), x, absmax, codes, block, numel)

    def dequantize(s: Buffers) -> None:
        call = _function(function, stream=True)
        codes, absmax, out = s.codes.data_ptr(), s.absmax.data_ptr(), s.out.data_ptr()
        call(_table(s, bits), codes, absmax, out, block, numel, _stream(s.out))

    return [
        Rival(
            f"bitsandbytes, {bits} bits, blocks of {block}",
            quantize if what == "quantize" else dequantize,
            make=lambda: _buffers(numel, dtype, bits, block, "cuda"),
        )
    ]


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream


def quantizers(numel: int, name: str, bits: int, block: int) -> list[Rival]:
    """Beside ``quantize`` on CUDA: as many bits, and a float32 a block; none where it can't.

    Args:
        numel: Elements.
        name: dtype of the input.
        bits: Of a code.
        block: Elements of a block.
    """
    return _rivals("quantize", numel, name, bits, block)


def dequantizers(numel: int, name: str, bits: int, block: int) -> list[Rival]:
    """Beside ``dequantize``, likewise."""
    return _rivals("dequantize", numel, name, bits, block)

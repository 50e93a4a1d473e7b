"""Every backend behind one interface of NumPy arrays.

Arrays of stored bits stand for arrays of a library (:class:`Stored`), so bfloat16 is checked
without a package that knows it, and kernels are those that people call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np

from pydist import _C
from pydist.kernels import blocks, elias, environment, lion, raw, signs, ternary, topk
from pydist.kernels.checks import ArrayInfo
from pydist.kernels.launch import LaunchTarget
from pydist.kernels.libraries import LIBRARIES
from pydist.kernels.register import KERNELS
from pydist.selfcheck.bits import Bits
from pydist.selfcheck.runner import Runner

FAMILIES = (signs, lion, blocks, elias, ternary, topk, raw)
"""Modules whose import fills the list of kernels."""


class Memory(Protocol):
    """Where a backend keeps its arrays; holds raw bits, so that bfloat16 needs no package."""

    name: str

    def put(self, array: Bits) -> Any:
        """A copy of a host array there."""

    def get(self, array: Any) -> Bits:
        """A copy on the host; waits for the kernels."""

    def address(self, array: Any) -> int:
        """Its first byte."""

    def device(self) -> str:
        """Name of the device, for the kernels' checks."""

    def target(self) -> LaunchTarget:
        """Where kernels on it run."""


class HostMemory:
    """NumPy arrays; kernels of one instruction set."""

    def __init__(self, isa: str, threads: int = 1) -> None:
        self.name = f"cpu {isa}"
        self.isa = isa
        self.threads = threads

    def put(self, array: Bits) -> Bits:
        """Copies it."""
        return array.copy()

    def get(self, array: Bits) -> Bits:
        """Copies it back."""
        return array.copy()

    def address(self, array: Bits) -> int:
        """Its first byte."""
        return _C.address_of(array)

    def device(self) -> str:
        """Its name."""
        return "cpu"

    def target(self) -> LaunchTarget:
        """Where kernels run."""
        _C.select_isa(self.isa)
        return LaunchTarget(threads=self.threads)


class TorchMemory:
    """Torch tensors on a CUDA device."""

    def __init__(self, index: int) -> None:
        import torch

        self._torch: Any = torch
        self._device = torch.device("cuda", index)
        self.name = f"cuda:{index} (torch)"

    def put(self, array: Bits) -> Any:
        """Copies it."""
        return self._torch.from_numpy(array.copy()).to(self._device)

    def get(self, array: Any) -> Bits:
        """Copies it back."""
        host: Bits = array.cpu().numpy()
        return host

    def address(self, array: Any) -> int:
        """Its first byte."""
        return int(array.data_ptr())

    def device(self) -> str:
        """Its name."""
        return str(self._device)

    def target(self) -> LaunchTarget:
        """Where kernels run."""
        from pydist.kernels import torch_tensors

        self._torch.cuda.set_device(self._device)
        return torch_tensors.target_of(self._torch.empty(0, device=self._device))


class CuPyMemory:
    """CuPy arrays on a CUDA device."""

    def __init__(self, index: int) -> None:
        import cupy

        self._cupy: Any = cupy
        self._index = index
        self.name = f"cuda:{index} (cupy)"

    def put(self, array: Bits) -> Any:
        """Copies it."""
        self._cupy.cuda.Device(self._index).use()
        return self._cupy.asarray(array)

    def get(self, array: Any) -> Bits:
        """Copies it back."""
        host: Bits = array.get()
        return host

    def address(self, array: Any) -> int:
        """Its first byte."""
        return int(array.data.ptr)

    def device(self) -> str:
        """Its name."""
        return f"cuda:{self._index}"

    def target(self) -> LaunchTarget:
        """Where kernels run."""
        from pydist.kernels import libraries

        self._cupy.cuda.Device(self._index).use()
        return libraries.cupy_target()


class Stored:
    """An array of stored bits in some memory, as kernels see arrays of a library.

    Args:
        memory: Where it is.
        bits: The array there, of integers in the place of bfloat16.
        dtype: Name of the dtype that the bits are of.
    """

    def __init__(self, memory: Memory, bits: Any, dtype: str) -> None:
        self.memory, self.bits, self.dtype = memory, bits, dtype
        self.shape = tuple(bits.shape)

    def __getitem__(self, index: Any) -> Stored | int:
        part = self.bits[index]
        return int(part) if isinstance(index, int) else Stored(self.memory, part, self.dtype)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.bits[index] = value.bits if isinstance(value, Stored) else value

    def host(self) -> Bits:
        """A copy in host memory; waits for the kernels."""
        return self.memory.get(self.bits)


class _StoredLibrary:
    """:class:`pydist.kernels.libraries.Library` of such arrays, which are all contiguous."""

    kind = "stored"

    def holds(self, x: Any) -> bool:
        return isinstance(x, Stored)

    def info(self, name: str, x: Stored, *, written: bool = False) -> ArrayInfo:
        memory = x.memory
        return ArrayInfo(name, memory.address(x.bits), x.shape, x.dtype, memory.device(), x)

    def is_contiguous(self, x: Stored) -> bool:
        return True

    def contiguous(self, x: Stored) -> Stored:
        return x

    def writable(self, name: str, x: Stored) -> Stored:
        return x

    def written(self, x: Stored, dense: Stored) -> None: ...

    def may_overlap(self, a: Stored, b: Stored) -> bool:
        return a.bits is b.bits

    def empty(self, like: Stored, shape: tuple[int, ...], dtype: str) -> Stored:
        kind = "uint16" if dtype == "bfloat16" else dtype
        size = math.prod(shape)
        filled = np.full(size * np.dtype(kind).itemsize, 0xA5, dtype=np.uint8).view(kind)
        return Stored(like.memory, like.memory.put(filled.reshape(shape)), dtype)

    def dtype_name(self, dtype: Any) -> str:
        return str(dtype)

    def zero(self, x: Stored) -> None:
        x[...] = 0

    def on_device(self, x: Stored) -> AbstractContextManager[Any]:
        return nullcontext()

    def target(self, x: Stored, threads: int | None) -> LaunchTarget:
        return x.memory.target()


LIBRARIES[Stored] = _StoredLibrary()


class KernelRunner(Runner):
    """Runs kernels on arrays in some memory."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.name = memory.name

    def put(self, array: Bits) -> Stored:
        """A copy of an array there; uint16 stands for bfloat16."""
        array = np.ascontiguousarray(array)
        dtype = "bfloat16" if array.dtype == np.uint16 else array.dtype.name
        return Stored(self.memory, self.memory.put(array), dtype)

    def run(self, name: str, *args: Any, **options: Any) -> Any:
        """Calls a kernel on copies; see :meth:`pydist.selfcheck.runner.Runner.run`."""
        entry = KERNELS[name]
        there = [self.put(x) if isinstance(x, np.ndarray) else x for x in args]
        if "shared" in options:
            options["shared"] = self.put(options["shared"])
        changed = [
            there[i] for i, key in enumerate(entry.parameters[: len(there)]) if key in entry.writes
        ]
        if "flags" in entry.writes:
            options["flags"] = flags = self.put(np.zeros(1, dtype=np.int32))
        result = entry.function(*there, **options)
        found = [result.host()] if entry.result is not None else []
        found += [x.host() for x in changed]
        if "flags" in entry.writes:
            found.append(int(flags.host()[0]))
        return found[0] if len(found) == 1 else tuple(found)


def runners(device: str | None = None) -> Iterator[KernelRunner]:
    """One runner for each backend of this machine: instruction sets, then CUDA devices.

    Leaves the instruction set in use as it was.

    Args:
        device: ``"cpu"`` or ``"cuda"``: the backends on it alone.
    """
    if device != "cuda":
        chosen = _C.current_isa()
        try:
            for isa in _C.supported_isas():
                yield KernelRunner(HostMemory(isa))
        finally:
            _C.select_isa(chosen)
    for index in range(len(environment.cuda_devices()) if device != "cpu" else 0):
        if environment.torch_sees_cuda():
            yield KernelRunner(TorchMemory(index))
        elif environment.has_cupy():
            yield KernelRunner(CuPyMemory(index))

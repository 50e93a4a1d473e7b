"""Arrays of NumPy and CuPy, and which library an array is of; tensors are in ``torch_tensors``.

Kernels see arrays through these classes alone: what an array is, memory for results, where kernels
on it run. A class for another library goes into ``LIBRARIES``.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np

from pydist import _C
from pydist.formats import wire
from pydist.kernels.checks import ArrayInfo
from pydist.kernels.launch import LaunchTarget, cpu_target

Array = Any
"""A tensor, a ``numpy.ndarray`` or a CUDA array such as ``cupy.ndarray``."""
_NOTHING: AbstractContextManager[Any] = nullcontext()


class Library(Protocol):
    """The arrays of one library."""

    kind: str

    def holds(self, x: Array) -> bool:
        """Whether an array is of this library."""

    def info(self, name: str, x: Array, *, written: bool = False) -> ArrayInfo:
        """Describes a contiguous array; raises ValueError where it cannot be read (or written)."""

    def is_contiguous(self, x: Array) -> bool:
        """Whether its elements lie in memory one behind the other, in order, as they are."""

    def contiguous(self, x: Array) -> Array:
        """The array itself, or a contiguous copy."""

    def writable(self, name: str, x: Array) -> Array:
        """A contiguous array with its values; :meth:`written` copies back where it is another."""

    def written(self, x: Array, dense: Array) -> None:
        """Ends a write: copies ``dense`` back into ``x`` where it is a copy."""

    def may_overlap(self, a: Array, b: Array) -> bool:
        """Whether memory of strided arrays may be the same."""

    def empty(self, like: Array, shape: tuple[int, ...], dtype: str) -> Array:
        """An uninitialised array on the same device."""

    def dtype_name(self, dtype: Any) -> str:
        """Name of a dtype of the library."""

    def zero(self, x: Array) -> None:
        """Fills an array with zeros."""

    def on_device(self, x: Array) -> AbstractContextManager[Any]:
        """Makes an array's device the current one."""

    def target(self, x: Array, threads: int | None) -> LaunchTarget:
        """Where kernels on an array run."""


class _NumPyLike:
    """What arrays of NumPy and CuPy have in common."""

    kind: str
    module: Any

    def is_contiguous(self, x: Array) -> bool:
        return bool(x.flags.c_contiguous)

    def contiguous(self, x: Array) -> Array:
        return x if x.flags.c_contiguous else self.module.ascontiguousarray(x)

    def writable(self, name: str, x: Array) -> Array:
        self._check_writable(name, x)
        if x.flags.c_contiguous:
            return x
        if x.size and any(s == 0 and n > 1 for s, n in zip(x.strides, x.shape, strict=True)):
            raise ValueError(f"{name} has strides {list(x.strides)}: elements share memory")
        return self.module.ascontiguousarray(x)

    def _check_writable(self, name: str, x: Array) -> None: ...

    def written(self, x: Array, dense: Array) -> None:
        if x is not dense:
            x[...] = dense

    def may_overlap(self, a: Array, b: Array) -> bool:
        return bool(self.module.may_share_memory(a, b))

    def empty(self, like: Array, shape: tuple[int, ...], dtype: str) -> Array:
        return self.module.empty(shape, dtype=_DTYPES[dtype])

    def dtype_name(self, dtype: Any) -> str:
        name = np.dtype(dtype).name
        _DTYPES.setdefault(name, np.dtype(dtype))  # bfloat16 has a dtype of a package's own
        return name

    def zero(self, x: Array) -> None:
        x[...] = 0

    def on_device(self, x: Array) -> AbstractContextManager[Any]:
        return _NOTHING


_DTYPES = {
    name: np.dtype(name) for name in ("float32", "float16", "uint8", "int32", "int64")
}  # fmt: skip


_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def _name_of(dtype: np.dtype[Any]) -> str:
    """Name of a dtype; one of the other byte order has a name that no kernel takes."""
    return dtype.name if dtype.isnative else f"{dtype.name} of the other byte order"


class NumPy(_NumPyLike):
    """Arrays in host memory."""

    kind = "numpy"
    module: Any = np

    def holds(self, x: Array) -> bool:
        """Whether it is a ``numpy.ndarray``."""
        return isinstance(x, np.ndarray)

    def info(self, name: str, x: Array, *, written: bool = False) -> ArrayInfo:
        """Describes an array; one of the other byte order has a dtype that no kernel takes."""
        if written:
            self._check_writable(name, x)
        text = _NAMES.get(x.dtype) or _name_of(x.dtype)
        return ArrayInfo(name, _C.address_of(x), x.shape, text, "cpu", x)

    def _check_writable(self, name: str, x: Array) -> None:
        if not x.flags.writeable:
            raise ValueError(f"{name} is read-only")

    def target(self, x: Array, threads: int | None) -> LaunchTarget:
        """All cores that this process may use, or as many threads as asked for."""
        return cpu_target(len(os.sched_getaffinity(0)) if threads is None else threads)


class DLPack(NumPy):
    """Arrays of any library in host memory, such as JAX's: read without copying.

    Results are arrays of NumPy. Most such arrays are read-only, and then nothing writes into them.
    """

    def holds(self, x: Array) -> bool:
        """Whether it speaks DLPack, from host memory."""
        return isinstance(x, np.ndarray) or _in_host_memory(x)

    @staticmethod
    def _seen(x: Array, *, written: bool = False) -> Array:
        # NumPy's own door to DLPack knows no bfloat16; __array__ of JAX copies nothing either, but
        # that of others may: so nothing is written through it.
        if isinstance(x, np.ndarray):
            return x
        return np.asarray(x) if hasattr(x, "__array__") and not written else np.from_dlpack(x)

    def info(self, name: str, x: Array, *, written: bool = False) -> ArrayInfo:
        """Describes an array."""
        return super().info(name, self._seen(x, written=written), written=written)

    def is_contiguous(self, x: Array) -> bool:
        """Whether its elements lie one behind the other."""
        return super().is_contiguous(self._seen(x))

    def contiguous(self, x: Array) -> Array:
        """NumPy's view of the array, or a contiguous copy."""
        return super().contiguous(self._seen(x))

    def writable(self, name: str, x: Array) -> Array:
        """NumPy's view of an array that may be written, or a contiguous copy."""
        return super().writable(name, self._seen(x, written=True))

    def written(self, x: Array, dense: Array) -> None:
        """Copies ``dense`` back where it is a copy."""
        seen = self._seen(x, written=True)
        if not np.may_share_memory(seen, dense):
            seen[...] = dense

    def may_overlap(self, a: Array, b: Array) -> bool:
        """Whether they may share memory."""
        return super().may_overlap(self._seen(a), self._seen(b))


def _in_host_memory(x: Array) -> bool:
    device = getattr(x, "__dlpack_device__", None)
    return device is not None and int(device()[0]) == 1  # kDLCPU


class CuPy(_NumPyLike):
    """Arrays in device memory; work runs on CuPy's current stream."""

    kind = "cuda"

    def __init__(self) -> None:
        import cupy

        self.module = cupy

    def holds(self, x: Array) -> bool:
        """Whether it has the interface of arrays in device memory."""
        return hasattr(x, "__cuda_array_interface__") and not isinstance(x, np.ndarray)

    def info(self, name: str, x: Array, *, written: bool = False) -> ArrayInfo:
        """Describes an array."""
        return ArrayInfo(name, x.data.ptr, x.shape, x.dtype.name, f"cuda:{x.device.id}", x)

    def contiguous(self, x: Array) -> Array:
        """The array itself, or a copy on its device."""
        with x.device:
            return super().contiguous(x)

    def writable(self, name: str, x: Array) -> Array:
        """A contiguous array with its values, on its device."""
        with x.device:
            return super().writable(name, x)

    def empty(self, like: Array, shape: tuple[int, ...], dtype: str) -> Array:
        """An uninitialised array on the same device."""
        with like.device:
            return super().empty(like, shape, dtype)

    def on_device(self, x: Array) -> AbstractContextManager[Any]:
        """Makes an array's device the current one."""
        device: AbstractContextManager[Any] = x.device
        return device

    def target(self, x: Array, threads: int | None) -> LaunchTarget:
        """The current stream of the array's device."""
        with x.device:
            return cupy_target()


def cupy_target() -> LaunchTarget:
    """Where kernels on CuPy arrays run: the current device's current stream."""
    import cupy

    def upload(rows: wire.IntArray) -> tuple[int, Any]:
        if cupy.cuda.get_current_stream().is_capturing():
            raise RuntimeError(
                f"segments has {len(rows)} rows: such a table is copied to the device, "
                "which a CUDA graph can't repeat; capture one segment a call"
            )
        table = cupy.asarray(rows)  # CuPy's pool hands memory out in stream order
        return table.data.ptr, table

    def scratch(size: int) -> tuple[int, Any]:
        room = cupy.empty(size, dtype=np.uint8)
        return room.data.ptr, room

    return LaunchTarget(stream=cupy.cuda.get_current_stream().ptr, upload=upload, scratch=scratch)


_DLPACK = DLPack()
LIBRARIES: dict[type, Library] = {np.ndarray: NumPy()}
"""By the type of an array; others are looked for when they are first seen."""


def library_of(name: str, x: Array) -> Library:
    """The library of an array; raises TypeError, naming it, where it is none."""
    found = LIBRARIES.get(type(x))
    return _look_for(name, x) if found is None else found


def _look_for(name: str, x: Array) -> Library:
    if isinstance(x, np.ndarray):
        return LIBRARIES[np.ndarray]
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return library_of_tensors()
    if hasattr(x, "__cuda_array_interface__"):
        library = CuPy()
        if type(x).__module__.partition(".")[0] == "cupy":  # of others some are in host memory
            LIBRARIES[type(x)] = library
        return library
    if _in_host_memory(x):
        return _DLPACK  # not by its type: another array of it may be on a device
    raise TypeError(f"{name} must be a tensor or an array, got {type(x).__name__}")


def stacked(name: str, arrays: Sequence[Array]) -> Array:
    """Arrays of one library, shape and dtype as the rows of one.

    Raises:
        TypeError: They are of several libraries or dtypes, or one is no array.
        ValueError: There are none, or they have several shapes.
    """
    libraries = [library_of(f"{name}[{i}]", x) for i, x in enumerate(arrays)]
    if not libraries:
        raise ValueError(f"{name} must be an array, or a sequence of at least one, got {arrays}")
    for what, values, error in (
        ("library", [library.kind for library in libraries], TypeError),
        ("dtype", [str(x.dtype) for x in arrays], TypeError),
        ("shape", [list(x.shape) for x in arrays], ValueError),
    ):
        for i, value in enumerate(values):
            if value != values[0]:
                raise error(f"{name} must have one {what}, got {values[0]} and, at {i}, {value}")
    library: Any = libraries[0]
    module = sys.modules["torch"] if library.kind == "torch" else library.module
    return module.stack(list(arrays))


def library_of_tensors() -> Library:
    """The library of tensors; imports torch."""
    tensors: Library = importlib.import_module("pydist.kernels.torch_tensors").TORCH
    return tensors

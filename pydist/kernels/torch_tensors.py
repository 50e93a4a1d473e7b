"""Tensors, as :mod:`pydist.kernels.libraries` has the arrays of other libraries."""

from __future__ import annotations

import ctypes
import threading
from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pydist.formats import wire
from pydist.kernels.checks import ArrayInfo
from pydist.kernels.launch import LaunchTarget, cpu_target
from pydist.kernels.libraries import LIBRARIES

_NAMES = {
    getattr(torch, name): name
    for name in ("float32", "float16", "bfloat16", "uint8", "int32", "int64")
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_NOTHING: AbstractContextManager[Any] = nullcontext()


def written(target: Tensor, dense: Tensor) -> None:
    """Ends a write behind autograd's back: copies ``dense`` back, or bumps the version.

    A tensor that backward has saved is then known to have changed, as after any in-place operation.
    """
    if target is not dense and (
        target.is_neg()
        or dense.data_ptr() != target.data_ptr()
        or dense.stride() != target.stride()
    ):
        with torch.inference_mode(target.is_inference()):
            target.copy_(dense.view_as(target))
    elif not target.is_inference():
        torch.autograd.graph.increment_version(target)


class Torch:
    """Dense tensors on the CPU or a CUDA device."""

    kind = "torch"
    written = staticmethod(written)

    def holds(self, x: Any) -> bool:
        """Whether it is a tensor."""
        return isinstance(x, Tensor)

    def info(self, name: str, x: Tensor, *, written: bool = False) -> ArrayInfo:
        """Describes a contiguous tensor.

        Raises:
            ValueError: Its storage was freed or made smaller behind its back.
        """
        dtype = _NAMES.get(x.dtype) or str(x.dtype)[6:]
        info = ArrayInfo(name, x.data_ptr(), x.shape, dtype, x.device, x)
        storage = x.untyped_storage()
        if info.size and not info.address:
            check_storage(name, x)
            raise ValueError(f"{name} has no memory: a {type(x).__name__} on {x.device}")
        if info.end > storage.data_ptr() + storage.nbytes():
            check_storage(name, x)
        return info

    def is_contiguous(self, x: Tensor) -> bool:
        """Whether its memory holds its values, in order."""
        return x.is_contiguous() and not x.is_neg()

    def contiguous(self, x: Tensor) -> Tensor:
        """The tensor itself; a copy where it is strided, or the negative of its memory."""
        return x if x.is_contiguous() and not x.is_neg() else x.resolve_neg().contiguous()

    def writable(self, name: str, x: Tensor) -> Tensor:
        """A contiguous tensor with its values."""
        return dense_of(name, x)

    def may_overlap(self, a: Tensor, b: Tensor) -> bool:
        """Whether strided tensors reach into each other's memory."""
        spans = []
        for x in (a, b):
            reach = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
            spans.append((x.data_ptr(), x.data_ptr() + (reach + 1) * x.element_size()))
        if not (a.numel() and b.numel()):
            return False
        return spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]

    def empty(self, like: Tensor, shape: tuple[int, ...], dtype: str) -> Tensor:
        """An uninitialised tensor on the same device."""
        return like.new_empty(shape, dtype=_DTYPES[dtype])

    def dtype_name(self, dtype: Any) -> str:
        """Name of a dtype, torch's own or a name itself."""
        return _NAMES.get(dtype) or str(dtype).removeprefix("torch.")

    def zero(self, x: Tensor) -> None:
        """Fills a tensor with zeros."""
        x.zero_()

    def on_device(self, x: Tensor) -> AbstractContextManager[Any]:
        """Makes its CUDA device the current one."""
        return on_device_of(x)

    def target(self, x: Tensor, threads: int | None) -> LaunchTarget:
        """Its device's current stream; or as many CPU threads as asked for, or as torch has."""
        if x.is_cuda:
            return target_of(x)
        return cpu_target(torch.get_num_threads() if threads is None else threads)


def target_of(x: Tensor) -> LaunchTarget:
    """Where kernels on this tensor run: its device's current stream, or torch's CPU threads."""
    if x.is_cuda:
        stream = torch.cuda.current_stream(x.device).cuda_stream
        return LaunchTarget(
            stream=stream,
            upload=lambda rows: TABLES.on_device(rows, x.device, stream),
            scratch=lambda size: _scratch(size, x.device),
        )
    return cpu_target(torch.get_num_threads())


class DeviceTables:
    """Tables in device memory, of the last so many that differ.

    Call after call a hook's tables are the same, byte by byte: what is there is used again. Keyed
    by stream too, so that a table has arrived before it is read.

    Args:
        most: Tables that are kept.
    """

    def __init__(self, most: int = 256) -> None:
        self._most, self._lock = most, threading.Lock()
        self._known: OrderedDict[tuple[torch.device, int, bytes], Tensor] = OrderedDict()

    def on_device(
        self, rows: wire.IntArray, device: torch.device, stream: int
    ) -> tuple[int, Tensor]:
        """Address and owner of a table on the device; it is copied there unless it is there."""
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"segments has {len(rows)} rows: such a table is copied to the device, "
                "which a CUDA graph can't repeat; capture one segment a call"
            )
        key = (device, stream, rows.tobytes())
        with self._lock:
            table = self._known.get(key)
            if table is not None:
                self._known.move_to_end(key)
                return table.data_ptr(), table
        # Not waited for: both allocators are stream-ordered, so the copy may outlive the pinned
        # memory, and a kernel the table.
        table = torch.from_numpy(rows).pin_memory().to(device, non_blocking=True)
        with self._lock:
            self._known[key] = table
            if len(self._known) > self._most:
                self._known.popitem(last=False)
        return table.data_ptr(), table


TABLES = DeviceTables()


def _scratch(size: int, device: torch.device) -> tuple[int, Tensor]:
    room = torch.empty(size, dtype=torch.uint8, device=device)
    return room.data_ptr(), room


_floats: dict[tuple[torch.device, int], Tensor] = {}


def floats_near(x: Tensor, n: int) -> Tensor:
    """Uninitialised float32 [n] beside a tensor, until the next call.

    On a device the memory is that of the last call on the same stream: kernels there run one after
    another, and tables that hold its address stay the same (:class:`DeviceTables`).
    """
    if not x.is_cuda:
        return x.new_empty(n, dtype=torch.float32)
    key = (x.device, torch.cuda.current_stream(x.device).cuda_stream)
    held = _floats.get(key)
    if held is None or held.numel() < n:
        held = _floats[key] = torch.empty(n, dtype=torch.float32, device=x.device)
    return held[:n]


def moved(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; the host does not wait for a copy to one."""
    if x.is_cuda or device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Makes a tensor's CUDA device the current one, as launching on its streams needs."""
    return torch.cuda.device(x.device) if x.is_cuda else _NOTHING


# --------------------------------------------------------------------------- memory


class _DeviceMemory:
    """Bytes in device memory, as ``torch.as_tensor`` takes them without a copy."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3,
        }  # fmt: skip


def tensor_at(address: int, n: int, dtype: str, device: torch.device) -> Tensor:
    """A tensor [n] of memory that is there already; it does not keep the memory alive.

    Args:
        address: First byte.
        n: Elements.
        dtype: Name of their dtype.
        device: Where the memory is.
    """
    kind = _DTYPES[dtype]
    if n == 0:
        return torch.empty(0, dtype=kind, device=device)
    size = n * kind.itemsize
    if device.type == "cuda":
        return torch.as_tensor(_DeviceMemory(address, size), device=device).view(kind)
    memory = (ctypes.c_ubyte * size).from_address(address)
    return torch.frombuffer(memory, dtype=kind)


def check_storage(name: str, x: Tensor) -> None:
    """Raises ValueError where a tensor's storage is smaller than the tensor."""
    held, reach = x.untyped_storage().nbytes(), x.numel()
    if reach and not x.is_contiguous():
        reach = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    if (x.storage_offset() + reach) * x.element_size() > held:
        raise ValueError(
            f"{name} has {x.numel()} elements, but its storage has {held} bytes: it was freed or "
            "resized"
        )


def dense_of(name: str, x: Tensor) -> Tensor:
    """A contiguous tensor with the values of one that is written in place."""
    if x.is_contiguous() and not x.is_neg():
        return normal(x)
    if x.numel() and any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(
            f"{name} has strides {list(x.stride())}: several elements share one place in memory, "
            "so it cannot be written in place"
        )
    return normal(TORCH.contiguous(x))


def normal(x: Tensor) -> Tensor:
    """A tensor of the same memory that may be changed outside of inference mode, by any thread.

    Modes of torch belong to threads, and a tensor made in inference mode can be changed in that
    mode alone. Threads of pydist's own are in none.
    """
    if not x.is_inference():
        return x
    with torch.inference_mode(False):
        same = torch.empty(0, dtype=x.dtype, device=x.device)
        return same.set_(x.untyped_storage(), x.storage_offset(), x.size(), x.stride())


TORCH = Torch()
LIBRARIES[Tensor] = LIBRARIES[torch.nn.Parameter] = TORCH

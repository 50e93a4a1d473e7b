"""Every backend behind one interface of NumPy arrays.

Backends are called through :mod:`pydist.kernels.signs`, below both doors, on raw memory: so
bfloat16 is checked without a package that knows it, and a difference is the kernel's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from pydist import _C, environment
from pydist.formats import blocks, wire
from pydist.formats.blocks import BlockFormat
from pydist.kernels import block_kernels
from pydist.kernels import signs as kernels
from pydist.kernels.block_kernels import EncodeOptions
from pydist.kernels.checks import View
from pydist.kernels.signs import LionOptions, Target
from pydist.reference import signs as reference
from pydist.reference.signs import U8, Storage
from pydist.selfcheck.bits import Bits, storage_of, store
from pydist.selfcheck.elias import EliasKernels
from pydist.selfcheck.ternary_backend import TernaryKernels
from pydist.selfcheck.topk_backend import TopKKernels


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

    def target(self) -> Target:
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
        return int(array.__array_interface__["data"][0])

    def device(self) -> str:
        """Its name."""
        return "cpu"

    def target(self) -> Target:
        """Where kernels run."""
        _C.select_isa(self.isa)
        return Target(threads=self.threads)


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

    def target(self) -> Target:
        """Where kernels run."""
        from pydist.kernels import operators

        self._torch.cuda.set_device(self._device)
        return operators.target_of(self._torch.empty(0, device=self._device))


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

    def target(self) -> Target:
        """Where kernels run."""
        from pydist.kernels import array_backends

        self._cupy.cuda.Device(self._index).use()
        return array_backends.cupy_target()


class Runner(Protocol):
    """The kernels of one backend on NumPy arrays of stored bits; none of them changes its input."""

    name: str

    def pack_signs(
        self, x: Bits, *, zero_bit: int, segments: wire.IntArray | None
    ) -> tuple[U8, int]:
        """Payload and flags."""

    def unpack_votes(
        self, planes: U8, n: int, *, ranks: int | None, mean: bool, storage: Storage
    ) -> Bits:
        """Values of a vote."""

    def count_votes(self, payloads: U8) -> U8:
        """Count planes."""

    def majority_vote(
        self,
        payloads: U8,
        *,
        ties: reference.Ties,
        seed: int,
        step: int,
        n: int | None,
        segments: wire.IntArray | None,
    ) -> U8:
        """Sign plane, or sign and non-zero planes."""

    def lion_pack(
        self, grad: Bits, momentum: Bits, options: LionOptions, segments: wire.IntArray | None
    ) -> tuple[U8, Bits, int]:
        """Payload, new momentum and flags."""

    def lion_apply(
        self, param: Bits, planes: U8, *, lr: float, weight_decay: float, ranks: int | None
    ) -> Bits:
        """New parameters."""


class BlockRunner(Protocol):
    """The kernels of block formats of one backend; none of them changes its input."""

    name: str

    def quantize(
        self, x: Bits, form: BlockFormat, options: EncodeOptions, segments: wire.IntArray | None
    ) -> tuple[U8, int]:
        """Payload and flags."""

    def quantize_feedback(
        self,
        x: Bits,
        residual: Bits,
        form: BlockFormat,
        options: EncodeOptions,
        segments: wire.IntArray | None,
    ) -> tuple[U8, Bits, int]:
        """Payload, new residual and flags."""

    def reduce_quantized(
        self,
        payloads: U8,
        n: int,
        form: BlockFormat,
        options: EncodeOptions,
        *,
        mean: bool,
        segments: wire.IntArray | None,
    ) -> tuple[U8, int]:
        """Payload and flags."""

    def sum_quantized(
        self,
        payloads: U8,
        n: int,
        form: BlockFormat,
        *,
        mean: bool,
        storage: Storage,
        segments: wire.IntArray | None,
    ) -> Bits:
        """The sum, or the mean, of what payloads hold."""


class KernelRunner(EliasKernels, TernaryKernels, TopKKernels):
    """Calls :mod:`pydist.kernels.signs`, below both doors, on arrays in some memory."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.name = memory.name

    def _put(self, name: str, array: Bits, storage: str | None = None) -> tuple[Any, View]:
        there = self.memory.put(np.ascontiguousarray(array))
        dtype = storage or array.dtype.name
        view = View(name, self.memory.address(there), array.shape, dtype, self.memory.device())
        return there, view

    def _put_values(self, name: str, bits: Bits) -> tuple[Any, View]:
        return self._put(name, bits, storage_of(bits))

    def _payload(self, n: int, segments: wire.IntArray | None) -> tuple[Any, View]:
        words = wire.words_for(n) if segments is None else wire.segments_words(segments)
        return self._put("payload", np.zeros(4 * words, dtype=np.uint8))

    def pack_signs(
        self, x: Bits, *, zero_bit: int, segments: wire.IntArray | None
    ) -> tuple[U8, int]:
        """:func:`pydist.kernels.signs.pack_signs` into fresh arrays."""
        _x, x_view = self._put_values("x", x)
        payload, payload_view = self._payload(x.size, segments)
        flags, flags_view = self._put("flags", np.zeros(1, dtype=np.int32))
        kernels.pack_signs(
            self.memory.target(), x_view, payload_view,
            zero_bit=zero_bit, flags=flags_view, segments=segments,
        )  # fmt: skip
        return self.memory.get(payload), int(self.memory.get(flags)[0])

    def unpack_votes(
        self, planes: U8, n: int, *, ranks: int | None, mean: bool, storage: Storage
    ) -> Bits:
        """:func:`pydist.kernels.signs.unpack_votes` into fresh arrays."""
        _planes, planes_view = self._put("planes", planes)
        out, out_view = self._put_values("out", store(np.zeros(n, dtype=np.float32), storage))
        kernels.unpack_votes(self.memory.target(), planes_view, out_view, ranks=ranks, mean=mean)
        return self.memory.get(out)

    def count_votes(self, payloads: U8) -> U8:
        """:func:`pydist.kernels.signs.count_votes` into fresh arrays."""
        _payloads, view = self._put("payloads", payloads)
        shape = (wire.planes_for(payloads.shape[0]), payloads.shape[1])
        planes, planes_view = self._put("planes", np.zeros(shape, dtype=np.uint8))
        kernels.count_votes(self.memory.target(), view, planes_view)
        return self.memory.get(planes)

    def majority_vote(
        self,
        payloads: U8,
        *,
        ties: reference.Ties,
        seed: int,
        step: int,
        n: int | None,
        segments: wire.IntArray | None,
    ) -> U8:
        """:func:`pydist.kernels.signs.majority_vote` into fresh arrays."""
        _payloads, view = self._put("payloads", payloads)
        shape = (2 if ties == "zero" else 1, payloads.shape[1])
        planes, planes_view = self._put("planes", np.zeros(shape, dtype=np.uint8))
        kernels.majority_vote(
            self.memory.target(), view, planes_view,
            ties=ties, seed=seed, step=step, n=n, segments=segments,
        )  # fmt: skip
        return self.memory.get(planes)

    def lion_pack(
        self, grad: Bits, momentum: Bits, options: LionOptions, segments: wire.IntArray | None
    ) -> tuple[U8, Bits, int]:
        """:func:`pydist.kernels.signs.lion_pack` into fresh arrays."""
        _grad, grad_view = self._put_values("grad", grad)
        new, new_view = self._put_values("momentum", momentum)
        payload, payload_view = self._payload(grad.size, segments)
        flags, flags_view = self._put("flags", np.zeros(1, dtype=np.int32))
        kernels.lion_pack(
            self.memory.target(), grad_view, new_view, new_view, payload_view, options,
            flags=flags_view, segments=segments,
        )  # fmt: skip
        return self.memory.get(payload), self.memory.get(new), int(self.memory.get(flags)[0])

    def lion_apply(
        self, param: Bits, planes: U8, *, lr: float, weight_decay: float, ranks: int | None
    ) -> Bits:
        """:func:`pydist.kernels.signs.lion_apply` into fresh arrays."""
        new, view = self._put_values("param", param)
        _planes, planes_view = self._put("planes", planes)
        kernels.lion_apply(
            self.memory.target(), view, planes_view,
            lr=lr, weight_decay=weight_decay, ranks=ranks, skip=None, segments=None,
        )  # fmt: skip
        return self.memory.get(new)

    def sum_values(self, values: Bits, *, mean: bool, storage: Storage) -> tuple[Bits, int]:
        """:func:`pydist.kernels.signs.sum_values` into fresh arrays."""
        _values, view = self._put_values("values", values)
        zeros = np.zeros(values.shape[1], dtype=np.float32)
        out, out_view = self._put_values("out", store(zeros, storage))
        flags, flags_view = self._put("flags", np.zeros(1, dtype=np.int32))
        kernels.sum_values(self.memory.target(), view, out_view, mean=mean, flags=flags_view)
        return self.memory.get(out), int(self.memory.get(flags)[0])

    def _block_payload(
        self, n: int, form: BlockFormat, segments: wire.IntArray | None
    ) -> tuple[Any, View]:
        table = wire.one_segment(n) if segments is None else segments
        return self._put("payload", np.zeros(blocks.table_bytes(table, form), dtype=np.uint8))

    def quantize(
        self, x: Bits, form: BlockFormat, options: EncodeOptions, segments: wire.IntArray | None
    ) -> tuple[U8, int]:
        """:func:`pydist.kernels.block_kernels.quantize` into fresh arrays."""
        _x, x_view = self._put_values("x", x)
        payload, payload_view = self._block_payload(x.size, form, segments)
        flags, flags_view = self._put("flags", np.zeros(1, dtype=np.int32))
        block_kernels.quantize(
            self.memory.target(), x_view, payload_view, form, options,
            flags=flags_view, segments=segments,
        )  # fmt: skip
        return self.memory.get(payload), int(self.memory.get(flags)[0])

    def quantize_feedback(
        self,
        x: Bits,
        residual: Bits,
        form: BlockFormat,
        options: EncodeOptions,
        segments: wire.IntArray | None,
    ) -> tuple[U8, Bits, int]:
        """:func:`pydist.kernels.block_kernels.quantize_feedback` into fresh arrays."""
        _x, x_view = self._put_values("x", x)
        new, new_view = self._put_values("residual", residual)
        payload, payload_view = self._block_payload(x.size, form, segments)
        flags, flags_view = self._put("flags", np.zeros(1, dtype=np.int32))
        block_kernels.quantize_feedback(
            self.memory.target(), x_view, new_view, new_view, payload_view, form, options,
            flags=flags_view, segments=segments,
        )  # fmt: skip
        return self.memory.get(payload), self.memory.get(new), int(self.memory.get(flags)[0])

    def reduce_quantized(
        self,
        payloads: U8,
        n: int,
        form: BlockFormat,
        options: EncodeOptions,
        *,
        mean: bool,
        segments: wire.IntArray | None,
    ) -> tuple[U8, int]:
        """:func:`pydist.kernels.block_kernels.reduce_quantized` into fresh arrays."""
        _payloads, view = self._put("payloads", payloads)
        payload, payload_view = self._block_payload(n, form, segments)
        flags, flags_view = self._put("flags", np.zeros(1, dtype=np.int32))
        block_kernels.reduce_quantized(
            self.memory.target(), view, n, payload_view, form, options,
            mean=mean, flags=flags_view, segments=segments,
        )  # fmt: skip
        return self.memory.get(payload), int(self.memory.get(flags)[0])

    def sum_quantized(
        self,
        payloads: U8,
        n: int,
        form: BlockFormat,
        *,
        mean: bool,
        storage: Storage,
        segments: wire.IntArray | None,
    ) -> Bits:
        """:func:`pydist.kernels.block_kernels.dequantize` into fresh arrays."""
        _payloads, view = self._put("payloads", payloads)
        out, out_view = self._put_values("out", store(np.zeros(n, dtype=np.float32), storage))
        block_kernels.dequantize(
            self.memory.target(), view, out_view, form, mean=mean, segments=segments
        )
        return self.memory.get(out)


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

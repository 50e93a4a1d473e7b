"""The ternary kernels of one backend on NumPy arrays; see :mod:`pydist.selfcheck.backends`."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from pydist.formats import ternary, wire
from pydist.kernels import ternary_kernels
from pydist.kernels.block_kernels import EncodeOptions
from pydist.kernels.checks import View
from pydist.reference.signs import F32, U8, Storage
from pydist.selfcheck.bits import Bits, store


class TernaryRunner(Protocol):
    """The ternary kernels of one backend; none of them changes its input."""

    name: str

    def ternary_scale(
        self, x: Bits, clip: float | None, segments: wire.IntArray | None
    ) -> tuple[F32, int]:
        """Scalers and flags."""

    def ternary_pack(
        self,
        x: Bits,
        scalers: F32,
        shared: F32,
        options: EncodeOptions,
        segments: wire.IntArray | None,
    ) -> tuple[U8, int]:
        """Payload and flags."""

    def ternary_sum(self, payloads: U8, n: int, segments: wire.IntArray | None) -> tuple[U8, int]:
        """Sums and flags."""

    def ternary_unpack(
        self,
        payloads: U8,
        scalers: F32,
        n: int,
        *,
        mean: bool,
        storage: Storage,
        segments: wire.IntArray | None,
    ) -> tuple[Bits, int]:
        """Values and flags."""

    def ternary_unpack_sums(
        self,
        sums: U8,
        scalers: F32,
        n: int,
        *,
        ranks: int,
        mean: bool,
        storage: Storage,
        segments: wire.IntArray | None,
    ) -> tuple[Bits, int]:
        """Values and flags."""


class TernaryKernels:
    """Calls :mod:`pydist.kernels.ternary_kernels`, below both doors; a part of ``KernelRunner``."""

    memory: Any

    def _put(self, name: str, array: Bits, storage: str | None = None) -> tuple[Any, View]:
        raise NotImplementedError

    def _put_values(self, name: str, bits: Bits) -> tuple[Any, View]:
        raise NotImplementedError

    def _flags(self) -> tuple[Any, View]:
        return self._put("flags", np.zeros(1, dtype=np.int32))

    def _result(self, result: Any, flags: Any) -> tuple[Any, int]:
        return self.memory.get(result), int(self.memory.get(flags)[0])

    def _room(self, size: int) -> tuple[Any, View]:
        return self._put("out", np.zeros(size, dtype=np.uint8))

    def ternary_scale(
        self, x: Bits, clip: float | None, segments: wire.IntArray | None
    ) -> tuple[F32, int]:
        """:func:`pydist.kernels.ternary_kernels.scale` into fresh arrays."""
        _x, x_view = self._put_values("x", x)
        table = wire.one_segment(x.size) if segments is None else segments
        out, out_view = self._put("out", np.zeros(len(table), dtype=np.float32))
        size = ternary.scratch_bytes(ternary.rows_of(table))
        _scratch, scratch_view = self._put("scratch", np.full(size, 0xA5, dtype=np.uint8))
        flags, flags_view = self._flags()
        ternary_kernels.scale(
            self.memory.target(), x_view, out_view, scratch_view, clip or 0.0,
            flags=flags_view, segments=segments,
        )  # fmt: skip
        return self._result(out, flags)

    def ternary_pack(
        self,
        x: Bits,
        scalers: F32,
        shared: F32,
        options: EncodeOptions,
        segments: wire.IntArray | None,
    ) -> tuple[U8, int]:
        """:func:`pydist.kernels.ternary_kernels.pack` into fresh arrays."""
        _x, x_view = self._put_values("x", x)
        _own, own_view = self._put("scalers", scalers)
        _shared, shared_view = self._put("shared", shared)
        table = wire.one_segment(x.size) if segments is None else segments
        out, out_view = self._room(ternary.table_bytes(table))
        flags, flags_view = self._flags()
        ternary_kernels.pack(
            self.memory.target(), x_view, own_view, shared_view, out_view, options,
            flags=flags_view, segments=segments,
        )  # fmt: skip
        return self._result(out, flags)

    def ternary_sum(self, payloads: U8, n: int, segments: wire.IntArray | None) -> tuple[U8, int]:
        """:func:`pydist.kernels.ternary_kernels.sum_payloads` into fresh arrays."""
        _payloads, view = self._put("payloads", payloads)
        table = wire.one_segment(n) if segments is None else segments
        size = ternary.table_units(table) * ternary.sum_unit_bytes(len(payloads))
        out, out_view = self._room(size)
        flags, flags_view = self._flags()
        ternary_kernels.sum_payloads(
            self.memory.target(), view, n, out_view, flags=flags_view, segments=segments
        )
        return self._result(out, flags)

    def ternary_unpack(
        self,
        payloads: U8,
        scalers: F32,
        n: int,
        *,
        mean: bool,
        storage: Storage,
        segments: wire.IntArray | None,
    ) -> tuple[Bits, int]:
        """:func:`pydist.kernels.ternary_kernels.unpack` into fresh arrays."""
        _payloads, view = self._put("payloads", payloads)
        _scalers, scalers_view = self._put("scalers", scalers)
        out, out_view = self._put_values("out", store(np.zeros(n, dtype=np.float32), storage))
        flags, flags_view = self._flags()
        ternary_kernels.unpack(
            self.memory.target(), view, scalers_view, out_view,
            mean=mean, flags=flags_view, segments=segments,
        )  # fmt: skip
        return self._result(out, flags)

    def ternary_unpack_sums(
        self,
        sums: U8,
        scalers: F32,
        n: int,
        *,
        ranks: int,
        mean: bool,
        storage: Storage,
        segments: wire.IntArray | None,
    ) -> tuple[Bits, int]:
        """:func:`pydist.kernels.ternary_kernels.unpack_sums` into fresh arrays."""
        _sums, view = self._put("sums", sums)
        _scalers, scalers_view = self._put("scalers", scalers)
        out, out_view = self._put_values("out", store(np.zeros(n, dtype=np.float32), storage))
        flags, flags_view = self._flags()
        ternary_kernels.unpack_sums(
            self.memory.target(), view, scalers_view, out_view,
            ranks=ranks, mean=mean, flags=flags_view, segments=segments,
        )  # fmt: skip
        return self._result(out, flags)

"""Every backend's kernels of top-k blocks behind one interface of NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pydist.formats import wire
from pydist.formats.topk import TopKFormat, table_bytes
from pydist.formats.wire import IntArray
from pydist.kernels import topk_kernels
from pydist.kernels.checks import View
from pydist.reference.signs import U8, Storage
from pydist.selfcheck.bits import Bits, store


@dataclass(frozen=True)
class Order:
    """What the order of ties depends on."""

    seed: int = 0
    step: int = 0


class TopKRunner(Protocol):
    """The kernels of top-k blocks of one backend; none of them changes its input."""

    name: str

    def topk_select(
        self, x: Bits, form: TopKFormat, order: Order, segments: IntArray | None
    ) -> tuple[U8, int]:
        """Payload and flags."""

    def topk_feedback(
        self, x: Bits, residual: Bits, form: TopKFormat, order: Order, segments: IntArray | None
    ) -> tuple[U8, Bits, int]:
        """Payload, new residual and flags."""

    def topk_reduce(
        self,
        payloads: U8,
        n: int,
        form: TopKFormat,
        order: Order,
        *,
        mean: bool,
        segments: IntArray | None,
    ) -> tuple[U8, int]:
        """Payload and flags."""

    def topk_scatter(
        self,
        payloads: U8,
        n: int,
        form: TopKFormat,
        *,
        mean: bool,
        storage: Storage,
        segments: IntArray | None,
    ) -> tuple[Bits, int]:
        """The sum, or the mean, of what payloads hold, and flags."""

    def topk_clear(
        self, x: Bits, payload: U8, form: TopKFormat, segments: IntArray | None
    ) -> tuple[Bits, int]:
        """``x`` with zeros where the payload has entries, and flags."""


class TopKKernels:
    """Calls :mod:`pydist.kernels.topk_kernels`, below both doors; a part of ``KernelRunner``."""

    memory: Any
    _put: Callable[..., tuple[Any, View]]
    _put_values: Callable[..., tuple[Any, View]]

    def _flags(self) -> tuple[Any, View]:
        return self._put("flags", np.zeros(1, dtype=np.int32))

    def _topk_payload(
        self, n: int, form: TopKFormat, segments: IntArray | None
    ) -> tuple[Any, View]:
        table = wire.one_segment(n) if segments is None else segments
        return self._put("payload", np.zeros(table_bytes(table, form), dtype=np.uint8))

    def _host(self, *arrays: Any) -> tuple[Any, ...]:
        got = [self.memory.get(array) for array in arrays]
        return *got[:-1], int(got[-1][0])

    def topk_select(
        self, x: Bits, form: TopKFormat, order: Order, segments: IntArray | None
    ) -> tuple[U8, int]:
        """:func:`pydist.kernels.topk_kernels.select` into fresh arrays."""
        _x, x_view = self._put_values("x", x)
        payload, payload_view = self._topk_payload(x.size, form, segments)
        flags, flags_view = self._flags()
        topk_kernels.select(
            self.memory.target(), x_view, payload_view, form,
            seed=order.seed, step=order.step, flags=flags_view, segments=segments,
        )  # fmt: skip
        return self._host(payload, flags)

    def topk_feedback(
        self, x: Bits, residual: Bits, form: TopKFormat, order: Order, segments: IntArray | None
    ) -> tuple[U8, Bits, int]:
        """:func:`pydist.kernels.topk_kernels.feedback` into fresh arrays."""
        _x, x_view = self._put_values("x", x)
        new, new_view = self._put_values("residual", residual)
        payload, payload_view = self._topk_payload(x.size, form, segments)
        flags, flags_view = self._flags()
        topk_kernels.feedback(
            self.memory.target(), x_view, new_view, new_view, payload_view, form,
            seed=order.seed, step=order.step, flags=flags_view, segments=segments,
        )  # fmt: skip
        return self._host(payload, new, flags)

    def topk_reduce(
        self,
        payloads: U8,
        n: int,
        form: TopKFormat,
        order: Order,
        *,
        mean: bool,
        segments: IntArray | None,
    ) -> tuple[U8, int]:
        """:func:`pydist.kernels.topk_kernels.reduce` into fresh arrays."""
        _payloads, view = self._put("payloads", payloads)
        payload, payload_view = self._topk_payload(n, form, segments)
        flags, flags_view = self._flags()
        topk_kernels.reduce(
            self.memory.target(), view, n, payload_view, form,
            mean=mean, seed=order.seed, step=order.step, flags=flags_view, segments=segments,
        )  # fmt: skip
        return self._host(payload, flags)

    def topk_scatter(
        self,
        payloads: U8,
        n: int,
        form: TopKFormat,
        *,
        mean: bool,
        storage: Storage,
        segments: IntArray | None,
    ) -> tuple[Bits, int]:
        """:func:`pydist.kernels.topk_kernels.scatter` into fresh arrays."""
        _payloads, view = self._put("payloads", payloads)
        out, out_view = self._put_values("out", store(np.ones(n, dtype=np.float32), storage))
        flags, flags_view = self._flags()
        topk_kernels.scatter(
            self.memory.target(), view, out_view, form,
            mean=mean, flags=flags_view, segments=segments,
        )  # fmt: skip
        return self._host(out, flags)

    def topk_clear(
        self, x: Bits, payload: U8, form: TopKFormat, segments: IntArray | None
    ) -> tuple[Bits, int]:
        """:func:`pydist.kernels.topk_kernels.clear` on a copy."""
        new, view = self._put_values("x", x)
        _payload, payload_view = self._put("payload", payload[None])
        flags, flags_view = self._flags()
        topk_kernels.clear(
            self.memory.target(), view, payload_view, form, flags=flags_view, segments=segments
        )
        return self._host(new, flags)

"""How the parameters of a bucket travel together."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._distributed_c10d import GradBucket

from pydist.ddp.parameters import Parameters
from pydist.encoding.bucket import BucketPlan
from pydist.encoding.levels import Rows
from pydist.encoding.shares import Part
from pydist.training.buffers import real
from pydist.training.kept import InNodes, Span
from pydist.training.options import LOCAL, Choice, Options
from pydist.training.orders import Orders, Strided, has_several
from pydist.transport.exchange import choose_algorithm


@dataclass
class Layout:
    """A bucket as it was laid out once; used again as long as it does not change.

    Attributes:
        parts: The bucket's parameters.
        choices: How each parameter travels.
        orders: In which order its elements lie in the bucket.
        plan: How they share messages; on two levels this rank's shares of them.
        rows: On two levels how the ranks of a node share them.
        algorithm: The way the bucket takes.
        digest: Checksum of ``fields``.
        fields: What all ranks must agree on at the first call.
        agreed: They have.
        turnable: Parameters whose memory can be laid out in several ways, and their places here.
        watched: The gradients of all its parameters are.
    """

    parts: list[Part]
    choices: list[Choice]
    orders: list[Strided]
    plan: BucketPlan
    rows: Rows | None
    algorithm: str
    digest: int
    fields: dict[str, Any]
    turnable: list[tuple[int, Tensor]]
    agreed: bool = False
    watched: bool = False

    def hand_back(self, flat: Tensor) -> None:
        """Puts a result into the order in which DDP is going to read it.

        DDP fills a bucket by the strides that parameters had when it was made, and reads the
        result by those that they have now, but for gradients that lie in the bucket themselves.
        """
        for index, param in self.turnable:
            now, order = Strided.of(real(param)), self.orders[index]
            grad = param.grad
            inside = grad is not None and (
                not grad.is_sparse
                and grad.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
            )
            if now != order and not inside:
                part = self.parts[index]
                here = flat[part.offset : part.offset + part.numel]
                here.copy_(now.flat(order.shaped(here), flat.dtype, flat.device))


class Layouts:
    """The layouts of a model's buckets.

    Args:
        options: What the user asked for.
        parameters: The model's.
        levels: This rank's place; on one level every rank is a node.
        arrange: Called with a parameter's place and order, and on two levels with what of it is
            this rank's, whenever a bucket is laid out, so that what is kept of it can follow.
    """

    def __init__(
        self,
        options: Options,
        parameters: Parameters,
        levels: InNodes,
        arrange: Callable[[int, Strided, Span | None], None],
    ) -> None:
        self.options, self.parameters, self.levels = options, parameters, levels
        self._arrange = arrange
        self._orders = Orders()
        self._known: dict[tuple[Any, ...], Layout] = {}

    def of(self, bucket: GradBucket, flat: Tensor, stage: int) -> Layout:
        """How a bucket's parameters travel.

        Args:
            bucket: DDP's bucket, as DDP filled it.
            flat: Its buffer: dense, real, one-dimensional.
            stage: Of :meth:`pydist.training.options.Options.stage`.

        Raises:
            ValueError: A parameter has no name, the bucket another length than its parameters, or
                what is kept of a parameter is of another shape.
        """
        params = bucket.parameters()
        ordinals = [self.parameters.ordinal(param) for param in params]
        key = (bucket.index(), bucket.buffer().dtype, flat.numel(), stage, *ordinals)
        layout = self._known.get(key)
        if layout is not None and not self._orders.unsettled(ordinals):
            return layout
        parts = _parts(params, ordinals, flat) if layout is None else layout.parts
        self._orders.look(parts, params, flat)
        orders = [self._orders[i] for i in ordinals]
        if layout is None or layout.orders != orders:
            layout = self._lay_out(bucket, flat, parts, orders, stage)
            on_levels = self.levels.local > 1
            for part, order in zip(layout.plan.parts, orders, strict=True):
                self._arrange(part.ordinal, order, (part.first, part.last) if on_levels else None)
            # Buckets are rebuilt once or twice and stages pass; what was before is not needed.
            for old in [old for old in self._known if old[0] == key[0]]:
                del self._known[old]
            self._known[key] = layout
        return layout

    def forget(self) -> None:
        """Lays all buckets out anew, and compares them again; for what was loaded."""
        self._known.clear()

    def agree_again(self) -> None:
        """The next call of every bucket compares the whole layout again."""
        for layout in self._known.values():
            layout.agreed = False

    def _lay_out(
        self,
        bucket: GradBucket,
        flat: Tensor,
        parts: list[Part],
        orders: list[Strided],
        stage: int,
    ) -> Layout:
        params, dtype = bucket.parameters(), flat.dtype
        names = [self.parameters.names[part.ordinal] for part in parts]
        choices = [
            Choice(None, reason="sparse gradient")
            if stage >= 0 and bucket.buffer().is_sparse
            else self.options.choose(
                name, param, param.dtype if param.is_complex() else dtype, stage
            )
            for name, param in zip(names, params, strict=True)
        ]
        rows, mine = None, parts
        units = [1] * len(parts)
        if self.levels.local > 1:
            units = [
                self.options.unit(name, param) for name, param in zip(names, params, strict=True)
            ]
            raw = [choice.codec is None for choice in choices]
            rows = Rows(parts, raw, units, dtype, self.levels.local)
            mine = rows.shares(self.levels.local_rank, inside=stage != LOCAL)
            rows = None if stage == LOCAL else rows
        plan, algorithm = self._plan(mine, choices, dtype if rows is None else rows.dtype)
        fields: dict[str, Any] = {
            f"parameter {part.ordinal}": [
                name, str(dtype), list(param.shape), repr(choice.codec), choice.feedback,
                list(order.stride), unit,
            ]
            for part, name, param, choice, order, unit in zip(
                parts, names, params, choices, orders, units, strict=True
            )
        }  # fmt: skip
        digest = zlib.crc32(repr([str(dtype), *fields.items()]).encode())
        turnable = [(i, param) for i, param in enumerate(params) if has_several(param)]
        return Layout(parts, choices, orders, plan, rows, algorithm, digest, fields, turnable)

    def _plan(
        self, parts: list[Part], choices: list[Choice], dtype: torch.dtype
    ) -> tuple[BucketPlan, str]:
        codecs, nodes = [choice.codec for choice in choices], self.levels.nodes
        keeps = [choice.feedback for choice in choices]
        plan = BucketPlan(parts, codecs, keeps, dtype, nodes, nodes)
        algorithm = "all_gather"
        if nodes > 1:
            algorithm = choose_algorithm(self.options.algorithm, plan, nodes)
        if algorithm == "all_gather":
            plan = BucketPlan(parts, codecs, keeps, dtype, nodes, 1)
        return plan, algorithm


def _parts(params: Sequence[Tensor], ordinals: Sequence[int], flat: Tensor) -> list[Part]:
    """Where the parameters of a bucket lie in its buffer; a complex number lies there as two."""
    sizes = np.array(
        [param.numel() * (2 if param.is_complex() else 1) for param in params], dtype=np.int64
    )
    if int(sizes.sum()) != flat.numel():
        raise ValueError(f"a bucket of {flat.numel()} elements holds {int(sizes.sum())}")
    return [
        Part(ordinal, int(end - size), int(size))
        for ordinal, end, size in zip(ordinals, np.cumsum(sizes), sizes, strict=True)
    ]

"""Means over the ranks of a list of tensors, compressed with error feedback on both sides.

What the 1-bit optimizers send: momenta, or raw gradients while they warm up, all in one call. The
exchange, the messages and the residuals are those of the DDP hook (:mod:`pydist.encoding.bucket`,
:mod:`pydist.training.residuals`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pydist.codecs import Codec, Raw
from pydist.encoding.bucket import BucketCoder, BucketPlan, Feedback
from pydist.encoding.shares import Part
from pydist.optim.layout import Layout, any_rank_has, shaped, which_has
from pydist.optim.unsent import Unsent, digest_of, flattened
from pydist.training.residuals import OwnerShare, Residuals
from pydist.training.stats import Counters
from pydist.transport.coder import Worker
from pydist.transport.communicator import Call, Communicator
from pydist.transport.exchange import Exchange, choose_algorithm


class _Coder(BucketCoder):
    """A bucket whose ranks tell each other which parameters they have a gradient for.

    Attributes:
        used: Which parts any rank has a gradient for; known when the call is complete.
    """

    used: np.ndarray

    def metadata(self) -> Tensor | None:
        """One bit a part: does this rank have a gradient for it?"""
        return which_has(self.used)

    def merge_metadata(self, all_metadata: Tensor) -> None:
        """A part is used where any rank has a gradient for it."""
        self.used = any_rank_has(all_metadata, len(self.plan.parts))
        for section, feedback in zip(self.plan.sections, self.feedback, strict=True):
            if feedback is not None:
                feedback.used_by_any = self.used[section.indices]


class MeanExchange:
    """Averages tensors over the ranks, some raw and some compressed.

    Args:
        codec: What is compressed is compressed with this; ``None`` sends everything raw.
        seed: Seed of stochastic rounding.
        algorithm: As of :func:`pydist.all_reduce`.
        residual_dtype: float32 or bfloat16.
        rank: This rank.
        ranks: Number of ranks.

    Attributes:
        residuals: What was not sent yet, by ordinal.
        raw_bytes: Bytes of the trained parameters' gradients.
        flat: The buffer of all trained parameters, float32, each in its memory order; there during
            a step.
        views: Each trained parameter's part of it, with the parameter's shape and strides, by
            ordinal.
    """

    def __init__(
        self,
        codec: Codec | None,
        seed: int,
        algorithm: str,
        residual_dtype: torch.dtype,
        rank: int,
        ranks: int,
    ) -> None:
        self._codec, self._seed, self._algorithm = codec, seed, algorithm
        self._rank, self._ranks = rank, ranks
        self.residuals = Residuals(residual_dtype, ranks, mean=True)
        self._layout: Layout | None = None
        self._parts: list[Part] = []
        self._dtypes: list[str] = []
        self.raw_bytes = 0
        self._plans: dict[bytes, tuple[BucketPlan, str]] = {}
        self.flat = torch.empty(0, dtype=torch.float32, device="cpu")
        self.views: dict[int, Tensor] = {}

    # ----------------------------------------------------------------- parameters

    def cover(self, layout: Layout) -> None:
        """Takes over the parameters as they are now; residuals go along."""
        before, self._layout = self._layout, layout
        if before is not None:
            self._move_residuals(before, layout)
        params = [layout.params[i] for i in layout.active]
        ends = np.cumsum([p.numel() for p in params], dtype=np.int64).tolist()
        self._parts = [
            Part(i, end - p.numel(), p.numel())
            for i, p, end in zip(layout.active, params, ends, strict=True)
        ]
        self._dtypes = [str(p.dtype)[6:] for p in params]
        self.raw_bytes = sum(p.numel() * p.element_size() for p in params)
        self._plans.clear()
        self.flat, self.views = self.flat[:0], {}

    def _move_residuals(self, before: Layout, layout: Layout) -> None:
        """Keys residuals by the new ordinals, and takes them to where the parameters are."""
        held = self.residuals
        worker: dict[int, Tensor] = {}
        owner: dict[int, OwnerShare] = {}
        for i, j in layout.came_from(before).items():
            if layout.glances[i][4] != before.glances[j][4]:
                continue  # another parameter in its place
            if j in held.worker:
                worker[i] = held.worker[j].to(layout.glances[i][3])
            if j in held.owner:
                owner[i] = held.owner[j]
        held.clear()
        held.worker.update(worker)
        held.owner.update(owner)

    def _make_buffer(self) -> None:
        assert self._layout is not None
        layout = self._layout
        numel = sum(part.numel for part in self._parts)
        self.flat = torch.zeros(numel, dtype=torch.float32, device=layout.device)
        for part in self._parts:
            flat = self.flat[part.offset : part.offset + part.numel]
            shape, order = layout.params[part.ordinal].shape, layout.orders[part.ordinal]
            self.views[part.ordinal] = shaped(flat, shape, order)

    # ----------------------------------------------------------------- checkpoints

    def unsent(self, p: Tensor, order: tuple[int, ...]) -> Unsent:
        """A copy of a parameter's residuals."""
        result = Unsent.nothing(p, order, self.residuals.dtype)
        place = None if self._layout is None else self._layout.places.get(p)
        if place is None:
            return result
        flat, share = self.residuals.worker.get(place[0]), self.residuals.owner.get(place[0])
        if flat is not None:
            result.worker.copy_(shaped(flat, p.shape, order))
        if share is not None:
            whole = torch.zeros(p.numel(), dtype=share.values.dtype, device=share.values.device)
            whole[share.first : share.last] = share.values
            result.owner.copy_(shaped(whole, p.shape, order))
            span = [share.first, share.last, int(share.whole), digest_of(order)]
            result.span.copy_(torch.tensor(span, dtype=torch.int64, device="cpu"))
        return result

    def take(self, p: Tensor, unsent: Unsent) -> None:
        """Takes over a parameter's residuals."""
        assert self._layout is not None
        ordinal, dtype = self._layout.places[p][0], self.residuals.dtype
        order = self._layout.orders[ordinal]
        worker, (first, last, whole, digest) = unsent.worker, unsent.span.tolist()
        if first < last and digest != digest_of(order):
            # The elements of an owner's share are other ones in another order.
            worker, last = unsent.of_worker(self._ranks, self._rank).to(dtype), first
        if bool(worker.any()):
            self.residuals.worker[ordinal] = flattened(worker, order)
        if first < last:
            values = flattened(unsent.owner, order)[first:last].clone()
            self.residuals.owner[ordinal] = OwnerShare(first, values, bool(whole))

    # ----------------------------------------------------------------- a step

    def _plan(self, compressed: np.ndarray) -> tuple[BucketPlan, str]:
        """How the parameters travel, and the algorithm; the last plan is kept."""
        key = compressed.tobytes()
        if key in self._plans:
            return self._plans[key]
        squeeze = compressed & (self._codec is not None)
        codecs: list[Codec | None] = [
            self._codec if yes else Raw("float32" if momentum else dtype)
            for yes, momentum, dtype in zip(squeeze, compressed, self._dtypes, strict=True)
        ]
        ranks = self._ranks

        def plan_for(owners: int) -> BucketPlan:
            keeps = squeeze.tolist()
            return BucketPlan(self._parts, codecs, keeps, torch.float32, ranks, owners)

        plan, algorithm = plan_for(ranks), "all_gather"
        if ranks > 1:
            algorithm = choose_algorithm(self._algorithm, plan, ranks)
        if algorithm == "all_gather":
            plan = plan_for(1)
        self._plans = {key: (plan, algorithm)}
        return plan, algorithm

    def mean(
        self,
        comm: Communicator,
        call: Call,
        has_gradient: np.ndarray,
        compressed: np.ndarray,
        fill: Callable[[], None],
        counters: Counters,
    ) -> np.ndarray | None:
        """Replaces ``flat`` by its mean over the ranks.

        Parts that are not compressed travel in the type of their parameter. Residuals of
        parameters that no rank has a gradient for stay as they were, and all of them do where a
        value is not finite.

        Args:
            comm: The group's communicator.
            call: What the ranks must agree on.
            has_gradient: Which parts this rank has a gradient for.
            compressed: Which parts are compressed; equal on all ranks.
            fill: Writes this rank's values into ``views``.
            counters: Counts what is sent.

        Returns:
            Which parts any rank has a gradient for; ``None`` where a value of any rank is not
            finite.

        Raises:
            MismatchError: The ranks' calls differ.
            PydistError: A rank has a problem, or a collective failed.
        """
        try:
            if call.problem is not None:
                raise RuntimeError(call.problem)
            if len(self.views) < len(self._parts):
                self._make_buffer()
            fill()
            exchange, coder = self._set_out(comm, call, has_gradient, compressed)
        except Exception as error:  # out of memory, say
            comm.refuse(replace(call, problem=call.problem or str(error))).result()
            raise
        comm.submit(exchange)
        exchange.wait()
        counters.sent(exchange, self.raw_bytes, exchange.comm.world_size)
        if bool(coder.not_finite.any()):
            return None
        plan = coder.plan
        for section, feedback in zip(plan.sections, coder.feedback, strict=True):
            if feedback is not None:
                feedback.used = feedback.used_by_any = coder.used[section.indices]
                self.residuals.commit(section, plan.parts, feedback)
        return coder.used

    def _set_out(
        self, comm: Communicator, call: Call, has_gradient: np.ndarray, compressed: np.ndarray
    ) -> tuple[Exchange, _Coder]:
        plan, algorithm = self._plan(compressed)
        device = self.flat.device
        everyone = np.ones(len(plan.parts), dtype=bool)
        if device.type != "cpu":  # those of a checkpoint may be elsewhere
            for share in self.residuals.owner.values():
                share.values = share.values.to(comm.device(device))
        feedback: list[Feedback | None] = [
            self.residuals.section(
                section, plan.parts, everyone, owner=comm.rank if plan.owners > 1 else 0,
                devices=(device, comm.device(device)), staged=True,
            )
            if keeps else None
            for section, keeps in zip(plan.sections, plan.with_feedback, strict=True)
        ]  # fmt: skip
        coder = _Coder(
            plan, self.flat,
            Worker(comm.rank, comm.world_size, call.step, torch.get_num_threads()),
            mean=True, seed=self._seed, feedback=feedback, staged=True,
        )  # fmt: skip
        coder.used = has_gradient
        return Exchange(comm, coder, call, algorithm, device), coder

    def forget(self, ordinal: int, where: Tensor) -> None:
        """Drops the residuals of some elements of a parameter.

        Args:
            ordinal: The parameter.
            where: bool, in the parameter's memory order.
        """
        flat = where.as_strided((where.numel(),), (1,))
        held = self.residuals.worker.get(ordinal)
        if held is not None:
            held.masked_fill_(flat, 0)
        share = self.residuals.owner.get(ordinal)
        if share is not None:
            mine = flat[share.first : share.last].to(share.values.device)
            share.values.masked_fill_(mine, 0)

"""Means over the ranks of a list of tensors, compressed with error feedback on both sides.

What the 1-bit optimizers send: momenta, or raw gradients while they warm up, all in one call. The
road, the messages and the residuals are those of the DDP hook (:mod:`pydist.codecs.bucket_coder`,
:mod:`pydist.feedback`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pydist.codecs.base import Worker
from pydist.codecs.bucket_coder import BucketCoder, BucketPlan
from pydist.codecs.bucket_sections import Feedback
from pydist.codecs.coders import Codec
from pydist.codecs.raw import Raw
from pydist.codecs.shares import Part
from pydist.communicator import Call, Communicator
from pydist.feedback import Residuals
from pydist.optim.layout import any_rank_has, shaped, which_has
from pydist.road import Road, choose_algorithm


class _Coder(BucketCoder):
    """A bucket whose ranks tell each other which parameters they have a gradient for.

    Attributes:
        used: Which parts any rank has a gradient for; known when the call is complete.
    """

    used: np.ndarray

    def extra(self) -> Tensor | None:
        """One bit a part: does this rank have a gradient for it?"""
        return which_has(self.used)

    def merge_extra(self, extras: Tensor) -> None:
        """A part is used where any rank has a gradient for it."""
        self.used = any_rank_has(extras, len(self.plan.parts))
        for section, feedback in zip(self.plan.sections, self.feedback, strict=True):
            if feedback is not None:
                feedback.used_by_any = self.used[section.indices]


class Exchange:
    """Averages tensors over the ranks, some raw and some compressed.

    Args:
        comm: The group's communicator.
        params: All parameters; a parameter's place here is its ordinal.
        codec: What is compressed is compressed with this; ``None`` sends everything raw.
        seed: Seed of stochastic rounding.
        algorithm: As of :func:`pydist.all_reduce`.
        residual_dtype: float32 or bfloat16.

    Attributes:
        residuals: What was not sent yet, by ordinal.
        flat: The buffer of all parameters, float32, each in its memory order.
        views: Each parameter's part of it, with the parameter's shape and strides.
    """

    def __init__(
        self,
        comm: Communicator,
        params: Sequence[Tensor],
        codec: Codec | None,
        seed: int,
        algorithm: str,
        residual_dtype: torch.dtype,
    ) -> None:
        self._comm, self._codec, self._seed, self._algorithm = comm, codec, seed, algorithm
        self.residuals = Residuals(residual_dtype, comm.world_size, mean=True)
        self._parts: list[Part] = []
        self._plans: dict[bytes, tuple[BucketPlan, str]] = {}
        self.cover(params)

    def cover(self, params: Sequence[Tensor]) -> None:
        """Takes further parameters in; ordinals of the old ones stay."""
        ends = np.cumsum([p.numel() for p in params], dtype=np.int64).tolist()
        self._parts = [
            Part(i, end - p.numel(), p.numel())
            for i, (p, end) in enumerate(zip(params, ends, strict=True))
        ]
        self._dtypes = [str(p.dtype)[6:] for p in params]
        self._plans.clear()
        self.flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device)
        self.views = [
            shaped(self.flat[part.offset : part.offset + part.numel], p)
            for part, p in zip(self._parts, params, strict=True)
        ]

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
        ranks = self._comm.world_size

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
        call: Call,
        has_gradient: np.ndarray,
        compressed: np.ndarray,
        fill: Callable[[], None],
    ) -> np.ndarray | None:
        """Replaces ``flat`` by its mean over the ranks.

        Parts that are not compressed travel in the type of their parameter. Residuals of
        parameters that no rank has a gradient for stay as they were, and all of them do where a
        value is not finite.

        Args:
            call: What the ranks must agree on.
            has_gradient: Which parts this rank has a gradient for.
            compressed: Which parts are compressed; equal on all ranks.
            fill: Writes this rank's values into ``views``.

        Returns:
            Which parts any rank has a gradient for; ``None`` where a value of any rank is not
            finite.

        Raises:
            MismatchError: The ranks' calls differ.
            PydistError: A rank has a problem, or a collective failed.
        """
        try:
            if call.problem is None:
                fill()
            road, coder = self._set_out(call, has_gradient, compressed)
        except Exception as error:  # out of memory, say
            self._comm.refuse(replace(call, problem=call.problem or str(error))).result()
            raise
        self._comm.submit(road)
        road.wait()
        if bool(coder.not_finite.item()):
            return None
        plan = coder.plan
        for section, feedback in zip(plan.sections, coder.feedback, strict=True):
            if feedback is not None:
                feedback.used = feedback.used_by_any = coder.used[section.indices]
                self.residuals.commit(section, plan.parts, feedback)
        return coder.used

    def _set_out(
        self, call: Call, has_gradient: np.ndarray, compressed: np.ndarray
    ) -> tuple[Road, _Coder]:
        if call.problem is not None:
            raise RuntimeError(call.problem)
        plan, algorithm = self._plan(compressed)
        comm, device = self._comm, self.flat.device
        everyone = np.ones(len(plan.parts), dtype=bool)
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
        return Road(comm, coder, call, algorithm, device), coder

    def forget(self, ordinal: int, where: Tensor) -> None:
        """Drops the residuals of some elements of a parameter.

        Args:
            ordinal: The parameter.
            where: bool, with the parameter's strides.
        """
        flat = where.as_strided((where.numel(),), (1,))
        held = self.residuals.worker.get(ordinal)
        if held is not None:
            held.masked_fill_(flat, 0)
        share = self.residuals.owner.get(ordinal)
        if share is not None:
            mine = flat[share.first : share.last].to(share.values.device)
            share.values.masked_fill_(mine, 0)

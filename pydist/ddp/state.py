"""The state of the DDP hook: what is kept from bucket to bucket and from step to step."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket

from pydist.codecs.base import Worker
from pydist.codecs.bucket_coder import BucketCoder
from pydist.codecs.bucket_sections import Feedback
from pydist.codecs.coders import Codec
from pydist.collectives import refuse
from pydist.communicator import Call, Communicator, communicator
from pydist.ddp import checkpoint, local
from pydist.ddp.buffers import result_of, spoiled, values_of
from pydist.ddp.layout import Layout, Layouts, Parameters
from pydist.ddp.options import LOCAL, Exclude, Options
from pydist.ddp.prepare import Prepared, StepOf, clip_limit
from pydist.ddp.schedule import Schedule
from pydist.ddp.stats import Stats
from pydist.errors import PydistError
from pydist.feedback import Residuals
from pydist.momentum import Momenta
from pydist.road import Road
from pydist.series import Series
from pydist.training.advice import Advice

logger = logging.getLogger("pydist.ddp")


@dataclass
class _InFlight:
    """A bucket on its way, and afterwards what became of it."""

    road: Road
    coder: BucketCoder


class CompressionState:
    """What :func:`compression_hook` keeps: options, residuals, counters.

    Construction is collective: all ranks of ``group`` make a state, with equal arguments, in the
    same order as other collective calls of the group.

    Args:
        codec: A codec such as ``pydist.QSGD(bits=4)`` for all parameters, or a dict from patterns
            (``fnmatch``, on the parameter's name) to codecs: the first that matches counts,
            ``None`` and no match travel raw; or a :class:`pydist.ddp.Schedule` of either.
        error_feedback: ``"auto"``: residuals where they help (:func:`pydist.feedback.contracts`);
            ``True`` or ``False``: for all codecs, or for none; ``"worker"``: as ``True``, but
            without the residuals of what is encoded again after the reduction.
        warmup_steps: Steps at first in which everything travels raw.
        min_numel: Parameters with fewer elements travel raw.
        exclude: Patterns of names, or a predicate ``(name, parameter) -> bool``, of parameters that
            travel raw.
        group: The process group of the DDP model; default the world.
        seed: Seed of stochastic rounding, 0 … 2**32 - 1.
        scaler: The ``torch.amp.GradScaler`` that scales the loss: residuals then follow its scale.
            Otherwise call :meth:`rescale` when the scale changes.
        exact_skip: A step with a NaN or an infinity on any rank leaves no trace: residuals and step
            number stay as they were, in all buckets. Takes a second buffer of residuals.
        op: ``"mean"`` (as DDP without a hook) or ``"sum"`` over the ranks.
        algorithm: As of :func:`pydist.all_reduce`.
        residual_dtype: float32, or bfloat16 for half the memory.
        named_parameters: ``model.named_parameters()``, with or without ``"module."`` in front.
            Needed for patterns and for checkpoints by name. Without it parameters are numbered in
            the order in which the first backward hands them out, which is the same on all ranks and
            in every run of the same model with the same bucket sizes.
        momentum: Momentum correction (DGC, arXiv 1712.01887): workers apply this momentum, 0 <= m <
            1, before they compress, with momentum factor masking for ``TopK``
            (:mod:`pydist.momentum`). The optimizer must then have none.
        clip_norm: Local gradient clipping (DGC): before momentum and residuals are added, each
            parameter's gradient is scaled down where it is longer than
            :func:`pydist.ddp.prepare.clip_limit` of this; without loss scale. ``None``: never.
        local_after: Post-local SGD: from this step on gradients are not compressed, but stay on the
            rank, or in ``subgroup``; average parameters then. ``None``: never.
        subgroup: Ranks whose mean, uncompressed, gradients are after ``local_after`` steps.
        error_every: Steps from one measurement of ``stats()["compression_error"]`` to the next;
            0: none.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument is out of range, error feedback was forced where it diverges, or
            parameters are chosen by name and there are no names.
        MismatchError: Ranks gave different arguments; raised on every rank.
        PydistError: Another rank has a problem.
    """

    def __init__(
        self,
        codec: Codec | Mapping[str, Codec | None] | Schedule,
        *,
        error_feedback: str | bool = "auto",
        warmup_steps: int = 0,
        min_numel: int = 1024,
        exclude: Exclude | None = None,
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
        scaler: torch.amp.GradScaler | None = None,
        exact_skip: bool = False,
        op: str = "mean",
        algorithm: str = "auto",
        residual_dtype: torch.dtype = torch.float32,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        momentum: float = 0.0,
        clip_norm: float | None = None,
        local_after: int | None = None,
        subgroup: dist.ProcessGroup | None = None,
        error_every: int = 100,
    ) -> None:
        self._comm: Communicator = communicator(group)
        self.group = group
        self.scaler, self.subgroup = scaler, subgroup
        self.step = 0
        self.stats_of = Stats()
        self._in_flight: list[_InFlight] = []
        self._step_of = StepOf()
        self._open = False  # inside a step: its last bucket has not come by
        self._unsettled = False  # a step is over, and what became of it was not looked at
        self._series = Series()  # the buckets of this step
        self._failure: PydistError | None = None
        self._lock = threading.Lock()
        self._scale: float | None = None
        self._rescaled = 1.0  # what rescale() has multiplied the loss scale by
        try:
            local.check_subgroup(subgroup)
            self.options = Options(
                codec, error_feedback, warmup_steps, min_numel, exclude, seed, op, algorithm,
                residual_dtype, exact_skip, momentum, clip_norm, local_after, subgroup is not None,
                error_every,
            )  # fmt: skip
            self.parameters = Parameters(named_parameters)
            if self.options.needs_names and not self.parameters.named:
                raise ValueError(
                    "named_parameters must be given where parameters are chosen by name "
                    "(codec={pattern: codec}, exclude); or use pydist.ddp.compress(model, codec)"
                )
        except Exception as error:
            # The other ranks are about to wait for this one.
            refuse(self._comm, Call("CompressionState", {}, problem=str(error)))
            raise
        ranks = self._comm.world_size
        self.residuals = Residuals(residual_dtype, ranks, op == "mean")
        self.momenta = Momenta(momentum, residual_dtype)
        self.layouts = Layouts(self.options, self.parameters, ranks)
        call = Call(
            "CompressionState",
            {"world_size": ranks, **self.options.described(), **self.parameters.described()},
        )
        self._comm.run(lambda: self._comm.agree(call))

    @property
    def communicator(self) -> Communicator:
        """The group's communicator, with its traffic counters."""
        return self._comm

    # ----------------------------------------------------------------- a bucket

    def reduce_bucket(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Sends a bucket on its way; :func:`compression_hook` calls it.

        Returns:
            A future of the bucket's buffer, which then holds the result. It is also completed when
            something went wrong: the buffer is then NaN, and backward raises at its end.
        """
        if not isinstance(bucket, GradBucket):
            raise TypeError(
                f"bucket must be a GradBucket, got {type(bucket).__name__}: the Python reducer of "
                "compiled autograd is not supported; compile the model, not its backward"
            )
        if not self._open:
            self._begin_step()
        if self.options.stage(self.step) == LOCAL:
            return self._reduce_locally(bucket)
        buffer = bucket.buffer()
        device = buffer.device
        future: torch.futures.Future[Tensor] = torch.futures.Future(
            devices=[device] if device.type == "cuda" else []
        )
        number, last = self.step, bucket.is_last()
        in_backward = self._raise_after_backward()
        try:
            sent = self._start(bucket, buffer, number)
        except Exception as error:
            sent = None
            self._refuse(bucket, number, error)
        if sent is None:
            future.set_result(spoiled(buffer))
        else:
            self._in_flight.append(sent)
            sent.road.future.add_done_callback(lambda _: self._complete(sent, buffer, future))
        if last:
            self._open, self._unsettled = False, True
        if not in_backward:  # under DDP.join(), where there is no backward that could raise
            future.wait()
            self._raise_failure()
        return future

    def _begin_step(self) -> None:
        self._settle()
        if self.scaler is not None:
            scale = float(self.scaler.get_scale())
            if self._scale is not None and scale != self._scale:
                self._multiply(scale / self._scale)
            self._scale = scale
        self._open, self._series = True, Series()

    def _prepare(self, bucket: GradBucket, flat: Tensor) -> tuple[Layout, Prepared]:
        options, comm = self.options, self._comm
        stage = options.stage(self.step)
        layout = self.layouts.of(bucket, flat, stage)
        limit = None
        if options.clip_norm is not None:
            scale = self._rescaled if self.scaler is None or self._scale is None else self._scale
            # In local steps the result is the mean of fewer ranks, or of this one alone.
            ranks = local.size(self.subgroup) if stage == LOCAL else comm.world_size
            limit = clip_limit(options.clip_norm, ranks, options.op == "mean", scale)
        every = options.error_every
        prepared = Prepared(
            layout, flat, self.residuals, self.momenta, limit=limit, rank=comm.rank,
            measured=every > 0 and self.step % every == 0,
        )  # fmt: skip
        self._step_of.add(prepared)
        return layout, prepared

    def _start(self, bucket: GradBucket, buffer: Tensor, number: int) -> _InFlight:
        flat = values_of(buffer)
        layout, prepared = self._prepare(bucket, flat)
        fields: dict[str, Any] = {"bucket": bucket.index(), "layout": layout.digest}
        if not layout.agreed:
            fields |= {"numel": flat.numel(), **layout.fields}
        plan, comm = layout.plan, self._comm
        staged = self.options.exact_skip
        feedback: list[Feedback | None] = [None] * len(plan.sections)
        if any(plan.with_feedback):
            owner = (comm.rank if plan.owners > 1 else 0) if self.options.owner_feedback else None
            feedback = [
                self.residuals.section(
                    section, plan.parts, prepared.used, owner=owner,
                    devices=(flat.device, comm.device(flat.device)), staged=staged,
                    momenta=prepared.advanced,
                )
                if keeps else None
                for section, keeps in zip(plan.sections, plan.with_feedback, strict=True)
            ]  # fmt: skip
        coder = BucketCoder(
            plan, flat, Worker(comm.rank, comm.world_size, number, torch.get_num_threads()),
            mean=self.options.op == "mean", seed=self.options.seed, feedback=feedback,
            staged=staged,
        )  # fmt: skip
        call = Call("compression_hook", fields, number)
        road = Road(comm, coder, call, layout.algorithm, flat.device, self._series)
        comm.submit(road)
        self.stats_of.sent(layout.choices, plan, flat)
        layout.agreed = True
        return _InFlight(road, coder)

    def _reduce_locally(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """A bucket's step of post-local SGD: nothing is compressed, nobody is asked."""
        buffer = bucket.buffer()
        in_backward = self._raise_after_backward()
        flat = values_of(buffer)
        try:
            layout, _ = self._prepare(bucket, flat)
            self.stats_of.sent(layout.choices, layout.plan, flat)
            self.stats_of.wire_bytes += local.bytes_sent(self.subgroup, flat)
        except Exception as error:  # the subgroup is waiting: it gets a NaN from here
            self._failed(error)
            flat.fill_(float("nan"))
        # Residuals that were released must arrive; without any there is nothing to look after.
        left = self.residuals.worker or self.residuals.owner
        watch = self._step_of.watch if left else None
        future = local.mean_in(self.subgroup, flat, buffer, watch)
        if bucket.is_last():
            self._open, self._unsettled = False, True
        if not in_backward:
            future.wait()
            self._raise_failure()
        return future

    def _refuse(self, bucket: GradBucket, number: int, error: Exception) -> None:
        """Tells the other ranks, in this bucket's place; all then raise after backward.

        Raising here instead would leave them waiting for this rank's next buckets.
        """
        call = Call("compression_hook", {"bucket": bucket.index()}, number, problem=str(error))
        try:
            self._comm.refuse(call, series=self._series).result()
            self._failed(error)
        except PydistError as refused:
            self._failed(refused if not isinstance(error, PydistError) else error)

    def _complete(
        self, sent: _InFlight, buffer: Tensor, future: torch.futures.Future[Tensor]
    ) -> None:
        """Runs when a bucket's job is over, in the thread that ended it."""
        result = buffer
        try:
            error = sent.road.future.exception()
            with sent.road.stream():
                if error is not None:
                    self._failed(error)
                    result = spoiled(buffer)
                    return
                result = result_of(buffer, sent.coder.bucket.flat)
        except BaseException as error:  # backward must not wait for ever
            self._failed(error)
        finally:
            with sent.road.stream():
                future.set_result(result)

    # ----------------------------------------------------------------- failures

    def _failed(self, error: BaseException) -> None:
        with self._lock:
            if self._failure is None:
                self._failure = error if isinstance(error, PydistError) else PydistError(str(error))

    def _raise_failure(self) -> None:
        """At the end of backward: raises what went wrong; else momenta have moved."""
        with self._lock:
            failure, self._failure = self._failure, None
        if failure is not None:
            self._open, self._unsettled = False, False
            self._in_flight.clear()
            self._step_of = StepOf()
            self.layouts.agree_again()
            raise failure
        if self._unsettled and not self.options.exact_skip:
            self._step_of.take()  # no bucket was refused; frees the old momenta already here

    def _raise_after_backward(self) -> bool:
        """Lets backward raise what went wrong, once DDP is through; False outside of backward."""
        engine: Any = torch.autograd.Variable._execution_engine
        try:
            # DDP queues its own last callback after this hook returns; one more turn puts ours
            # behind it.
            engine.queue_callback(lambda: engine.queue_callback(self._raise_failure))
        except RuntimeError:
            return False
        return True

    # ----------------------------------------------------------------- the end of a step

    def _settle(self) -> None:
        """Looks at what became of the last step: counts it, keeps or drops what it staged."""
        if not self._unsettled:
            return
        self._unsettled = False
        sent, self._in_flight = self._in_flight, []
        step_of, self._step_of = self._step_of, StepOf()
        for one in sent:
            one.road.wait()
        bad = self.stats_of.step_over([(one.road, one.coder) for one in sent])
        if self.options.exact_skip:
            if bool(bad):
                return  # as if the step had never been: its number is given to the next one
            for one in sent:
                plan = one.coder.plan
                for section, feedback in zip(plan.sections, one.coder.feedback, strict=True):
                    if feedback is not None:
                        self.residuals.commit(section, plan.parts, feedback)
        step_of.take()
        step_of.forget(bad)
        lost = step_of.lost()
        if lost and not bool(bad):
            self.stats_of.measured(lost, self.step)
        self.step += 1

    def _multiply(self, ratio: float) -> None:
        self.residuals.rescale(ratio)
        self.momenta.rescale(ratio)

    def rescale(self, ratio: float) -> None:
        """Follows a loss scale that was multiplied by ``ratio``, where there is no ``scaler``.

        Raises:
            ValueError: ``ratio`` is not a positive number.
        """
        if not 0 < ratio < float("inf"):
            raise ValueError(f"ratio must be positive and finite, got {ratio}")
        self._settle()
        self._multiply(ratio)
        self._rescaled *= ratio

    # ----------------------------------------------------------------- what is known

    def stats(self) -> dict[str, Any]:
        """What was sent so far and what it cost; see ``docs/ddp.md`` for the entries."""
        self._settle()
        return self.stats_of.summary(self._comm, self.residuals, self.momenta, self.step)

    def advice(self) -> Advice:
        """Whether DDP's ``bucket_cap_mb`` suits the messages of the last step, and what would."""
        self._settle()
        return self.stats_of.advice()

    def log(self, writer: Any, step: int | None = None, prefix: str = "pydist") -> None:
        """Writes scalars to a TensorBoard ``SummaryWriter``, or to what has its ``add_scalar``."""
        for name, value in self.stats_of.scalars(self.stats()).items():
            writer.add_scalar(f"{prefix}/{name}", value, self.step if step is None else step)

    def log_summary(self) -> None:
        """Writes one line to the logger ``pydist.ddp``, level INFO."""
        line, advice = self.stats_of.line(self.stats()), self.advice()
        logger.info(line + (f"; {advice}" if advice.verdict in ("larger", "smaller") else ""))

    # ----------------------------------------------------------------- checkpoint

    @property
    def scale(self) -> float | None:
        """The loss scale that the residuals follow, where there is a scaler."""
        return self._scale

    @property
    def rescaled(self) -> float:
        """What :meth:`rescale` has multiplied the loss scale by so far."""
        return self._rescaled

    def restore(self, step: int, scale: float | None, rescaled: float) -> None:
        """Takes over step and loss scale of a checkpoint."""
        self.step, self._scale, self._rescaled = step, scale, rescaled

    def sharded(self, saved_world_size: int | None = None) -> checkpoint.Sharded:
        """The state as torch.distributed.checkpoint takes it.

        Args:
            saved_world_size: Ranks that saved what is to be loaded, where it was another number
                (:func:`pydist.ddp.saved_world_size`).

        Raises:
            ValueError: The parameters have no names (on use).
        """
        self._settle()
        return checkpoint.Sharded(self, saved_world_size)

    def state_dict(self) -> dict[str, Any]:
        """This rank's residuals by parameter name, for ``torch.save``; ranks differ.

        Save one file a rank (``weights_only=True`` reads it), or see :meth:`sharded`.
        """
        self._settle()
        return checkpoint.state_dict(self)

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Restores what :meth:`state_dict` gave.

        Args:
            state: This rank's own state, saved by the same rank of as many; or the states of all
                ranks of a world of any size, in rank order.

        Raises:
            ValueError: The state is of another world size or rank, of other parameters, or of
                different steps.
        """
        self._settle()
        checkpoint.load_state_dict(self, state)

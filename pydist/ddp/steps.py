"""A step of the DDP hook: its buckets on their way, what goes wrong, what it leaves behind."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket

from pydist.ddp import local
from pydist.ddp.accumulation import Accumulation
from pydist.ddp.carriers import Carrier, Sending
from pydist.ddp.layout import Layout, Layouts
from pydist.ddp.loss_scale import LossScale
from pydist.ddp.parameters import Parameters
from pydist.ddp.prepare import Earlier, Prepared, StepOf, clip, clip_limit
from pydist.ddp.stats import Stats
from pydist.encoding.bucket import BucketCoder, Feedback
from pydist.errors import PydistError
from pydist.training.buffers import filled_with_nan, result_of, values_of
from pydist.training.damage import LOOK_EVERY
from pydist.training.kept import Kept, Memory
from pydist.training.options import LOCAL
from pydist.training.reducer import in_backward
from pydist.training.replicas import checksums
from pydist.transport.coder import Worker
from pydist.transport.communicator import Call

PATIENCE = 30.0
"""Seconds that a reader in another thread waits for the end of a step."""


@dataclass
class _InFlight:
    """A bucket on its way, and afterwards what became of it."""

    sending: Sending
    encoded: _Encoded
    layout: Layout
    flat: Tensor
    earlier: Earlier


class _Encoded:
    """A bucket, or this rank's share of a node's sums, from when it is encoded.

    Attributes:
        prepared: What enters its coder.
        coder: Its coder.
    """

    prepared: Prepared
    coder: BucketCoder

    def __init__(
        self, steps: Steps, layout: Layout, step_of: StepOf, accumulation: Accumulation | None
    ) -> None:
        self._steps, self._layout, self._of = steps, layout, (step_of, accumulation)

    def __call__(self, flat: Tensor, worker: Worker) -> BucketCoder:
        """Prepares what is in the buffer of a layout's plan, and makes its coder.

        Raises:
            PydistError: The step was abandoned (Ctrl-C): what is kept may be another's now.
        """
        steps, options = self._steps, self._steps.kept.options
        if not steps.is_open(self._of[0]):
            raise PydistError("the step was abandoned")
        self.prepared = steps.prepare(self._layout, flat, *self._of)
        self.coder = BucketCoder(
            self._layout.plan, flat, worker, mean=options.op == "mean", seed=options.seed,
            feedback=steps.feedback(self._layout, flat, self.prepared), staged=options.exact_skip,
            usage=self.prepared.usage,
        )  # fmt: skip
        return self.coder


class Steps:
    """Takes the buckets of step after step, for one group of ranks.

    Args:
        carrier: How buckets travel.
        kept: What the state keeps.
        parameters: The model's.
        stats: The state's counters.
        scaler: Whose loss scale the residuals follow.
        subgroup: Ranks whose mean gradients are in local steps.
        optimizer_steps: How many steps the optimizers of the parameters have made; ``None``: nobody
            counts them.
    """

    def __init__(
        self,
        carrier: Carrier,
        kept: Kept,
        parameters: Parameters,
        stats: Stats,
        scaler: torch.amp.GradScaler | None,
        subgroup: dist.ProcessGroup | None,
        optimizer_steps: Callable[[], int] | None = None,
    ) -> None:
        self.carrier, self.kept, self.stats = carrier, kept, stats
        self.device_type = ""  # of the buckets, once one has come
        self._parameters = parameters
        self._options, self._subgroup = kept.options, subgroup
        self.scale = None if scaler is None else LossScale(scaler)
        self.layouts = Layouts(kept.options, parameters, carrier.levels, kept.arrange)
        self.accumulation = Accumulation() if kept.options.counts_steps else None
        self._open = False  # inside a step: its last bucket has not come by
        self._unsettled = False  # a step is over, and what became of it was not looked at
        self._in_flight: list[_InFlight] = []
        self._step_of = StepOf()
        self._call_groups = carrier.call_groups()  # the buckets of this step
        self._before: Memory | None = None  # what there was when the step began, to return to
        self._damage = ""  # what no step can go on with
        self._looked = 0  # non-finite steps when damage was last looked for, on CUDA
        self._optimizer_steps, self._steps_then = optimizer_steps, 0
        self._warned, self._last_finite = False, False
        self._failure: PydistError | None = None
        self._lock = threading.Lock()
        self._changes = threading.Condition(threading.RLock())
        self._thread = 0

    # ----------------------------------------------------------------- a bucket

    def reduce_bucket(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Sends a bucket on its way.

        Returns:
            A future of the bucket's buffer, which then holds the result. It is also completed when
            something went wrong: the buffer is then NaN, and backward raises at its end.
        """
        running = self._finish_after_backward()
        if not self._open:
            self._begin()
        reduce = self._reduce_locally if self._is_local else self._reduce
        future = reduce(bucket, running)
        if bucket.is_last():
            with self._changes:
                self._open, self._unsettled = False, True
                self._changes.notify_all()
        if not running:  # under DDP.join(), where there is no backward that could raise
            future.wait()
            self._finish()
        return future

    def is_open(self, step_of: StepOf) -> bool:
        """Whether a step has neither ended nor been abandoned."""
        return step_of is self._step_of

    @property
    def _is_local(self) -> bool:
        return self._options.stage(self.kept.step) == LOCAL

    def _begin(self) -> None:
        self._settle()
        with self._changes:
            kept = self.kept
            if self.scale is not None:
                scale = self.scale.value()
                if kept.scale is not None and scale != kept.scale:
                    kept.multiply(scale / kept.scale)
                kept.scale = scale
            self._open, self._thread = True, threading.get_ident()
            self._call_groups = self.carrier.call_groups()
            if self._options.exact_skip:
                again = self.accumulation is not None and self.accumulation.continues
                if again and self._before is not None:
                    kept.residuals.spare()  # what there was before the step's first backward
                else:
                    self._before = kept.memory()

        if self._options.momentum and self.accumulation is not None:
            self._warn_of_discarded(self.accumulation)

    def _warn_of_discarded(self, accumulation: Accumulation) -> None:
        """Warns where reduced gradients were zeroed and no optimizer had made a step with them."""
        zeroed, accumulation.zeroed = accumulation.zeroed, False
        if self._warned or not zeroed or self._optimizer_steps is None:
            return
        if 0 < self._optimizer_steps() == self._steps_then and self._last_finite:
            self._warned = True
            warnings.warn(
                f"momentum={self._options.momentum}: gradients were reduced and then zeroed "
                "without a step of the optimizer, and the momentum has them now. Run a backward "
                "whose gradients are not wanted (of a GAN's generator, through the discriminator) "
                "under no_sync(), on ddp.module, or after requires_grad_(False)",
                stacklevel=2,
            )

    def _reduce(self, bucket: GradBucket, running: bool) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        future: torch.futures.Future[Tensor] = torch.futures.Future(
            devices=[buffer.device] if buffer.device.type == "cuda" else []
        )
        try:
            sent = self._start(bucket, buffer, running)
        except Exception as error:
            self._refuse(bucket, error)
            future.set_result(filled_with_nan(buffer))
            return future
        self._in_flight.append(sent)
        once = [sent]  # a future holds its callbacks, and what is sent its future
        sent.sending.call.future.add_done_callback(
            lambda _: self._complete(once.pop(), buffer, future)
        )
        return future

    def _lay_out(
        self, bucket: GradBucket, flat: Tensor, accumulation: Accumulation | None
    ) -> tuple[Layout, Earlier]:
        """The layout of a bucket, whose gradients become this backward's own, and are clipped."""
        options, kept = self._options, self.kept
        stage = options.stage(kept.step)
        layout = self.layouts.of(bucket, flat, stage)
        if self.accumulation is not None and not layout.watched:
            ordinals = [part.ordinal for part in layout.parts]
            layout.watched = self.accumulation.watch(ordinals, bucket.parameters())
        earlier = Earlier(layout, flat, accumulation)
        if options.clip_norm is not None:
            scale = kept.rescaled if self.scale is None or kept.scale is None else kept.scale
            # In local steps the result is the mean of fewer ranks, or of this one alone.
            ranks = local.size(self._subgroup) if stage == LOCAL else self.carrier.ranks
            limit = clip_limit(options.clip_norm, ranks, options.op == "mean", scale)
            clip(flat, layout.parts, limit)
        return layout, earlier

    def prepare(
        self, layout: Layout, flat: Tensor, step_of: StepOf, accumulation: Accumulation | None
    ) -> Prepared:
        """Adds momentum, and what is left of residuals, to what is in a buffer."""
        kept, every = self.kept, self._options.error_every
        prepared = Prepared(
            layout, flat, kept.residuals, kept.momenta, rank=self.carrier.levels.node,
            measured=every > 0 and kept.step % every == 0,
            earlier=accumulation,
        )  # fmt: skip
        step_of.add(prepared)
        return prepared

    def _start(self, bucket: GradBucket, buffer: Tensor, running: bool) -> _InFlight:
        if self._damage:
            raise ValueError(self._damage)
        flat = values_of(buffer)
        accumulation = self.accumulation if running else None
        layout, earlier = self._lay_out(bucket, flat, accumulation)
        fields: dict[str, Any] = {"bucket": bucket.index(), "layout": layout.digest}
        if not layout.agreed:
            fields |= {"numel": flat.numel(), **layout.fields}
        if self.kept.loaded and bucket.index() == 0:
            fields["loaded state"] = self.kept.shared_digest()
        every = self._options.replica_check_every
        if every and self.kept.step % every == 0:
            names = [self._parameters.name_of(part.ordinal) for part in layout.parts]
            fields |= checksums(names, bucket.parameters())
        known = fields.keys() == {"bucket", "layout"}
        call = Call("compression_hook", fields, self.kept.step, known=known)
        encoded = _Encoded(self, layout, self._step_of, accumulation)
        sending = self.carrier.start(call, layout, flat, encoded, self._call_groups)
        self.stats.sent(layout, flat, self.carrier.ranks, first=bucket.index() == 0)
        layout.agreed = True
        return _InFlight(sending, encoded, layout, flat, earlier)

    def feedback(self, layout: Layout, flat: Tensor, prepared: Prepared) -> list[Feedback | None]:
        """Where the residuals of each section are."""
        plan, node = layout.plan, self.carrier.levels.node
        if not any(plan.with_feedback):
            return [None] * len(plan.sections)
        owner = (node if plan.owners > 1 else 0) if self._options.owner_feedback else None
        devices = flat.device, self.carrier.messages_on(flat.device)
        return [
            self.kept.residuals.section(
                section, plan.parts, prepared.used, owner=owner, devices=devices,
                staged=self._options.exact_skip, momenta=prepared.advanced,
            )
            if keeps else None
            for section, keeps in zip(plan.sections, plan.with_feedback, strict=True)
        ]  # fmt: skip

    def _reduce_locally(self, bucket: GradBucket, running: bool) -> torch.futures.Future[Tensor]:
        """A bucket's step of post-local SGD: nothing is compressed, nobody is asked."""
        buffer = bucket.buffer()
        flat, layout, earlier = values_of(buffer), None, None
        try:
            accumulation = self.accumulation if running else None
            layout, earlier = self._lay_out(bucket, flat, accumulation)
            self.prepare(layout, flat, self._step_of, accumulation)
            self.stats.sent(layout, flat, self.carrier.ranks, first=bucket.index() == 0)
            self.stats.wire_bytes += local.bytes_sent(self._subgroup, flat)
        except Exception as error:  # the subgroup is waiting: it gets a NaN from here
            self._failed(error)
            flat.fill_(float("nan"))
        # Residuals that were released must arrive; without any there is nothing to look after.
        left = any(x.numel() for x in self.kept.residuals.tensors())
        watch = self._step_of.watch if left else None

        def arrived(flat: Tensor) -> None:
            if watch is not None:
                watch(flat)
            if layout is not None and earlier is not None:
                earlier.put_back()
                layout.hand_back(flat)

        return local.mean_in(self._subgroup, flat, buffer, arrived)

    def _refuse(self, bucket: GradBucket, error: Exception) -> None:
        """Tells the other ranks, in this bucket's place; all then raise after backward.

        Raising here instead would leave them waiting for this rank's next buckets.
        """
        fields, number = {"bucket": bucket.index()}, self.kept.step
        call = Call("compression_hook", fields, number, problem=str(error))
        try:
            self.carrier.refuse(call, self._call_groups)
            self._failed(error)
        except PydistError as refused:
            self._failed(refused if not isinstance(error, PydistError) else error)

    def _complete(
        self, sent: _InFlight, buffer: Tensor, future: torch.futures.Future[Tensor]
    ) -> None:
        """Runs when a bucket's job is over, in the thread that ended it."""
        result = buffer
        try:
            error = sent.sending.call.future.exception()
            with sent.sending.call.stream():
                if error is not None:
                    self._failed(error)
                    result = filled_with_nan(buffer)
                    return
                sent.earlier.put_back()
                sent.layout.hand_back(sent.flat)
                result = result_of(buffer, sent.flat)
        except BaseException as error:  # backward must not wait for ever
            self._failed(error)
        finally:
            with sent.sending.call.stream():
                future.set_result(result)

    # ----------------------------------------------------------------- the end of a step

    def _failed(self, error: BaseException) -> None:
        with self._lock:
            if self._failure is None:
                self._failure = error if isinstance(error, PydistError) else PydistError(str(error))

    def _finish_after_backward(self) -> bool:
        """Lets backward end with :meth:`_finish`, once DDP is through; False outside of one."""
        engine: Any = torch.autograd.Variable._execution_engine

        def before_ddp() -> None:
            self._await()
            engine.queue_callback(self._finish)

        try:
            # DDP queues its own last callback after its hook returns; one more turn puts ours
            # behind it.
            engine.queue_callback(before_ddp)
        except RuntimeError:
            return False
        return True

    def _await(self) -> None:
        """Waits for the buckets on their way; DDP would, too, but deaf to Ctrl-C."""
        try:
            concurrent.futures.wait([one.sending.call.future for one in self._in_flight])
        except BaseException:  # of a signal's handler
            self._abandon()
            raise

    def _abandon(self) -> None:
        """Forgets the step that is under way."""
        if self._options.exact_skip and self._before is not None:
            self.kept.take_back(self._before)
        self.reset()

    def _finish(self) -> None:
        """At the end of backward: raises what went wrong; else the step is settled."""
        try:
            self.carrier.catch_up()
        except PydistError as error:
            self._failed(error)
        with self._lock:
            failure, self._failure = self._failure, None
        if failure is not None:
            self._abandon()
            raise failure
        if self._unsettled:
            self._settle()
            if self.accumulation is not None:
                self.accumulation.reduced()
            if self._optimizer_steps is not None:
                self._steps_then = self._optimizer_steps()

    def reset(self) -> None:
        """Forgets a step that will not be ended."""
        with self._changes:
            self._open = self._unsettled = False
            self._in_flight, self._step_of, self._before = [], StepOf(), None
            self._changes.notify_all()
        self.layouts.agree_again()
        if self.accumulation is not None:
            self.accumulation.forget()

    def _settle(self) -> None:
        """Looks at what became of the last step: counts it, keeps or drops what it staged."""
        if not self._unsettled:
            return
        with self._changes:
            self._unsettled = False
            sent, self._in_flight = self._in_flight, []
            step_of, self._step_of = self._step_of, StepOf()
            for one in sent:
                one.sending.call.wait()
            bad = self.stats.step_over([(one.sending, one.encoded.coder, one.flat) for one in sent])
            self.kept.loaded = False
            self._last_finite = not isinstance(bad, Tensor) and not bad
            self._drop_damage(bad)
            if self._options.exact_skip and bool(bad):
                assert self._before is not None
                # As if the step had never been: its number is given to the next one.
                self.kept.take_back(self._before)
                self._before = self.kept.memory()
            else:
                self._take(sent, step_of, bad)
            self._changes.notify_all()

    def _take(self, sent: list[_InFlight], step_of: StepOf, bad: bool | Tensor) -> None:
        """Takes over what a step leaves."""
        if self._options.exact_skip:
            for coder in [one.encoded.coder for one in sent]:
                plan = coder.plan
                for section, feedback in zip(plan.sections, coder.feedback, strict=True):
                    if feedback is not None:
                        feedback.learn(section.indices, coder.usage)
                        self.kept.residuals.commit(section, plan.parts, feedback)
        step_of.take()
        step_of.forget(bad)
        lost = step_of.lost()
        if lost and not bool(bad):
            self.stats.measured(lost, self.kept.step)
        if self.stats.steps == 1:
            self._warn_of_small()
        self.kept.step += 1

    def _warn_of_small(self) -> None:
        """Warns after the first step where most parameters are too small for their codecs."""
        held = self._parameters
        named = [
            (held.names[part.ordinal], held.tensors[part.ordinal])
            for layout in self.stats.layouts
            for part in layout.parts
        ]
        if (warning := self._options.uncompressed(named)) is not None:
            warnings.warn(warning, stacklevel=2)

    def _drop_damage(self, bad: bool | Tensor) -> None:
        """After a step that was not finite: was it because of what is kept?"""
        if isinstance(bad, Tensor):
            found = self.kept.step % LOOK_EVERY == 0 and self.stats.non_finite_steps > self._looked
            self._looked = self.stats.non_finite_steps if found else self._looked
        else:
            found = bad
        if not found:
            return
        dropped, common = self.kept.drop_damaged()
        self.stats.damage.add(dropped)
        if common:
            self._damage = (
                f"residuals of {common[:5]}, which all ranks hold alike, are damaged here: load a "
                "checkpoint"
            )

    # ----------------------------------------------------------------- readers

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Lets a reader see what one step left, from any thread; none begins meanwhile.

        A reader in the middle of backward, in its own thread, sees of the buckets that have come by
        what they leave, and of the others what there was.
        """
        with self._changes:
            mine = in_backward() or self._thread == threading.get_ident()
            if not mine:
                self._changes.wait_for(lambda: not (self._open or self._unsettled), PATIENCE)
            for one in list(self._in_flight):
                with contextlib.suppress(Exception):
                    one.sending.call.wait()
            yield

    def replaced(self) -> None:
        """What is kept was replaced: everything is compared again with the next step."""
        self.reset()
        self.layouts.forget()
        self._damage = ""

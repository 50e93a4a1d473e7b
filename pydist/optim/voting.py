"""Optimizers whose workers vote, one bit per parameter, on local gradients or attached to DDP."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import ParamsT

from pydist.collectives.grid import Grid, HierarchicalCall, Levels, grid, new_call_groups
from pydist.collectives.nodes import check_levels, check_mesh, groups_of
from pydist.encoding.signs import VoteRule
from pydist.errors import PydistError
from pydist.formats import wire
from pydist.kernels import checks
from pydist.optim.attached import Attachment, attach
from pydist.optim.base import Algorithm, DistributedOptimizer
from pydist.optim.checkpoint import Loaded
from pydist.optim.layout import Layout, check_gradient, check_number, in_order, sample_of
from pydist.optim.lion_coder import Entry, LionCoder, Scalars
from pydist.optim.shards import agree_over_shards, local_gradient, shard_groups
from pydist.optim.state import Kept
from pydist.optim.vote_levels import VoteStages
from pydist.training.advice import Advice, BucketSize, advise
from pydist.training.dtensor import local_of
from pydist.transport.communicator import Call
from pydist.transport.exchange import ALGORITHMS, Exchange, choose_algorithm

VoteLevels = Literal["votes"]
AGGREGATES = ("majority", "average")
Aggregate = Literal["majority", "average"]
Ties = Literal["hash", "zero", "positive"]


class _Vote(NamedTuple):
    """A vote in flight."""

    exchange: Exchange | HierarchicalCall
    coder: LionCoder
    in_bucket: bool


class VotingOptimizer(DistributedOptimizer):
    """Workers vote with the sign of a mix of momentum and gradient; all apply what they decided.

    Subclasses say which mix (:meth:`_weights`) and which arguments they have; those here are
    documented at :class:`pydist.optim.DistributedLion`.
    """

    _takes_shards = True

    # Without momenta the sign of the gradient itself is the vote.
    _has_momentum = True

    _copied = (
        *DistributedOptimizer._copied, "_momentum_dtype", "_binarization_range", "_algorithm",
        "_exact_skip", "_rule", "_levels",
    )  # fmt: skip

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        aggregate: Aggregate,
        ties: Ties,
        group: dist.ProcessGroup | None,
        seed: int,
        momentum_dtype: torch.dtype,
        binarization_range: float | None,
        exact_skip: bool,
        algorithm: Algorithm,
        replica_check_every: int,
        mesh: Levels | None,
        levels: VoteLevels | None,
    ) -> None:
        self._levels = "votes" if mesh is not None and levels is None else levels
        self._mesh = mesh
        self._momentum_dtype = momentum_dtype
        self._binarization_range = binarization_range
        self._algorithm = algorithm
        self._exact_skip = bool(exact_skip)

        def prepare() -> None:
            if aggregate not in AGGREGATES:
                raise ValueError(f"aggregate must be one of {AGGREGATES}, got {aggregate!r}")
            if momentum_dtype not in (torch.float32, torch.bfloat16):
                raise TypeError(f"momentum_dtype must be float32 or bfloat16, got {momentum_dtype}")
            if binarization_range is not None:
                checks.check_range(check_number("binarization_range", binarization_range))
            if algorithm not in ALGORITHMS:
                raise ValueError(f"algorithm must be one of {ALGORITHMS}, got {algorithm!r}")
            if levels not in (None, "votes"):
                raise ValueError(f"levels must be 'votes' or None, got {levels!r}")
            check_levels(mesh, None)
            if mesh is not None:
                check_mesh(group, mesh)
            self._rule = VoteRule(average=aggregate == "average", ties=ties, seed=seed)

        super().__init__(params, defaults, group, prepare, replica_check_every)

    def _begin(self) -> None:
        super()._begin()
        self._mesh = self.__dict__.get("_mesh")
        # Where exact_skip has new momenta written, by parameter.
        self._staged: dict[Tensor, Tensor] = {}
        self._attachment: Attachment | None = None
        # What step() waits for, and the votes it then applies.
        self._in_flight: list[tuple[Callable[[], None], _Vote | None]] = []
        self._call_groups = new_call_groups()  # the votes of this step
        self._equality_checked = False
        self._sizes: list[BucketSize] = []

    @cached_property
    def kept(self) -> Mapping[str, Kept]:
        """A momentum; nothing without."""
        return {"momentum": Kept(self._momentum_dtype, by_rank=True)} if self._has_momentum else {}

    def _settings(self) -> dict[str, Any]:
        return {
            "aggregate": "average" if self._rule.average else "majority",
            "ties": self._rule.ties,
            "seed": self._rule.seed,
            "momentum_dtype": str(self._momentum_dtype),
            "binarization_range": self._binarization_range,
            "algorithm": self._algorithm,
            "levels": self._levels,
            "mesh": self._mesh is not None,
        }

    def _start(self, layout: Layout, params: Sequence[Tensor]) -> None:
        super()._start(layout, params)
        self._grid(layout.device)  # so that all ranks make it at one moment

    def _grid(self, device: torch.device) -> Grid | None:
        """The groups of two levels; ``None`` on one. Collective at first."""
        if self._levels is None:
            return None
        found = groups_of(self._group.process_group, self._mesh, "auto")
        return None if found is None else grid(found, device)

    def _weights(self, group: dict[str, Any]) -> tuple[float, float]:
        """Weights of the old momentum in the vote and in the new momentum."""
        raise NotImplementedError

    # ----------------------------------------------------------------- attached

    def attach(self, ddp: DistributedDataParallel) -> None:
        """Votes during the backward of ``ddp``, overlapped, instead of in ``step()``.

        ``step()`` then waits for the votes and applies them. ``p.grad`` keeps this rank's own
        gradient. Gradients cannot be clipped or unscaled on this path; trying to raises. Parameters
        that DDP does not reduce (thawed or added later, or ignored by it) are voted on in
        ``step()``. Under ``ddp.join()`` ranks that ran out of data vote with zero gradients.

        Until :meth:`detach` no other optimizer may step on parameters of the model.

        Args:
            ddp: The model; its communication hook is taken, so it must not have one.

        Raises:
            TypeError: ``ddp`` is not a DistributedDataParallel.
            ValueError: ``ddp`` has parameters that the optimizer does not have.
            RuntimeError: Already attached, or ``ddp`` has a communication hook or another optimizer
                attached to it.
        """
        if self._attachment is not None and self._attachment.ddp is not None:
            raise RuntimeError("attach() was called before")
        self._attachment = attach(self, ddp)

    def detach(self) -> None:
        """Undoes :meth:`attach`: DDP averages gradients as without a hook, ``step()`` votes.

        Votes of a backward without a ``step()`` are dropped.

        Raises:
            RuntimeError: Not attached.
        """
        if self._attachment is None:
            raise RuntimeError("detach() without attach()")
        self._start_afresh()
        attachment, self._attachment = self._attachment, None
        attachment.end()

    def vote_bucket(self, attachment: Attachment, bucket: GradBucket, *, joined: bool) -> None:
        """Votes with a bucket of local gradients; called by the DDP hook.

        Where this rank cannot take part, ``step()`` raises.

        Args:
            attachment: What ties the optimizer to DDP.
            bucket: DDP's.
            joined: This rank has no data, and only keeps up with the others (``ddp.join()``).
        """
        if not self._in_flight:
            self.look()
        entries: list[Entry] = []
        problem = None
        try:
            if bucket.buffer().is_sparse:  # a bucket of its own, without gradients()
                name = self.name_of(self._place_of(bucket.parameters()[0])[0])
                raise TypeError(f"gradient of {name} is sparse ({bucket.buffer().layout})")
            for p, given in zip(bucket.parameters(), bucket.gradients(), strict=True):
                ordinal, place = self._place_of(p)
                if attachment.vote_again(ordinal):
                    raise TypeError(
                        f"{self.name_of(ordinal)} was voted on before and step() was not called; "
                        "accumulate gradients under ddp.no_sync()"
                    )
                grad = attachment.gradient(ordinal, p, given, joined=joined)
                entries.append(self._entry(ordinal, p, self.param_groups[place], grad))
        except Exception as error:
            problem = str(error)
        fields = {"bucket": bucket.index(), "ask_usage": attachment.tracks_usage}
        self._submit(entries, problem, fields, in_bucket=True)

    def _place_of(self, p: Tensor) -> tuple[int, int]:
        place = self.layout.places.get(p)
        if place is None:
            raise ValueError(
                f"a parameter of shape {list(p.shape)} votes that is not in param_groups any more"
            )
        return place

    def give_up(self) -> None:
        """Raises at the end of a second backward, as a ``step()`` that would may never come."""
        _, failure = self._collect_votes()
        self._start_afresh()
        if failure is not None:
            raise failure

    def step_joined(self) -> None:
        """The step of a rank that ran out of data, under ``ddp.join()``."""
        with torch.no_grad():
            try:
                self._finish(joined=True)
                self._end_step()
            except BaseException:
                self._start_afresh()
                raise

    # ----------------------------------------------------------------- a step

    def _advance(self) -> None:
        if self._attachment is None:
            self._finish(joined=False)
            return
        self._attachment.check_scaler()
        layout = self.layout
        waits = any(self._attachment.reduces(layout.params[i]) for i in layout.active)
        if waits and not self._in_flight:
            raise RuntimeError("step() without votes: no backward ran outside no_sync()")
        self._finish(joined=False)

    def _finish(self, *, joined: bool) -> None:
        """Votes on what no bucket voted on, waits for all votes and applies them."""
        refused: PydistError | None = None
        try:
            self._vote_rest(joined=joined)
        except PydistError as error:  # of an earlier call; the other shards must hear of it
            refused = error
        attachment = None if joined else self._attachment
        changed = None if attachment is None else attachment.changed_gradient()
        votes, failure = self._collect_votes()
        flags = [torch.zeros(1, dtype=torch.int32, device=self.layout.device)]
        flags += [vote.coder.flags for vote in votes]
        together = torch.stack(flags).amax(0)
        groups = shard_groups(self.layout.sharded)
        found = agree_over_shards(together, refused or failure, groups)
        if attachment is not None and changed is not None and not bool(found.any()):
            attachment.refuse_changed(self.name_of(changed))
        self._to_compare.clear()
        self._apply([vote.coder for vote in votes], found)
        self._count(votes)
        if not self._equality_checked:
            self._warn_if_equal()

    def _count(self, votes: Sequence[_Vote]) -> None:
        sizes = []
        for vote in votes:
            params = [entry.param for entry in vote.coder.entries]
            raw = sum(p.numel() * p.element_size() for p in params)
            self._counters.sent(vote.exchange, raw, vote.coder.worker.ranks)
            if vote.in_bucket:
                payload = vote.coder.message_bytes(vote.coder.units)
                sizes.append(BucketSize(raw, payload, len(params)))
        self._sizes = sizes

    def _collect_votes(self) -> tuple[list[_Vote], PydistError | None]:
        """Waits for everything in flight; gives the votes and the first failure."""
        in_flight, self._in_flight = self._in_flight, []
        self._call_groups = new_call_groups()
        failure: PydistError | None = None
        for wait, _ in in_flight:
            try:
                wait()
            except PydistError as error:
                failure = failure or error
        if self._attachment is not None:
            self._attachment.done()
        return [vote for _, vote in in_flight if vote is not None], failure

    def _start_afresh(self) -> None:
        self._collect_votes()  # after an error nothing stays in flight
        super()._start_afresh()

    def _vote_rest(self, *, joined: bool) -> None:
        """Votes on all parameters, or on those that are in no bucket of DDP."""
        attachment = self._attachment
        voted: set[int] = set() if attachment is None else attachment.voted
        problem = None
        if attachment is None:
            self.look()
        rest = [one for one in self._with_groups() if one[0] not in voted]
        if attachment is not None and not rest:
            return
        entries: list[Entry] = []
        try:
            self._unscale()
            for ordinal, p, group in rest:
                entries.append(self._entry(ordinal, p, group, None if joined else p.grad))
        except Exception as error:
            problem = str(error)
        self._submit(entries, problem, {"ask_usage": True})

    def _entry(self, ordinal: int, p: Tensor, group: dict[str, Any], grad: Tensor | None) -> Entry:
        mine, order = local_of(p), self.layout.orders[ordinal]
        if grad is not None:
            grad = local_gradient(p, grad)
            check_gradient(self.name_of(ordinal), grad, mine)
            grad = in_order(grad, order)
        if not self._has_momentum:
            return Entry(ordinal, mine, order, grad, None, None, 0.0, 0.0)
        kept = self.entry_of(ordinal, p)["momentum"]
        out = kept
        if self._exact_skip:
            out = self._staged.get(p)
            if out is None or out.shape != kept.shape or out.device != kept.device:
                out = self._staged[p] = torch.zeros_like(kept)
        weights = self._weights(group)
        return Entry(ordinal, mine, order, grad, local_of(kept), local_of(out), *weights)

    def _submit(
        self,
        entries: list[Entry],
        problem: str | None,
        fields: dict[str, Any],
        *,
        in_bucket: bool = False,
    ) -> None:
        self._grid(self.layout.device)  # at first collective: whatever becomes of the call
        ordinals = [entry.ordinal for entry in entries]
        fields["ordinals"] = zlib.crc32(repr(ordinals).encode())
        call = self._call(fields | self._checksums(ordinals), problem)
        if call.problem is not None:
            self._refuse(call, in_bucket)
            return
        scalars = Scalars(
            *self.rank_and_world, call.step, self._binarization_range, torch.get_num_threads(),
            fields["ask_usage"],
        )  # fmt: skip
        try:
            coder = LionCoder(entries, self._rule, scalars)
            if in_bucket:  # whose gradients DDP may change as soon as its hook returns
                coder.pack()
            sending = self._sending(coder, call)
        except Exception as error:  # out of memory, say
            self._refuse(replace(call, problem=str(error)), in_bucket)
            return
        if isinstance(sending, Exchange):
            self.communicator.submit(sending)
        elif (start := self._grid(coder.device)) is not None:
            if not in_bucket and (failed := self._disagreement(call)) is not None:
                self._in_flight.append((failed.result, None))
                return
            start.start(sending)
        self._in_flight.append((sending.wait, _Vote(sending, coder, in_bucket)))

    def _sending(self, coder: LionCoder, call: Call) -> Exchange | HierarchicalCall:
        """A vote, ready to be started."""
        where, device = self._grid(coder.device), coder.device
        if where is None:
            groups, comm = self._call_groups[0], self.communicator
            # By sizes alone: a step sends as many bytes in every run.
            algorithm = choose_algorithm(self._algorithm, coder, comm.world_size)
            return Exchange(comm, coder, call, algorithm, device, groups)
        stages = VoteStages(where, coder, self._algorithm)
        return HierarchicalCall(
            where, call.name, dict(call.fields), call.step, stages, call_groups=self._call_groups
        )

    def _disagreement(self, call: Call) -> Future[None] | None:
        """Compares a call over all ranks before any momentum moves; fails where they differ.

        On two levels a stage agrees with a part of the ranks only.
        """
        comm, failed = self.communicator, Future[None]()
        self._counters.wire_bytes += (comm.world_size - 1) * wire.HEADER_BYTES
        try:
            comm.run(lambda: comm.agree(call))
        except PydistError as error:
            failed.set_exception(error)
            return failed
        return None

    def _refuse(self, call: Call, in_bucket: bool) -> None:
        """Tells the other ranks of a problem; ``step()`` raises, on every rank.

        Raising here, inside backward, would leave the other ranks waiting for this one's next
        buckets.
        """
        where = self._grid(self.layout.device) if in_bucket else None
        if where is None:
            refused = self.communicator.refuse(call, call_group=self._call_groups[0])
            self._in_flight.append((refused.result, None))
            return
        refusing = HierarchicalCall(
            where, call.name, {}, call.step, None, call.problem, call_groups=self._call_groups
        )
        where.start(refusing)
        self._in_flight.append((refusing.wait, None))

    def _apply(self, coders: list[LionCoder], flags: Tensor) -> None:
        if not coders:
            return
        on_host = flags.device.type == "cpu"
        if on_host or self._exact_skip:
            skip = bool(flags.item())
            self._skipped.add(skip)
            if skip:
                return
        else:
            self._skipped.add((flags[0] != 0).long())
        params = [local_of(p) for p in self.layout.params]
        for coder in coders:
            coder.check_unmoved(params, self.layout.names)  # before any of them is applied
        rates = {i: (float(g["lr"]), float(g["weight_decay"])) for i, _, g in self._with_groups()}
        for coder in coders:
            coder.commit_deferred(None if on_host else flags)
            scalars = [rates[entry.ordinal] for entry in coder.entries]
            coder.apply(scalars, None if on_host else flags)
            self._commit_staged(coder)
        torch.autograd.graph.increment_version(self.layout.sharded)

    def _commit_staged(self, coder: LionCoder) -> None:
        if not self._exact_skip:
            return
        for i, entry in enumerate(coder.entries):
            p = self.layout.params[entry.ordinal]
            if entry.momentum is None or entry.momentum_out is None or not coder.used[i]:
                continue
            if entry.momentum_out is local_of(self._staged[p]):
                state = self.state[p]
                state["momentum"], self._staged[p] = self._staged[p], state["momentum"]

    def _warn_if_equal(self) -> None:
        """Warns where all ranks' gradients are equal: then they were averaged before the vote."""
        if self._attachment is not None or self.communicator.world_size == 1:
            self._equality_checked = True
            return
        grads = [local_of(p.grad) for _, p, _ in self._with_groups() if p.grad is not None]
        mine = sample_of(grads)
        comm = self.communicator
        everyone = comm.run(lambda: comm.gather_bytes(mine))
        if not all(everyone):
            return  # overflowed gradients say nothing: look again after the next step
        self._equality_checked = True
        if any(mine) and all(theirs == mine for theirs in everyone):
            warnings.warn(
                f"{self._name}: all ranks have equal gradients, so every vote is unanimous. A "
                "DDP model averages gradients in backward: run backward under ddp.no_sync(), or "
                "call attach(ddp)",
                stacklevel=4,
            )

    # ----------------------------------------------------------------- what is known

    def advice(self) -> Advice:
        """Whether DDP's ``bucket_cap_mb`` suits the messages, where buckets vote (``attach()``)."""
        return super().advice() if self._attachment is None else advise(self._sizes)

    def _take(self, loaded: Loaded) -> None:
        self._collect_votes()  # those of a backward before, with the momenta of before
        self._staged.clear()
        super()._take(loaded)

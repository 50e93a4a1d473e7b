"""Optimizers whose workers vote with one bit a parameter, on local gradients or attached to DDP."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from pydist import checks
from pydist.codecs.votes import VoteRule
from pydist.errors import PydistError
from pydist.optim.attached import Attachment, vote_hook
from pydist.optim.base import DistributedOptimizer
from pydist.optim.layout import check_gradient, sample_of, with_strides_of
from pydist.optim.lion_coder import Entry, LionCoder, Scalars
from pydist.optim.shards import (
    agree_over_shards,
    local_gradient,
    local_of,
    shard_groups,
)
from pydist.road import ALGORITHMS, Road
from pydist.series import Series

AGGREGATES = ("majority", "average")


class VotingOptimizer(DistributedOptimizer):
    """Workers vote with the sign of a mix of momentum and gradient; all apply what they decided.

    Subclasses say which mix (:meth:`_weights`) and which arguments they have; those here are
    documented at :class:`pydist.optim.DistributedLion`.
    """

    _takes_shards = True

    # Without momenta the sign of the gradient itself is the vote.
    _has_momentum = True

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        aggregate: str,
        ties: str,
        group: dist.ProcessGroup | None,
        seed: int,
        momentum_dtype: torch.dtype,
        binarization_range: float | None,
        exact_skip: bool,
        algorithm: str,
    ) -> None:
        self._momentum_dtype = momentum_dtype
        self._binarization_range = binarization_range
        self._algorithm = algorithm
        self._staged: dict[Tensor, Tensor] | None = {} if exact_skip else None
        self._attachment: Attachment | None = None
        # What step() waits for, and the votes it then applies.
        self._in_flight: list[tuple[Callable[[], None], LionCoder | None]] = []
        self._series = Series()  # the votes of this step
        self._equality_checked = False

        def prepare() -> None:
            if aggregate not in AGGREGATES:
                raise ValueError(f"aggregate must be one of {AGGREGATES}, got {aggregate!r}")
            if momentum_dtype not in (torch.float32, torch.bfloat16):
                raise TypeError(f"momentum_dtype must be float32 or bfloat16, got {momentum_dtype}")
            checks.check_range(binarization_range)
            if algorithm not in ALGORITHMS:
                raise ValueError(f"algorithm must be one of {ALGORITHMS}, got {algorithm!r}")
            self._rule = VoteRule(average=aggregate == "average", ties=ties, seed=seed)

        super().__init__(params, defaults, group, prepare)

    def _settings(self) -> dict[str, Any]:
        return {
            "aggregate": "average" if self._rule.average else "majority",
            "ties": self._rule.ties,
            "seed": self._rule.seed,
            "momentum_dtype": str(self._momentum_dtype),
            "binarization_range": self._binarization_range,
            "algorithm": self._algorithm,
        }

    def _weights(self, group: dict[str, Any]) -> tuple[float, float]:
        """Weights of the old momentum in the vote and in the new momentum."""
        raise NotImplementedError

    # ----------------------------------------------------------------- a step

    def attach(self, ddp: DistributedDataParallel) -> None:
        """Votes during the backward of ``ddp``, overlapped, instead of in ``step()``.

        ``step()`` then waits for the votes and applies them. ``p.grad`` keeps this rank's own
        gradient. Gradients cannot be clipped or unscaled on this path; trying to raises.

        Args:
            ddp: The model; its communication hook is taken, so it must not have one.

        Raises:
            TypeError: ``ddp`` is not a DistributedDataParallel.
            ValueError: ``ddp`` has parameters that the optimizer does not have.
            RuntimeError: Already attached, or ``ddp`` has a communication hook.
        """
        if not isinstance(ddp, DistributedDataParallel):
            raise TypeError(f"ddp must be a DistributedDataParallel, got {type(ddp).__name__}")
        if self._attachment is not None:
            raise RuntimeError("attach() was called before")
        attachment = Attachment(self, ddp)
        ddp.register_comm_hook(attachment, vote_hook)
        self._attachment = attachment

    def _advance(self) -> None:
        refused: PydistError | None = None
        if self._attachment is None:
            try:
                self._vote_all()
            except PydistError as error:  # of an earlier call; the other shards must hear of it
                refused = error
        else:
            self._attachment.check_scaler()
            self._attachment.check_gradients()
            if not self._in_flight:
                raise RuntimeError("step() without votes: no backward ran outside no_sync()")
        votes, failure = self._collect_votes()
        device = local_of(next(self.parameters())).device
        flags = [torch.zeros(1, dtype=torch.int32, device=device), *(c.flags for c in votes)]
        groups = shard_groups(self._sharded)
        self._apply(
            votes, agree_over_shards(torch.stack(flags).amax(0), refused or failure, groups)
        )
        if not self._equality_checked:
            self._warn_if_equal()

    def _collect_votes(self) -> tuple[list[LionCoder], PydistError | None]:
        """Waits for everything in flight; gives the votes and the first failure."""
        in_flight, self._in_flight = self._in_flight, []
        self._series = Series()
        failure: PydistError | None = None
        for wait, _ in in_flight:
            try:
                wait()
            except PydistError as error:
                failure = failure or error
        if self._attachment is not None:
            self._attachment.done()
        return [coder for _, coder in in_flight if coder is not None], failure

    def _start_afresh(self) -> None:
        self._collect_votes()  # after an error nothing stays in flight
        super()._start_afresh()

    def _vote_all(self) -> None:
        entries: list[Entry] = []
        problem = None
        try:
            self._unscale()
            for group in self.param_groups:
                for p in group["params"]:
                    entries.append(self._entry(len(entries), p, group, p.grad))
        except Exception as error:
            problem = str(error)
        self._submit(entries, problem, {})

    def vote_bucket(self, attachment: Attachment, bucket: GradBucket) -> None:
        """Votes with a bucket of local gradients; called by the DDP hook."""
        entries: list[Entry] = []
        problem = None
        try:
            if bucket.buffer().is_sparse:  # a bucket of its own, without gradients()
                name = self.name_of(self._places[bucket.parameters()[0]][0])
                raise TypeError(f"gradient of {name} is sparse ({bucket.buffer().layout})")
            for p, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
                ordinal, place = self._places[p]
                if ordinal in attachment.pending:
                    raise TypeError(
                        f"{self.name_of(ordinal)} was voted on before and step() was not called; "
                        "accumulate gradients under ddp.no_sync()"
                    )
                attachment.pending.add(ordinal)
                # The bucket holds a gradient in its parameter's memory order, but gradients()
                # gives it the strides of a contiguous one: wrong for channels_last.
                grad = grad.as_strided(p.size(), p.stride())
                used = grad if attachment.has_gradient(p) else None
                entries.append(self._entry(ordinal, p, self.param_groups[place], used))
        except Exception as error:
            problem = str(error)
        self._submit(entries, problem, {"bucket": bucket.index()}, pack_now=True)

    def _entry(self, ordinal: int, p: Tensor, group: dict[str, Any], grad: Tensor | None) -> Entry:
        mine = local_of(p)
        if grad is not None:
            grad = local_gradient(p, grad)
            check_gradient(self.name_of(ordinal), grad)
            grad = with_strides_of(mine, grad)
        if not self._has_momentum:
            return Entry(ordinal, mine, grad, None, None, 0.0, 0.0)
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p, dtype=self._momentum_dtype)
        out = state["momentum"]
        if self._staged is not None:
            if p not in self._staged:
                self._staged[p] = torch.zeros_like(out)
            out = self._staged[p]
        momentum = local_of(state["momentum"])
        return Entry(ordinal, mine, grad, momentum, local_of(out), *self._weights(group))

    def _submit(
        self,
        entries: list[Entry],
        problem: str | None,
        fields: dict[str, Any],
        *,
        pack_now: bool = False,
    ) -> None:
        fields["ask_usage"] = self._attachment is None or self._attachment.tracks_usage
        fields["ordinals"] = zlib.crc32(repr([entry.ordinal for entry in entries]).encode())
        call = self._call(fields, problem)
        if call.problem is not None:
            # step() raises, on every rank. Raising here, inside backward, would leave the other
            # ranks waiting for this one's next buckets.
            refused = self._comm.refuse(call, series=self._series)
            self._in_flight.append((refused.result, None))
            return
        scalars = Scalars(
            self._comm.rank, self._comm.world_size, call.step, self._binarization_range,
            torch.get_num_threads(), fields["ask_usage"],
        )  # fmt: skip
        try:
            coder = LionCoder(entries, self._rule, scalars)
            if pack_now:
                coder.pack()
            road = Road(self._comm, coder, call, self._algorithm, coder.device, self._series)
        except Exception as error:  # out of memory, say
            refused = self._comm.refuse(replace(call, problem=str(error)), series=self._series)
            self._in_flight.append((refused.result, None))
            return
        self._comm.submit(road)
        self._in_flight.append((road.wait, coder))

    def _apply(self, coders: list[LionCoder], flags: Tensor) -> None:
        if not coders:
            return
        on_host = flags.device.type == "cpu"
        if on_host or self._staged is not None:
            skip = bool(flags.item())
            self._skipped += int(skip)
            if skip:
                return
        else:
            self._skipped = self._skipped + (flags[0] != 0).long()
        rates = [(float(g["lr"]), float(g["weight_decay"])) for _, _, g in self._with_groups()]
        for coder in coders:
            coder.commit_deferred(None if on_host else flags)
            scalars = [rates[entry.ordinal] for entry in coder.entries]
            coder.apply(scalars, None if on_host else flags)
            self._commit_staged(coder)
        torch.autograd.graph.increment_version(self._sharded)

    def _commit_staged(self, coder: LionCoder) -> None:
        if self._staged is None:
            return
        params = list(self.parameters())
        for i, entry in enumerate(coder.entries):
            p = params[entry.ordinal]
            if entry.momentum is None or entry.momentum_out is None or not coder.used[i]:
                continue
            if entry.momentum_out is local_of(self._staged[p]):
                state = self.state[p]
                state["momentum"], self._staged[p] = self._staged[p], state["momentum"]

    def _warn_if_equal(self) -> None:
        """Warns where all ranks' gradients are equal: then they were averaged before the vote."""
        if self._attachment is not None or self._comm.world_size == 1:
            self._equality_checked = True
            return
        grads = [local_of(p.grad) for p in self.parameters() if p.grad is not None]
        mine = sample_of(grads)
        everyone = self._comm.run(lambda: self._comm.gather_bytes(mine))
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

    # ----------------------------------------------------------------- checkpoint

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict()`` gave on this rank; each rank has a momentum of its own.

        Args:
            state_dict: A state of this optimizer, saved by the same rank.
        """
        super().load_state_dict(state_dict)
        # torch casts floating state to the parameter's dtype, which would round a float32 momentum
        # of a bfloat16 parameter.
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, p in zip(saved, self.parameters(), strict=True):
            if "momentum" in state_dict["state"].get(index, {}):
                momentum = torch.zeros_like(p, dtype=self._momentum_dtype)
                self.state[p]["momentum"] = momentum.copy_(state_dict["state"][index]["momentum"])

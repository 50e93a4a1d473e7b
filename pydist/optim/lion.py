"""Distributed Lion (arXiv 2404.00438): workers send one bit a parameter, their update's sign."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from pydist import checks
from pydist.codecs.votes import VoteRule
from pydist.collectives import refuse
from pydist.communicator import Call, Communicator, communicator
from pydist.errors import PydistError
from pydist.optim.attached import Attachment, lion_hook
from pydist.optim.layout import (
    check_gradient,
    check_group,
    check_options,
    describe,
    names_of,
    sample_of,
    with_strides_of,
)
from pydist.optim.lion_coder import Entry, LionCoder, Scalars
from pydist.road import ALGORITHMS, Road

AGGREGATES = ("majority", "average")


class DistributedLion(torch.optim.Optimizer):
    """Lion whose workers vote (arXiv 2404.00438, Algorithm 1).

    Worker i sends ``sign(beta1 * m_i + (1 - beta1) * g_i)``, one bit a parameter, and updates its
    own momentum ``m_i = beta2 * m_i + (1 - beta2) * g_i``. All workers then apply
    ``x -= lr * (delta + weight_decay * x)``, where delta is the majority or the mean of the votes.

    It needs local gradients. On the plain path ``step()`` votes: use a bare model, or run backward
    under ``ddp.no_sync()``. After ``attach(ddp)`` DDP's buckets vote during backward; the result is
    the same to the bit. All ranks start from rank 0's parameters and stay equal to the bit.

    A NaN or an infinity in any rank's gradient skips the step on all ranks (``skipped_steps``). A
    parameter that no rank has a gradient for is left alone.

    Construction, ``add_param_group`` and ``step`` are collective: every rank calls them.

    Args:
        params: ``model.named_parameters()``, parameters, or parameter groups, as for any
            ``torch.optim.Optimizer``; float32, float16 or bfloat16, all on one device.
        lr: Learning rate; about a third to a half of AdamW's.
        betas: Weights of the old momentum in the vote and in the new momentum.
        weight_decay: Decoupled weight decay; about ten times AdamW's.
        aggregate: ``"majority"`` (one bit comes back) or ``"average"`` (ceil(log2(n + 1)) bits).
        ties: ``"hash"``: a fair bit; ``"zero"``: no update, one more bit comes back;
            ``"positive"``: +1. For majorities.
        group: Process group of the voters; ``None`` is the world.
        seed: Seed of the tie hash and of stochastic votes.
        momentum_dtype: float32 or bfloat16.
        binarization_range: ``None`` votes the sign; r votes +1 with probability
            ``(1 + c / r) / 2``, an unbiased vote where |c| stays below r.
        exact_skip: A skipped step also leaves every momentum as it was, at the price of a second
            momentum buffer (and, on CUDA, of a wait for the device in each step).
        algorithm: ``"auto"``, ``"two_phase"`` or ``"all_gather"`` (:func:`pydist.all_reduce`).

    Raises:
        TypeError: A parameter has an unsupported dtype or layout.
        ValueError: An argument is out of range, or there is no process group.
        MismatchError: The ranks' models or settings differ; raised on every rank.
    """

    # GradScaler then calls step() on every rank, also where only one rank saw an infinity.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        aggregate: str = "majority",
        ties: str = "hash",
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
        momentum_dtype: torch.dtype = torch.float32,
        binarization_range: float | None = None,
        exact_skip: bool = False,
        algorithm: str = "auto",
    ) -> None:
        self._comm = communicator(group)
        self._momentum_dtype = momentum_dtype
        self._binarization_range = binarization_range
        self._algorithm = algorithm
        self._staged: dict[Tensor, Tensor] | None = {} if exact_skip else None
        self._attachment: Attachment | None = None
        # What step() waits for, and the votes it then applies.
        self._in_flight: list[tuple[Callable[[], None], LionCoder | None]] = []
        self._skipped: int | Tensor = 0
        self._equality_checked = False
        self._layout = 0
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "step": 0}
        try:
            if aggregate not in AGGREGATES:
                raise ValueError(f"aggregate must be one of {AGGREGATES}, got {aggregate!r}")
            if momentum_dtype not in (torch.float32, torch.bfloat16):
                raise TypeError(f"momentum_dtype must be float32 or bfloat16, got {momentum_dtype}")
            checks.check_range(binarization_range)
            if algorithm not in ALGORITHMS:
                raise ValueError(f"algorithm must be one of {ALGORITHMS}, got {algorithm!r}")
            self._rule = VoteRule(average=aggregate == "average", ties=ties, seed=seed)
            super().__init__(params, defaults)
        except Exception as error:
            # The other ranks are about to wait for this one.
            refuse(self._comm, Call("DistributedLion", {}, problem=str(error)))
            raise
        self._agree_on_layout()

    # ----------------------------------------------------------------- parameters

    def parameters(self) -> Iterator[Tensor]:
        """All parameters; a parameter's place here is its ordinal."""
        for group in self.param_groups:
            yield from group["params"]

    def name_of(self, ordinal: int) -> str:
        """The parameter's name, where names were given."""
        return names_of(self.param_groups)[ordinal]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, as ``torch.optim.Optimizer`` does; collective.

        Raises:
            TypeError: A parameter has an unsupported dtype or layout.
            ValueError: A hyperparameter is out of range.
            MismatchError: The ranks' parameters differ.
        """
        if self.param_groups:
            param_group.setdefault("step", self.param_groups[0]["step"])
        before = len(self.param_groups)
        try:
            super().add_param_group(param_group)
            check_group(self.param_groups[-1])
            devices = {p.device for p in self.parameters()}
            if len(devices) > 1:
                raise ValueError(f"params must be on one device, got {sorted(map(str, devices))}")
        except Exception as error:
            del self.param_groups[before:]
            if self._layout:
                refuse(self._comm, Call("DistributedLion", {}, problem=str(error)))
            raise
        if self._layout:  # not during construction
            try:
                self._agree_on_layout()
            except PydistError:
                del self.param_groups[before:]
                raise

    def _describe(self) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "world_size": self._comm.world_size,
            "aggregate": "average" if self._rule.average else "majority",
            "ties": self._rule.ties,
            "seed": self._rule.seed,
            "momentum_dtype": str(self._momentum_dtype),
            "binarization_range": self._binarization_range,
            "algorithm": self._algorithm,
        }
        return fields | describe(self.param_groups)

    def _agree_on_layout(self) -> None:
        """Compares models and settings over the ranks, then takes over rank 0's parameters."""
        call = Call("DistributedLion", self._describe())

        def start() -> None:
            self._comm.agree(call)
            if self._comm.world_size == 1:
                return
            for p in self.parameters():
                data = p.detach().contiguous()
                dist.broadcast(data, self._comm.ranks[0], group=self._comm.first)
                if data.data_ptr() != p.data_ptr():
                    p.detach().copy_(data)

        self._comm.run(start)
        self._layout = call.digest or 1
        # Each parameter's ordinal and group.
        self._places: dict[Tensor, tuple[int, int]] = {}
        for g, group in enumerate(self.param_groups):
            for p in group["params"]:
                self._places[p] = (len(self._places), g)

    # ----------------------------------------------------------------- a step

    @property
    def skipped_steps(self) -> int:
        """Steps that no rank made because a gradient was not finite."""
        return int(self._skipped)

    @property
    def communicator(self) -> Communicator:
        """The group's communicator, with its traffic counters."""
        return self._comm

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
        ddp.register_comm_hook(attachment, lion_hook)
        self._attachment = attachment

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step on all ranks.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            The closure's loss, or ``None``.

        Raises:
            MismatchError: Ranks differ in step, learning rate or another setting; on every rank.
            PydistError: A rank has a sparse or unsupported gradient or an option out of range, or
                voted twice (on every rank), or a collective failed.
            RuntimeError: Attached, but gradients were changed after backward or none was voted on.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            if self._attachment is None:
                self._vote_all()
            else:
                self._attachment.check_scaler()
                self._attachment.check_gradients()
                if not self._in_flight:
                    raise RuntimeError("step() without votes: no backward ran outside no_sync()")
        except BaseException:
            self._start_afresh()
            raise
        votes, failure = self._collect_votes()
        if failure is not None:
            self._start_afresh()
            raise failure
        self._apply(votes)
        for group in self.param_groups:
            group["step"] += 1
        if not self._equality_checked:
            self._warn_if_equal()
        return loss

    def _collect_votes(self) -> tuple[list[LionCoder], PydistError | None]:
        """Waits for everything in flight; gives the votes and the first failure."""
        in_flight, self._in_flight = self._in_flight, []
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
        """After an error nothing stays in flight and nothing of a GradScaler stays behind."""
        self._collect_votes()
        for name in ("grad_scale", "found_inf"):  # GradScaler takes them back only after success
            self.__dict__.pop(name, None)

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
        if grad is not None:
            check_gradient(self.name_of(ordinal), grad)
            grad = with_strides_of(p, grad)
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p, dtype=self._momentum_dtype)
        out = state["momentum"]
        if self._staged is not None:
            if p not in self._staged:
                self._staged[p] = torch.zeros_like(out)
            out = self._staged[p]
        return Entry(ordinal, p, grad, state["momentum"], out, *group["betas"])

    def _submit(
        self,
        entries: list[Entry],
        problem: str | None,
        fields: dict[str, Any],
        *,
        pack_now: bool = False,
    ) -> None:
        step = int(self.param_groups[0]["step"])
        for i, group in enumerate(self.param_groups):
            try:
                check_options(group)
            except ValueError as error:
                problem = problem or f"param_groups[{i}]: {error}"
            for name in ("lr", "betas", "weight_decay"):
                value = group[name]
                fields[f"param_groups[{i}].{name}"] = (
                    float(value) if isinstance(value, Tensor) else value
                )
        fields["layout"] = self._layout
        fields["ask_usage"] = self._attachment is None or self._attachment.tracks_usage
        fields["ordinals"] = zlib.crc32(repr([entry.ordinal for entry in entries]).encode())
        call = Call("DistributedLion.step", fields, step, problem)
        if problem is not None:
            # step() raises, on every rank. Raising here, inside backward, would leave the other
            # ranks waiting for this one's next buckets.
            self._in_flight.append((self._comm.refuse(call).result, None))
            return
        scalars = Scalars(
            self._comm.rank, self._comm.world_size, step, self._binarization_range,
            torch.get_num_threads(), fields["ask_usage"],
        )  # fmt: skip
        try:
            coder = LionCoder(entries, self._rule, scalars)
            if pack_now:
                coder.pack()
            road = Road(self._comm, coder, call, self._algorithm, coder.device)
        except Exception as error:  # out of memory, say
            refused = self._comm.refuse(replace(call, problem=str(error)))
            self._in_flight.append((refused.result, None))
            return
        self._comm.submit(road)
        self._in_flight.append((road.wait, coder))

    def _unscale(self) -> None:
        """Divides by a GradScaler's scale, as step() is then called with scaled gradients."""
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            torch._foreach_mul_(grads, scale.double().reciprocal().float())

    def _apply(self, coders: list[LionCoder]) -> None:
        if not coders:
            return
        flags = torch.stack([coder.flags for coder in coders]).amax(0)
        on_host = flags.device.type == "cpu"
        if on_host or self._staged is not None:
            skip = bool(flags.item())
            self._skipped += int(skip)
            if skip:
                return
        else:
            self._skipped = self._skipped + (flags[0] != 0).long()
        rates = [(float(g["lr"]), float(g["weight_decay"])) for g in self.param_groups]
        for coder in coders:
            coder.commit_deferred(None if on_host else flags)
            scalars = [rates[self._places[entry.param][1]] for entry in coder.entries]
            coder.apply(scalars, None if on_host else flags)
            self._commit_staged(coder)

    def _commit_staged(self, coder: LionCoder) -> None:
        if self._staged is None:
            return
        for i, entry in enumerate(coder.entries):
            if coder.used[i] and entry.momentum_out is self._staged[entry.param]:
                self.state[entry.param]["momentum"] = entry.momentum_out
                self._staged[entry.param] = entry.momentum

    def _warn_if_equal(self) -> None:
        """Warns where all ranks' gradients are equal: then they were averaged before the vote."""
        if self._attachment is not None or self._comm.world_size == 1:
            self._equality_checked = True
            return
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        mine = sample_of(grads)
        everyone = self._comm.run(lambda: self._comm.gather_bytes(mine))
        if not all(everyone):
            return  # overflowed gradients say nothing: look again after the next step
        self._equality_checked = True
        if any(mine) and all(theirs == mine for theirs in everyone):
            warnings.warn(
                "DistributedLion: all ranks have equal gradients, so every vote is unanimous. A "
                "DDP model averages gradients in backward: run backward under ddp.no_sync(), or "
                "call attach(ddp)",
                stacklevel=3,
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

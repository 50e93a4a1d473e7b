"""What all optimizers here share: models that agree, param groups, scalers, skipped steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pydist.collectives.work import refuse
from pydist.errors import PydistError
from pydist.optim import replicas
from pydist.optim.checkpoint import SAVED_BY
from pydist.optim.copies import GroupOf
from pydist.optim.layout import (
    Layout,
    check_count,
    check_parameters,
    first_device,
    is_active,
    strides_of,
)
from pydist.optim.reporting import ReportingOptimizer
from pydist.optim.skipped import Skipped
from pydist.optim.state import State
from pydist.training.dtensor import local_of
from pydist.training.replicas import checksums
from pydist.training.stats import Counters
from pydist.transport.communicator import Call, Communicator, communicator

Algorithm = Literal["auto", "two_phase", "all_gather"]


class DistributedOptimizer(ReportingOptimizer):
    """An optimizer whose construction, ``add_param_group`` and ``step`` are collective.

    All ranks start from rank 0's parameters and stay bit-identical. Where parameters are on a
    device that the group cannot send from (a model that has yet to move), the ranks compare models
    in the first step instead of the constructor.

    Copies (``copy.deepcopy``, ``pickle``, ``torch.save``) have the settings, the parameters and
    this rank's state, but neither threads nor an attachment to DDP. They find their process group
    again at their first use; a pickle of an optimizer with a group of its own needs :meth:`bind`.

    Args:
        params: Named parameters, parameters, or parameter groups.
        defaults: Options of a parameter group.
        group: Process group; ``None`` is the world.
        prepare: Checks and keeps the other arguments; what it raises, all ranks hear of.
        replica_check_every: Steps from one comparison of the parameters to the next; 0: none.
    """

    _copied = (*ReportingOptimizer._copied, "_replica_check_every")

    # GradScaler then calls step() on every rank, also where only one rank saw an infinity.
    _step_supports_amp_scaling = True

    # Whether parameters may be DTensors, of which each rank has a part.
    _takes_shards = False

    # Options of a parameter group that must be equal on all ranks in every step.
    _agreed_options: tuple[str, ...] = ("lr", "weight_decay")

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        group: dist.ProcessGroup | None,
        prepare: Callable[[], None],
        replica_check_every: int,
    ) -> None:
        self._group = GroupOf(group)
        self._replica_check_every = replica_check_every
        self._saved_by: tuple[int, int] | None = None
        self._begin()
        given: Any = params
        if isinstance(given, Iterable) and not isinstance(given, Tensor):
            given = list(given)
        self._comm = communicator(group, first_device(given))
        try:
            check_count("replica_check_every", replica_check_every)
            prepare()
            if self._comm.world_size > 1:
                replicas.refuse_partitions()
            counted: dict[str, Any] = {"step": 0, "skipped": 0}
            if any(kept.by_rank for kept in self.kept.values()):
                counted[SAVED_BY] = {}
            super().__init__(given, defaults | counted)
            layout = self._laid_out()
        except Exception as error:
            # The other ranks are about to wait for this one.
            refuse(self._comm, Call(self._name, {}, problem=str(error)))
            raise
        self.state = State(self._fresh_state)
        self._started = False
        if layout.has_values:
            self._start(layout, layout.params)

    _comm: Communicator | None

    def _begin(self) -> None:
        """Sets what copies do not share: groups, calls in flight, what was found in a step."""
        self._name = type(self).__name__
        self._comm = None
        self._layout: Layout | None = None
        self._started = True
        self._skipped = Skipped()
        self._problem: str | None = None
        # Checksums that all ranks compare in the next step: of a loaded state, of new parameters.
        self._to_compare: dict[str, Any] = {}
        # Kept state that is damaged, and cannot be mended on this rank alone.
        self._damaged: str | None = None
        self._template_ranks: int | None = None
        self.consolidated: dict[tuple[int, str], dict[str, Any]] = {}
        self._counters = Counters()

    # ----------------------------------------------------------------- of a subclass

    def _settings(self) -> dict[str, Any]:
        """Settings that must be equal on all ranks, JSON types."""
        raise NotImplementedError

    def _check_options(self, group: dict[str, Any]) -> None:
        """Raises TypeError or ValueError where an option of a parameter group is out of range."""
        raise NotImplementedError

    def _advance(self) -> None:
        """Makes one step on all ranks; gradients are there."""
        raise NotImplementedError

    # ----------------------------------------------------------------- parameters

    def name_of(self, ordinal: int) -> str:
        """The parameter's name, where names were given."""
        return self.layout.names[ordinal]

    @property
    def layout(self) -> Layout:
        """The parameters as of the last look at them."""
        if self._layout is None:
            self._layout = self._laid_out()
        return self._layout

    def _laid_out(self) -> Layout:
        """The parameters as they are now."""
        settings = {**self._settings(), "replica_check_every": self._replica_check_every}
        return Layout(self.param_groups, settings, self._layout)

    def order_of(self, p: Tensor) -> tuple[int, ...]:
        """The parameter's memory order, in which its elements are numbered and its state is."""
        place = self.layout.places.get(p)
        return strides_of(p) if place is None else self.layout.orders[place[0]]

    def _with_groups(self) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
        """Every trained parameter with its ordinal and its group."""
        layout = self.layout
        for i in layout.active:
            p = layout.params[i]
            yield i, p, self.param_groups[layout.places[p][1]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, as ``torch.optim.Optimizer`` does; collective.

        Raises:
            TypeError: A parameter has an unsupported dtype or layout.
            ValueError: A hyperparameter is out of range.
            MismatchError: The ranks' parameters differ.
        """
        before = len(self.param_groups)
        constructed = isinstance(getattr(self, "state", None), State)
        try:
            for option in ("step", "skipped") if before and isinstance(param_group, dict) else ():
                param_group.setdefault(option, self.param_groups[0][option])
            super().add_param_group(param_group)
            _drop_repeated(self.param_groups[-1])
            self.check_group(self.param_groups[-1])
            new = self.param_groups[-1]["params"]
            trained = [p for p in new if is_active(p)]
            check_parameters(trained, shards=self._takes_shards)
            layout = self._laid_out()
            if constructed and self._started:
                layout.check(shards=self._takes_shards)
        except Exception as error:
            del self.param_groups[before:]
            if constructed:
                refuse(self.communicator, Call(self._name, {}, problem=str(error)))
            raise
        if not constructed or not self._started:
            return  # the agreement is still to come
        try:
            self._start(layout, new)
        except PydistError:
            del self.param_groups[before:]
            raise

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises TypeError or ValueError where a parameter group has no valid options."""
        # torch adds an option of its own when an optimizer is unpickled.
        missing = [x for x in self.defaults if x not in group and x != "differentiable"]
        if missing:
            raise ValueError(f"{', '.join(missing)} missing: is it another optimizer's?")
        for option in ("step", "skipped"):
            check_count(option, group[option])
        self._check_options(group)

    # ----------------------------------------------------------------- agreement

    def _start(self, layout: Layout, params: Sequence[Tensor]) -> None:
        """Compares models and settings over the ranks, then takes over rank 0's parameters."""
        problem = None
        try:
            layout.check(shards=self._takes_shards)
        except (TypeError, ValueError) as error:
            problem = error
        comm = self.communicator
        call = Call(
            self._name, layout.fields | {"world_size": comm.world_size},
            problem=None if problem is None else str(problem),
        )  # fmt: skip
        chosen = [p for p in params if replicas.comparable(p)]
        names = [layout.names[layout.places[p][0]] for p in chosen]

        def start() -> list[str]:
            comm.agree(call)
            return replicas.take_first_ranks(comm, chosen, names)

        try:
            differed = comm.run(start)
        except PydistError:
            if problem is not None:
                raise problem from None
            raise
        if differed:
            warnings.warn(
                f"{self._name}: values of {', '.join(differed[:5])} differed between ranks; all "
                "have taken over those of rank 0",
                stacklevel=4,
            )
        self._adopt(layout)
        self._started = True

    def _adopt(self, layout: Layout) -> None:
        """Takes over the parameters as they are now; state goes along with replaced ones."""
        old = self._layout
        if old is not None:
            for i, j in layout.came_from(old).items():
                before, now = old.params[j], layout.params[i]
                if before is now or before not in self.state:
                    continue
                if not self._step:  # frameworks shard and save before there is anything to keep
                    del self.state[before]
                    continue
                if before.shape != now.shape or local_of(before).shape != local_of(now).shape:
                    raise ValueError(
                        f"{layout.names[i]} was replaced by another parameter, of shape "
                        f"{list(local_of(now).shape)} here, and its state is of shape "
                        f"{list(local_of(before).shape)}: clear optimizer.state to start anew"
                    )
                self.state[now] = self.state.pop(before)
            new = [p for p in layout.params if p not in old.places and is_active(p)]
            if new:
                names = [layout.names[layout.places[p][0]] for p in new]
                self._to_compare |= checksums(names, new)
        self._layout = layout

    def look(self) -> None:
        """Notices parameters that were moved, frozen, replaced; a problem is told in the step."""
        self._problem = None
        layout = self._layout
        if layout is not None and self._started and layout.is_current(self.param_groups):
            return
        try:
            layout = self._laid_out()
            layout.check(shards=self._takes_shards)
            self._follow(layout)
            if not self._started:
                self._start(layout, layout.params)
            else:
                self._adopt(layout)
        except (TypeError, ValueError) as error:
            self._problem = str(error)

    def _follow(self, layout: Layout) -> None:
        """Takes the communicator of the device that the parameters are on now; collective."""
        if layout.device.type == self.layout.device.type:
            return
        where = {"device": layout.device.type}
        call, before = Call(f"{self._name}.step", where, self._step), self.communicator
        before.run(lambda: before.agree(call))
        self._comm = communicator(self._group.process_group, layout.device)

    @property
    def communicator(self) -> Communicator:
        """The group's communicator, with its traffic counters."""
        if self._comm is None:
            self.bind(self._group.process_group)
        assert self._comm is not None
        return self._comm

    def bind(self, group: dist.ProcessGroup | None = None) -> None:
        """Gives a copy its process group; collective. Others find theirs at their first use.

        Args:
            group: Process group; ``None`` is the world.

        Raises:
            ValueError: There is no process group, or this rank is not in it; or the copy has the
                state of another rank.
        """
        comm = communicator(group, self.layout.device)
        if self._saved_by not in (None, (comm.rank, comm.world_size)):
            assert self._saved_by is not None
            rank, ranks = self._saved_by
            raise ValueError(
                f"this copy has the state of rank {rank} of {ranks}, and this is rank {comm.rank} "
                f"of {comm.world_size}: use state_dict() and load_state_dict()"
            )
        self._group, self._comm = GroupOf(group), comm

    @property
    def rank_and_world(self) -> tuple[int, int]:
        """This rank's place in the process group, and the group's size."""
        if self._comm is None and self._saved_by is not None:
            return self._saved_by  # a copy that was not used yet
        return self.communicator.rank, self.communicator.world_size

    # ----------------------------------------------------------------- a step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Makes one step on all ranks.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            The closure's loss, or ``None``.

        Raises:
            MismatchError: Ranks differ in step, learning rate or another setting; on every rank.
            PydistError: A rank has a sparse or unsupported gradient, an option out of range or
                damaged state (on every rank), a collective failed, or 100 steps in a row were
                skipped.
            RuntimeError: Attached to DDP, but gradients were changed after backward, or there was
                none; or the parameters belong to a model that another optimizer is attached to.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._make_step()
        return loss

    @torch.compiler.disable  # what follows are kernels and messages
    def _make_step(self) -> None:
        try:
            self._advance()
            self._end_step()
        except BaseException:
            self._start_afresh()
            raise

    def _end_step(self) -> None:
        for group in self.param_groups:
            group["step"] += 1
        self.consolidated.clear()
        self._counters.steps += 1
        if self._skipped.is_due(self._step):
            self._after_skips()

    def _start_afresh(self) -> None:
        """After an error nothing of a GradScaler stays behind, and damage is looked for again."""
        self._damaged = None
        for name in ("grad_scale", "found_inf"):  # GradScaler takes them back only after success
            self.__dict__.pop(name, None)

    def _unscale(self) -> None:
        """Divides by a GradScaler's scale, as step() is then called with scaled gradients."""
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            grads = [local_of(p.grad) for p in self.parameters() if p.grad is not None]
            torch._foreach_mul_(grads, scale.double().reciprocal().float())

    def _call(self, fields: dict[str, Any], problem: str | None) -> Call:
        """What the ranks must agree on before a step's data moves.

        Args:
            fields: What else must be equal.
            problem: Why this rank cannot take part.
        """
        problem = self._problem or self._damaged or problem
        for i, group in enumerate(self.param_groups):
            try:
                self.check_group(group)
            except (TypeError, ValueError) as error:
                problem = problem or f"param_groups[{i}]: {error}"
            for name in self._agreed_options:
                value = group.get(name)
                fields[f"param_groups[{i}].{name}"] = (
                    float(value) if isinstance(value, Tensor) else value
                )
        layout = self.layout
        fields |= {"checksum of the parameters": layout.digest, **self._to_compare}
        step = self.param_groups[0].get("step") if self.param_groups else None
        if not isinstance(step, int) or not 0 <= step < 2**63:
            step = 0  # the problem says what is wrong
        return Call(f"{self._name}.step", fields, step, problem, lambda: layout.fields)

    def _pending(self) -> int:
        """Steps since all ranks last made one together, but for this one."""
        return 0

    def _replica(self, p: Tensor) -> Tensor:
        """What must be equal on all ranks before a step."""
        return p

    def _checksums(self, ordinals: Iterable[int]) -> dict[str, int]:
        """Of parameters, where they are to be compared in this step (``replica_check_every``)."""
        every, step = self._replica_check_every, self._step
        if not every or step // every == (step - self._pending() - 1) // every:
            return {}
        chosen = list(ordinals)
        params = [self._replica(self.layout.params[i]) for i in chosen]
        return checksums([self.name_of(i) for i in chosen], params)

    # ----------------------------------------------------------------- after skipped steps

    def _after_skips(self) -> None:
        """Looks for what kept state had to do with it, which no good gradient would mend.

        Where so many steps were skipped in a row that training stands still, the next step says so.
        """
        for i, p, _ in self._with_groups():
            self._counters.dropped += self._mend(i, p)
        if self._skipped.standing_still:
            bad = [
                self.name_of(i)
                for i, p, _ in self._with_groups()
                if p.grad is not None and not bool(local_of(p.grad).isfinite().all())
            ]
            self._damaged = self._damaged or (
                f"{Skipped.LIMIT} steps in a row were skipped, as values were not finite; on this "
                f"rank those of the gradients of {', '.join(bad[:5]) or 'no parameter'}"
            )
            self._skipped.row = 0


def _drop_repeated(group: dict[str, Any]) -> None:
    """Keeps the first of several occurrences of a parameter (torch has warned of them)."""
    first = {id(p): i for i, p in reversed(list(enumerate(group["params"])))}
    places = sorted(first.values())
    for key in ("params", "param_names"):
        if key in group and len(places) < len(group[key]):
            group[key] = [group[key][i] for i in places]

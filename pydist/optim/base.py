"""What all optimizers here share: models that agree, param groups, scalers, skipped steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pydist.collectives import refuse
from pydist.communicator import Call, Communicator, communicator
from pydist.errors import PydistError
from pydist.optim.layout import check_parameters, describe, names_of
from pydist.optim.shards import is_sharded, local_of


class DistributedOptimizer(torch.optim.Optimizer):
    """An optimizer whose construction, ``add_param_group`` and ``step`` are collective.

    All ranks start from rank 0's parameters and stay equal to the bit.

    Args:
        params: Named parameters, parameters, or parameter groups.
        defaults: Options of a parameter group.
        group: Process group; ``None`` is the world.
        prepare: Checks and keeps the other arguments; what it raises, all ranks hear of.
    """

    # GradScaler then calls step() on every rank, also where only one rank saw an infinity.
    _step_supports_amp_scaling = True

    # Whether parameters may be DTensors, of which each rank has a part.
    _takes_shards = False

    # Options of a parameter group that must be equal on all ranks in every step.
    _agreed_options: tuple[str, ...] = ("lr", "weight_decay")

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        group: dist.ProcessGroup | None,
        prepare: Callable[[], None],
    ) -> None:
        self._comm = communicator(group)
        self._name = type(self).__name__
        self._skipped: int | Tensor = 0
        self._layout = 0
        try:
            prepare()
            super().__init__(params, defaults | {"step": 0})
        except Exception as error:
            # The other ranks are about to wait for this one.
            refuse(self._comm, Call(self._name, {}, problem=str(error)))
            raise
        self._agree_on_layout()

    # ----------------------------------------------------------------- of a subclass

    def _settings(self) -> dict[str, Any]:
        """Settings that must be equal on all ranks, JSON types."""
        raise NotImplementedError

    def _check_options(self, group: dict[str, Any]) -> None:
        """Raises ValueError where an option of a parameter group is out of range."""
        raise NotImplementedError

    def _advance(self) -> None:
        """Makes one step on all ranks; gradients are there."""
        raise NotImplementedError

    # ----------------------------------------------------------------- parameters

    def parameters(self) -> Iterator[Tensor]:
        """All parameters; a parameter's place here is its ordinal."""
        for group in self.param_groups:
            yield from group["params"]

    def name_of(self, ordinal: int) -> str:
        """The parameter's name, where names were given."""
        return self._names[ordinal]

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
            self._check_options(self.param_groups[-1])
            check_parameters(self.param_groups[-1]["params"], shards=self._takes_shards)
            devices = {p.device for p in self.parameters()}
            if len(devices) > 1:
                raise ValueError(f"params must be on one device, got {sorted(map(str, devices))}")
        except Exception as error:
            del self.param_groups[before:]
            if self._layout:
                refuse(self._comm, Call(self._name, {}, problem=str(error)))
            raise
        if self._layout:  # else the constructor has not come to its agreement yet
            try:
                self._agree_on_layout()
            except PydistError:
                del self.param_groups[before:]
                raise

    def _agree_on_layout(self) -> None:
        """Compares models and settings over the ranks, then takes over rank 0's parameters."""
        fields = {"world_size": self._comm.world_size} | self._settings()
        call = Call(self._name, fields | describe(self.param_groups))

        def start() -> None:
            self._comm.agree(call)
            if self._comm.world_size == 1:
                return
            for p in self.parameters():
                mine = local_of(p).detach()
                data = mine.contiguous()
                dist.broadcast(data, self._comm.ranks[0], group=self._comm.first)
                if data.data_ptr() != mine.data_ptr():
                    mine.copy_(data)

        self._comm.run(start)
        self._layout = call.digest or 1
        self._names = names_of(self.param_groups)
        # Each parameter's ordinal and group.
        self._places: dict[Tensor, tuple[int, int]] = {}
        for g, group in enumerate(self.param_groups):
            for p in group["params"]:
                self._places[p] = (len(self._places), g)
        self._sharded = [p for p in self.parameters() if is_sharded(p)]

    def _with_groups(self) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
        """Every parameter with its ordinal and its group."""
        places = itertools.count()
        for group in self.param_groups:
            for p in group["params"]:
                yield next(places), p, group

    # ----------------------------------------------------------------- a step

    @property
    def skipped_steps(self) -> int:
        """Steps that no rank made because a gradient was not finite."""
        return int(self._skipped)

    def count_skipped(self, steps: int) -> None:
        """Takes over the count of a checkpoint."""
        self._skipped = steps

    @property
    def communicator(self) -> Communicator:
        """The group's communicator, with its traffic counters."""
        return self._comm

    @property
    def _step(self) -> int:
        return int(self.param_groups[0]["step"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step on all ranks.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            The closure's loss, or ``None``.

        Raises:
            MismatchError: Ranks differ in step, learning rate or another setting; on every rank.
            PydistError: A rank has a sparse or unsupported gradient or an option out of range (on
                every rank), or a collective failed.
            RuntimeError: Attached to DDP, but gradients were changed after backward, or there was
                none.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._advance()
        except BaseException:
            self._start_afresh()
            raise
        for group in self.param_groups:
            group["step"] += 1
        return loss

    def _start_afresh(self) -> None:
        """After an error nothing of a GradScaler stays behind."""
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
        for i, group in enumerate(self.param_groups):
            try:
                self._check_options(group)
            except ValueError as error:
                problem = problem or f"param_groups[{i}]: {error}"
            for name in self._agreed_options:
                value = group[name]
                fields[f"param_groups[{i}].{name}"] = (
                    float(value) if isinstance(value, Tensor) else value
                )
        return Call(f"{self._name}.step", fields | {"layout": self._layout}, self._step, problem)

"""Optimizers with state that differs by rank: what is kept, copied, saved and loaded."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pydist.optim import checkpoint, replicas
from pydist.optim.layout import check_count
from pydist.optim.skipped import Skipped
from pydist.optim.state import Kept, State
from pydist.training.dtensor import local_of
from pydist.transport.communicator import Communicator


class StatefulOptimizer(torch.optim.Optimizer):
    """What an optimizer keeps of its parameters, and what becomes of it in copies and files.

    Attributes:
        consolidated: Of :meth:`consolidate_state_dict`: what all ranks keep, by parameter's ordinal
            and entry.
    """

    # Attributes that copies have; what an optimizer does at the moment is not among them.
    _copied: tuple[str, ...] = ("_group", "_saved_by")

    _name: str
    _saved_by: tuple[int, int] | None
    _skipped: Skipped
    _damaged: str | None
    _to_compare: dict[str, Any]
    _template_ranks: int | None
    consolidated: dict[tuple[int, str], dict[str, Any]]

    # ----------------------------------------------------------------- of a subclass

    @property
    def kept(self) -> Mapping[str, Kept]:
        """What is kept of every parameter, and saved."""
        raise NotImplementedError

    @property
    def communicator(self) -> Communicator:
        """The group's communicator."""
        raise NotImplementedError

    @property
    def rank_and_world(self) -> tuple[int, int]:
        """This rank's place in the process group, and the group's size."""
        raise NotImplementedError

    def name_of(self, ordinal: int) -> str:
        """The parameter's name."""
        raise NotImplementedError

    def order_of(self, p: Tensor) -> tuple[int, ...]:
        """The parameter's memory order, in which its elements are numbered and its state is."""
        raise NotImplementedError

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises TypeError or ValueError where a parameter group has no valid options."""
        raise NotImplementedError

    def _begin(self) -> None:
        """Sets what copies do not share."""
        raise NotImplementedError

    def saved_value(self, ordinal: int, p: Tensor, key: str) -> Any:
        """What a checkpoint holds of an entry of a parameter's state."""
        value = self.state[p].get(key)
        return self.kept[key].zeros(p, self.order_of(p)) if value is None else value

    def share_out(self, values: dict[str, list[Any]]) -> dict[str, Any]:
        """This rank's part of what all ranks of another world kept of a parameter."""
        return {key: checkpoint.mean_of(each) for key, each in values.items()}

    def is_common(self, key: str, options: Sequence[Mapping[str, Any]]) -> bool:
        """Whether an entry must be equal on all ranks, with these options of all groups."""
        return not self.kept[key].by_rank

    def check_entry(self, name: str, entry: Mapping[str, Any]) -> None:
        """Raises ValueError where the parts of a loaded entry do not fit together."""

    def _begin_taking(self) -> None:
        """Forgets what is not in ``state``."""

    def _take_entry(
        self, ordinal: int, p: Tensor, entry: dict[str, Any], options: Mapping[str, Any]
    ) -> None:
        """Takes over a parameter's loaded state; must not fail."""
        self.state[p] = entry

    # ----------------------------------------------------------------- state

    def parameters(self) -> Iterator[Tensor]:
        """All parameters; a parameter's place here is its ordinal."""
        for group in self.param_groups:
            yield from group["params"]

    @property
    def skipped_steps(self) -> int:
        """Steps that no rank made because a gradient was not finite."""
        return int(self._skipped.total)

    def entry_of(self, ordinal: int, p: Tensor) -> dict[str, Any]:
        """A parameter's state, checked: what kernels get of it are addresses.

        Raises:
            TypeError: An entry is of another type.
            ValueError: An entry has another shape than the parameter, or is out of range.
        """
        entry = self.state[p]
        if not entry:  # cleared by the user, as by optimizer.state[p].clear()
            entry.update(self._fresh_state(p))
        order = self.order_of(p)
        for key, kept in self.kept.items():
            value = entry.get(key)
            if value is None and kept.later:
                continue
            checked = kept.check(f"{key} of {self.name_of(ordinal)}", value, p, order)
            if checked is not value:
                entry[key] = checked
        return entry

    def _fresh_state(self, p: Tensor) -> dict[str, Any]:
        """A parameter's state before its first step."""
        if not isinstance(p, Tensor) or not replicas.comparable(p):
            return {}
        order = self.order_of(p)
        return {k: None if kept.later else kept.zeros(p, order) for k, kept in self.kept.items()}

    def _held(self, ordinal: int, p: Tensor) -> Iterator[tuple[str, Tensor, bool]]:
        """The tensors that are kept of a parameter: entry, values, whether all ranks have them."""
        for key, kept in self.kept.items():
            value = self.state[p].get(key)
            if isinstance(value, Tensor) and kept.rows is None:
                yield key, local_of(value), self.is_common(key, self.param_groups)

    def _mend(self, ordinal: int, p: Tensor) -> int:
        """Sets damaged elements to zero where they are this rank's own; says how many.

        What must be equal on all ranks cannot be mended on one: the next step raises on all.
        """
        dropped = 0
        for key, values, common in self._held(ordinal, p):
            bad = self.kept[key].bad(values)
            if not bool(bad.any()):
                continue
            what = f"{key} of {self.name_of(ordinal)}"
            if common:
                self._damaged = f"{what} is not finite: load a checkpoint"
            else:
                values.masked_fill_(bad, 0)
                dropped += self._say_dropped(what, int(bad.sum()))
        return dropped

    def _say_dropped(self, what: str, number: int) -> int:
        warnings.warn(
            f"{self._name}: {number} elements of {what} were not finite or far out of range, and "
            "start from zero",
            stacklevel=2,
        )
        return number

    # ----------------------------------------------------------------- copies

    def __getstate__(self) -> dict[str, Any]:
        """Settings, parameters and state; neither groups nor what is in flight."""
        copied = {name: self.__dict__[name] for name in self._copied}
        if any(kept.by_rank for kept in self.kept.values()):
            copied["_saved_by"] = self.rank_and_world
        groups = [group | {"skipped": self.skipped_steps} for group in self.param_groups]
        state = {
            p: {key: self.saved_value(i, p, key) for key in self.kept}
            for i, p in enumerate(self.parameters())
            if self.state.get(p)
        }
        return {"defaults": self.defaults, "state": state, "param_groups": groups, **copied}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes over what ``__getstate__`` gave."""
        self._begin()
        super().__setstate__(state)
        entries, self.state = self.state, State(self._fresh_state)
        self._skipped = Skipped(self.param_groups[0]["skipped"])
        self._begin_taking()
        of = [group for group in self.param_groups for _ in group["params"]]
        for i, p in enumerate(self.parameters()):
            if p in entries:
                self._take_entry(i, p, entries[p], of[i])

    # ----------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """This rank's state and the options, as ``torch.optim.Optimizer`` has them.

        What differs by rank stands below ``"rank r of n"`` (:mod:`pydist.optim.checkpoint`), so
        that torch.distributed.checkpoint keeps that of every rank. With ``torch.save`` every rank
        saves its own; or :meth:`consolidate_state_dict` collects all of them. It never
        communicates and may be called at any time.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        packed = checkpoint.state_dict(self, self._template_ranks)
        for post in self._optimizer_state_dict_post_hooks.values():
            changed = post(self, packed)
            packed = packed if changed is None else changed
        return packed

    @contextlib.contextmanager
    def saved_by(self, world_size: int) -> Iterator[None]:
        """In this block ``state_dict()`` gives what as many ranks save, to be loaded into.

        So torch.distributed.checkpoint loads a checkpoint of a world of another size::

            with optimizer.saved_by(pydist.optim.saved_world_size(path)):
                states = dict(zip(["model", "optimizer"], get_state_dict(model, optimizer)))
            dcp.load(states, checkpoint_id=path)
            set_state_dict(model, optimizer, model_state_dict=states["model"],
                           optim_state_dict=states["optimizer"])

        Args:
            world_size: Ranks that saved the checkpoint.
        """
        self._template_ranks = check_count("world_size", world_size, 1)
        try:
            yield
        finally:
            self._template_ranks = None

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Collects what differs by rank on one rank; collective.

        Until the next step ``state_dict()`` on that rank then holds the states of all ranks, and
        all ranks can load it, in a world of any size. Frameworks that save what one rank has call
        it by this name (as of ``ZeroRedundancyOptimizer``).

        Args:
            to: The rank, as the process group counts.

        Raises:
            ValueError: There is no such rank.
        """
        if not 0 <= check_count("to", to) < self.communicator.world_size:
            raise ValueError(f"to must be a rank of {self.communicator.world_size}, got {to}")
        self.consolidated = checkpoint.gathered(self, to)

    def load_state_dict(self, state_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Loads what ``state_dict()`` gave: all of it, or nothing where something is wrong.

        Parameters are found by their names, where both sides have names, else by their places. A
        trained parameter that has no state there starts anew, with a warning. What must be equal on
        all ranks is compared in the next step.

        Args:
            state_dict: This rank's own, saved by the same rank of as many; or one or several that
                hold the states of all ranks of a world of any size. In a world of another size
                each rank takes an equal part of what was not sent, and the mean of other state
                that differs by rank.

        Raises:
            ValueError: The state is of another rank, world, optimizer or model, or damaged; names
                what is wrong.
        """
        given: Any = state_dict
        if self._optimizer_load_state_dict_pre_hooks:
            alone = isinstance(given, Mapping)
            adapted = [self._adapted(one) for one in ([given] if alone else given)]
            given = adapted[0] if alone else adapted
        with torch.inference_mode(mode=False), torch.no_grad():
            loaded = checkpoint.read(self, given)
            self._take(loaded)
        for post in self._optimizer_load_state_dict_post_hooks.values():
            post(self)
        if loaded.missing:
            warnings.warn(
                f"{self._name}: state_dict has no state of {', '.join(loaded.missing[:5])}: "
                "it starts anew",
                stacklevel=2,
            )

    def _adapted(self, one: Mapping[str, Any]) -> Mapping[str, Any]:
        adapted = dict(one)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, adapted)
            adapted = adapted if changed is None else changed
        return adapted

    def _take(self, loaded: checkpoint.Loaded) -> None:
        """Takes over a state that was checked; nothing here fails."""
        groups = []
        for group, options in zip(self.param_groups, loaded.groups, strict=True):
            groups.append({**options, "params": group["params"]})
        self.param_groups = groups
        self.state.clear()
        self._begin_taking()
        of = [options for options in groups for _ in options["params"]]
        for i, p in enumerate(list(self.parameters())):
            entry = loaded.entries[i]
            if entry is not None:
                self._take_entry(i, p, entry, of[i])
        self._skipped = Skipped(groups[0]["skipped"])
        self._damaged = None
        self.consolidated.clear()
        self._to_compare = {
            f"checksum of the loaded state of {name}": digest
            for name, digest in loaded.digests.items()
        }

"""States in torch.distributed.checkpoint: an entry for every rank, which that rank writes.

What is kept differs by rank, and which parameters have something kept depends on the run: on layers
that were frozen, on codecs by step. torch.distributed.checkpoint reads what the one who loads asks
for, by key and shape, and leaves out the rest without a word. So each rank's state is one value
under one key, whatever is in it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

_RANK = "pydist_rank_"


class Saves(Protocol):
    """A state that can be saved and loaded."""

    def state_dict(self) -> dict[str, Any]:
        """This rank's."""
        ...

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """This rank's, or those of all ranks."""
        ...


class Sharded:
    """A state in the form that torch.distributed.checkpoint takes.

    It is a ``Stateful``: put it into the dict that is saved or loaded.

    Args:
        state: The state.
        place: Says this rank, as the world counts it, and of how many.
        saved_world_size: Ranks that saved what is to be loaded, where they were not as many as now
            (:func:`saved_world_size` finds it); the result can then be loaded, not saved.

    Raises:
        ValueError: ``saved_world_size`` is no number of ranks.
    """

    def __init__(
        self,
        state: Saves,
        place: Callable[[], tuple[int, int]],
        saved_world_size: int | None = None,
    ) -> None:
        if saved_world_size is not None and (
            not isinstance(saved_world_size, int) or saved_world_size < 1
        ):
            raise ValueError(f"saved_world_size must be at least 1, got {saved_world_size!r}")
        self._state, self._place, self._saved = state, place, saved_world_size

    def _others(self) -> range | None:
        """The ranks of the other world that saved; ``None``: this one did."""
        same = self._saved is None or self._saved == self._place()[1]
        return None if same else range(self._saved or 0)

    def state_dict(self) -> dict[str, Any]:
        """This rank's entry; to be loaded from another world those of all its ranks, empty."""
        others = self._others()
        if others is not None:
            return {f"{_RANK}{rank}": b"" for rank in others}
        buffer = io.BytesIO()
        torch.save(self._state.state_dict(), buffer)
        return {f"{_RANK}{self._place()[0]}": buffer.getvalue()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes what was loaded: this rank's own, or its part of another world's.

        Raises:
            TypeError: An entry is none of pydist's.
            ValueError: As of the state's ``load_state_dict``.
        """
        others = self._others()
        if others is not None:
            self._state.load_state_dict([_read(saved, rank) for rank in others])
        else:
            self._state.load_state_dict(_read(saved, self._place()[0]))


def _read(saved: Mapping[str, Any], rank: int) -> dict[str, Any]:
    held = saved.get(f"{_RANK}{rank}")
    if not isinstance(held, bytes):
        raise TypeError(f"state: the entry of rank {rank} must be bytes, got {type(held).__name__}")
    state: dict[str, Any] = torch.load(io.BytesIO(held), weights_only=True)
    return state


def saved_world_size(checkpoint_id: str) -> int:
    """How many ranks saved the state in a checkpoint of torch.distributed.checkpoint.

    Args:
        checkpoint_id: Its directory.

    Raises:
        ValueError: It holds no state of pydist.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    entries = FileSystemReader(checkpoint_id).read_metadata().state_dict_metadata
    ranks = {name for key in entries if (name := key.rpartition(".")[2]).startswith(_RANK)}
    if not ranks:
        raise ValueError(f"checkpoint_id: {checkpoint_id!r} holds no state of pydist")
    return len(ranks)

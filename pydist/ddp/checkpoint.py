"""Residuals in checkpoints: a file a rank, or torch.distributed.checkpoint; other world sizes.

Residuals differ by rank. In a world of the same size every rank takes its own again and training
continues to the bit. In a world of another size an owner's residual first goes to its owner's
worker residual, weighted as it would have counted in the next result; then every new rank takes the
sum over the old ranks divided by their number, so that nothing unsent is lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from pydist.communicator import differences
from pydist.feedback import OwnerShare

if TYPE_CHECKING:
    from pydist.ddp.state import CompressionState

VERSION = 2
_RESIDUAL, _OWNER, _SPAN, _MOMENTUM = "residual/", "owner/", "owner_span/", "momentum/"
_SCALES = "loss_scales"


def shaped(flat: Tensor, param: Tensor) -> Tensor:
    """A view of what is flat in a parameter's memory order, in the parameter's shape."""
    if torch.ops.aten.is_non_overlapping_and_dense(param):
        return flat.as_strided(param.size(), param.stride())
    return flat.view(param.size())


def _real(param: Tensor) -> Tensor:
    """A parameter as its gradients lie in a bucket: complex numbers as two real ones."""
    return torch.view_as_real(param.detach()) if param.is_complex() else param


# --------------------------------------------------------------------------- a file a rank


def state_dict(state: CompressionState) -> dict[str, Any]:
    """See :meth:`pydist.ddp.CompressionState.state_dict`."""
    residuals = state.residuals
    parameters: dict[str, dict[str, Any]] = {}
    momenta = state.momenta.held
    for ordinal in sorted({*residuals.worker, *momenta}):
        param = state.parameters.tensors[ordinal]
        entry: dict[str, Any] = {}
        if ordinal in residuals.worker:
            entry["residual"] = shaped(residuals.worker[ordinal], param).clone()
        if ordinal in momenta:
            entry["momentum"] = shaped(momenta[ordinal], _real(param)).clone()
        share = residuals.owner.get(ordinal)
        if share is not None:
            entry["owner"] = share.values.clone()
            entry["owner_span"] = [share.first, share.last, int(share.whole)]
        parameters[state.parameters.names[ordinal]] = entry
    return {**_scalars(state), "rank": state.communicator.rank, "parameters": parameters}


def _scalars(state: CompressionState) -> dict[str, Any]:
    return {
        "version": VERSION,
        "world_size": state.communicator.world_size,
        "weight": state.residuals.weight,
        "step": state.step,
        "scale": state.scale,
        "rescaled": state.rescaled,
    }


def load_state_dict(
    state: CompressionState, saved: Mapping[str, Any] | Sequence[Mapping[str, Any]]
) -> None:
    """See :meth:`pydist.ddp.CompressionState.load_state_dict`."""
    rank, ranks = state.communicator.rank, state.communicator.world_size
    states = [saved] if isinstance(saved, Mapping) else list(saved)
    if not states:
        raise ValueError("state: an empty sequence")
    for i, one in enumerate(states):
        if one["version"] != VERSION:
            raise ValueError(f"state: version {one['version']}, this pydist reads {VERSION}")
        if not isinstance(saved, Mapping) and (one["rank"], one["world_size"]) != (i, len(states)):
            raise ValueError(
                f"state: entry {i} of {len(states)} was saved by rank {one['rank']} of "
                f"{one['world_size']}"
            )
        if one["step"] != states[0]["step"]:  # loss scales differ by rank in local steps
            found = [{"step": each["step"]} for each in states]
            text = differences(found, list(range(len(states))))
            raise ValueError(f"state: ranks saved at different moments: {text}")
        unknown = [name for name in one["parameters"] if state.parameters.ordinal_of(name) is None]
        if unknown:
            raise ValueError(f"state: parameters that the model does not have: {unknown[:5]}")
    if isinstance(saved, Mapping):
        if (saved["rank"], saved["world_size"]) != (rank, ranks):
            raise ValueError(
                f"state: saved by rank {saved['rank']} of {saved['world_size']}, loaded by rank "
                f"{rank} of {ranks}: give the states of all {saved['world_size']} ranks"
            )
        _take(state, saved)
    elif len(states) == ranks:
        _take(state, states[rank])
    else:
        _take_shares(state, states)


def _restore_scalars(state: CompressionState, saved: Mapping[str, Any]) -> None:
    state.residuals.clear()
    state.momenta.clear()
    state.restore(int(saved["step"]), saved["scale"], saved["rescaled"])


def _take(state: CompressionState, saved: Mapping[str, Any]) -> None:
    """Takes over a rank's own state as it was."""
    _restore_scalars(state, saved)
    for name, entry in saved["parameters"].items():
        ordinal, param = _find(state, name)
        if "residual" in entry:
            _put(state, ordinal, param, entry["residual"])
        if "momentum" in entry:
            _put_momentum(state, ordinal, param, entry["momentum"])
        if "owner" in entry:
            first, last, whole = (int(x) for x in entry["owner_span"])
            values = entry["owner"].to(state.communicator.device(param.device))
            if values.numel() != last - first or last > param.numel():
                raise ValueError(
                    f"state: {name!r} has {values.numel()} elements as owner of {first} … {last}"
                )
            share = OwnerShare(first, values.to(state.residuals.dtype).clone(), bool(whole))
            state.residuals.owner[ordinal] = share


def _find(state: CompressionState, name: str) -> tuple[int, Tensor]:
    ordinal = state.parameters.ordinal_of(name)
    assert ordinal is not None
    return ordinal, state.parameters.tensors[ordinal]


def _put(state: CompressionState, ordinal: int, param: Tensor, values: Tensor) -> None:
    if values.shape != param.shape:
        raise ValueError(
            f"state: residual of {state.parameters.names[ordinal]!r} has shape "
            f"{list(values.shape)}, the parameter {list(param.shape)}"
        )
    flat = torch.zeros(param.numel(), dtype=state.residuals.dtype, device=param.device)
    shaped(flat, param).copy_(values)
    state.residuals.worker[ordinal] = flat


def _put_momentum(state: CompressionState, ordinal: int, param: Tensor, values: Tensor) -> None:
    name, like = state.parameters.names[ordinal], _real(param)
    if not state.momenta.factor:
        raise ValueError(f"state: it holds the momentum of {name!r}, and momentum is 0.0 here")
    if values.shape != like.shape:
        raise ValueError(
            f"state: momentum of {name!r} has shape {list(values.shape)}, expected "
            f"{list(like.shape)}"
        )
    dtype = state.momenta.dtype_for(like.dtype)
    flat = torch.zeros(like.numel(), dtype=dtype, device=param.device)
    shaped(flat, like).copy_(values)
    state.momenta.held[ordinal] = flat


def _unit(saved: Mapping[str, Any]) -> float:
    """What a rank's residuals and momenta are multiplied by, against those of an unscaled loss."""
    scale = saved["scale"]
    return float(1.0 if scale is None else scale) * float(saved["rescaled"])


def _take_shares(state: CompressionState, states: Sequence[Mapping[str, Any]]) -> None:
    """Takes an equal part of what all old ranks had not sent, in the unit of rank 0's."""
    _restore_scalars(state, states[0])
    ratios = [_unit(states[0]) / _unit(one) for one in states]
    for name in dict.fromkeys(name for one in states for name in one["parameters"]):
        ordinal, param = _find(state, name)
        momenta = [one["parameters"].get(name, {}).get("momentum") for one in states]
        wide = [
            x.to(torch.promote_types(x.dtype, torch.float32)).cpu() * ratio
            for x, ratio in zip(momenta, ratios, strict=True)
            if x is not None
        ]
        if wide:
            _put_momentum(state, ordinal, param, torch.stack(wide).sum(0) / len(states))
        total = torch.zeros(param.numel())
        left = False
        for rank, one in enumerate(states):
            entry = one["parameters"].get(name, {})
            if "residual" not in entry:
                continue
            left, mine = True, torch.zeros(param.numel())
            shaped(mine, param).copy_(entry["residual"])
            if "owner" in entry:
                first, last, whole = (int(x) for x in entry["owner_span"])
                if not whole or rank == 0:  # a whole one is the same on all ranks
                    mine[first:last] += entry["owner"].float().cpu() * one["weight"]
            total += mine * ratios[rank]
        if left:
            _put(state, ordinal, param, shaped(total / len(states), param))


# --------------------------------------------------------------------------- distributed


class Sharded:
    """A state in the form that torch.distributed.checkpoint takes: DTensors [world, *shape].

    Sharded on dimension 0, so that every rank's residuals are kept (plain tensors under one key
    would lose all ranks but one). It is a ``Stateful``: put it into the dict that is saved or
    loaded.

    Args:
        state: The state; its parameters must have names.
        saved_world_size: Ranks that saved what is to be loaded, where they were not as many as now
            (:func:`saved_world_size` finds it); the result can then be loaded, not saved.
    """

    def __init__(self, state: CompressionState, saved_world_size: int | None = None) -> None:
        self._state = state
        self._ranks = state.communicator.world_size
        self._saved = saved_world_size or self._ranks

    def _parameters(self) -> Iterator[tuple[str, int, Tensor]]:
        for ordinal, name in self._state.parameters.with_residuals(self._state.options):
            yield name, ordinal, self._state.parameters.tensors[ordinal]

    def state_dict(self) -> dict[str, Any]:
        """All residuals, as DTensors; to be loaded from another world, as plain tensors."""
        result: dict[str, Any] = _scalars(self._state)
        scale = self._state.scale  # zero is no scale; scalars are kept of one rank only
        scales = torch.tensor([scale or 0.0, self._state.rescaled], dtype=torch.float64)
        result[_SCALES] = self._distributed(scales)
        for name, ordinal, param in self._parameters():
            for key, value in self._entries(name, ordinal, param):
                result[key] = self._distributed(value)
        for name, value in self._momenta():
            result[_MOMENTUM + name] = self._distributed(value)
        return result

    def _entries(self, name: str, ordinal: int, param: Tensor) -> Iterator[tuple[str, Tensor]]:
        residuals = self._state.residuals
        flat = residuals.worker.get(ordinal)
        zeros = torch.zeros(param.shape, dtype=residuals.dtype)
        yield _RESIDUAL + name, zeros if flat is None else shaped(flat, param).cpu().clone()
        share = residuals.owner.get(ordinal)
        whole = torch.zeros(param.numel(), dtype=residuals.dtype)
        span = [0, 0, 0]
        if share is not None:
            whole[share.first : share.last] = share.values.cpu()
            span = [share.first, share.last, int(share.whole)]
        yield _OWNER + name, whole
        yield _SPAN + name, torch.tensor(span)

    def _momenta(self) -> Iterator[tuple[str, Tensor]]:
        momenta = self._state.momenta
        if not momenta.factor:
            return
        for ordinal, name, param in self._state.parameters.trained():
            like, flat = _real(param), momenta.held.get(ordinal)
            zeros = torch.zeros(like.shape, dtype=momenta.dtype_for(like.dtype))
            yield name, zeros if flat is None else shaped(flat, like).cpu().clone()

    def _distributed(self, value: Tensor) -> Tensor:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        if self._saved != self._ranks:
            return value.new_zeros((self._saved, *value.shape))
        mesh = DeviceMesh("cpu", self._state.communicator.ranks, _init_backend=False)
        return DTensor.from_local(value.unsqueeze(0), mesh, [Shard(0)], run_check=False)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes what was loaded: this rank's own residuals, or its part of another world's."""
        other = self._saved != self._ranks
        tensors = {key: value for key, value in saved.items() if isinstance(value, Tensor)}
        rows: dict[str, Any] = {
            key: value if other else cast(Any, value).to_local() for key, value in tensors.items()
        }
        scalars = {key: value for key, value in saved.items() if key not in rows}
        if scalars["world_size"] != self._saved:
            raise ValueError(
                f"state: saved by {scalars['world_size']} ranks, loaded as of {self._saved}: use "
                f"state.sharded(saved_world_size={scalars['world_size']})"
            )
        states = []
        for row in range(self._saved if other else 1):
            parameters: dict[str, dict[str, Any]] = {}
            for name, _, _ in self._parameters():
                span = rows[_SPAN + name][row].tolist()
                entry: dict[str, Any] = {"residual": rows[_RESIDUAL + name][row]}
                if span[1] > span[0]:
                    entry["owner"] = rows[_OWNER + name][row][span[0] : span[1]]
                    entry["owner_span"] = span
                parameters[name] = entry
            for name, _ in self._momenta():
                parameters.setdefault(name, {})["momentum"] = rows[_MOMENTUM + name][row]
            rank = row if other else self._state.communicator.rank
            scale, rescaled = rows[_SCALES][row].tolist()
            own = {"scale": scale or None, "rescaled": rescaled, "rank": rank}
            states.append({**scalars, **own, "parameters": parameters})
        self._state.load_state_dict(states if other else states[0])


def saved_world_size(checkpoint_id: str) -> int:
    """How many ranks saved the state in a checkpoint of torch.distributed.checkpoint.

    Args:
        checkpoint_id: Its directory.

    Raises:
        ValueError: It holds no state of pydist.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entries = FileSystemReader(checkpoint_id).read_metadata().state_dict_metadata
    for key, entry in entries.items():
        if isinstance(entry, TensorStorageMetadata) and _saved_by_rank(key, entries):
            return int(entry.size[0])
    raise ValueError(
        f"checkpoint_id: {checkpoint_id!r} holds no state of pydist (residuals, momenta or "
        "loss scales)"
    )


def _saved_by_rank(key: str, entries: Mapping[str, Any]) -> bool:
    """Whether the first dimension of an entry is the ranks of a state of pydist."""
    if _SPAN in key:
        return True
    # A state without residuals, whose name could be another's: pydist saves these scalars beside.
    prefix = key.removesuffix(_SCALES)
    return prefix != key and {prefix + "rescaled", prefix + "weight"} <= entries.keys()

"""Residuals and momenta in checkpoints: a dict per rank, and other world sizes.

Residuals differ by rank. In a world of the same size every rank takes its own again and training
continues bit for bit. In a world of another size an owner's residual first goes to its owner's
worker residual, weighted as it would have counted in the next result; then every new rank takes the
sum over the old ranks divided by their number, so that nothing unsent is lost. On two levels a rank
keeps what belongs to its share of its node's sum: an old one counts as zeros elsewhere, and a new
one takes as much as all ranks of its node would together.

Loading is all or nothing: :func:`read` checks everything and changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pydist.training.kept import InNodes, Kept, Memory, Place, Span
from pydist.training.momentum import LARGEST, is_damaged
from pydist.training.orders import Order, Strided, contiguous
from pydist.training.residuals import OwnerShare
from pydist.transport.communicator import differences

VERSION = 2
_SCALARS: dict[str, tuple[type, ...]] = {
    "version": (int,), "world_size": (int,), "rank": (int,), "step": (int,),
    "weight": (int,), "scale": (float, int, type(None)), "rescaled": (float, int),
}  # fmt: skip
_ENTRY = ("residual", "momentum", "owner", "owner_span", "stride", "span", "size")
CPU = torch.device("cpu")

Saved = Mapping[str, Any]


# --------------------------------------------------------------------------- out


def state_dict(kept: Kept) -> dict[str, Any]:
    """All that is kept, by parameter name, in tensors of their own."""
    memory = kept.memory()
    parameters: dict[str, dict[str, Any]] = {}
    for ordinal in sorted({*memory.worker, *memory.momenta, *memory.owner}):
        order = memory.orders[ordinal]
        entry: dict[str, Any] = {}
        span = memory.spans.get(ordinal)
        for key, held in (("residual", memory.worker), ("momentum", memory.momenta)):
            if ordinal in held:
                values = held[ordinal]
                entry[key] = (order.shaped(values) if span is None else values).clone()
        if span is not None:
            entry |= {"span": list(span), "size": list(order.size)}
        share = memory.owner.get(ordinal)
        if share is not None:
            entry["owner"] = share.values.clone()
            entry["owner_span"] = [share.first, share.last, int(share.whole)]
        if isinstance(order, Strided):
            entry["stride"] = list(order.stride)
        parameters[kept.parameters.name_of(ordinal)] = entry
    return {
        "version": VERSION,
        "world_size": kept.ranks,
        "rank": kept.rank,
        "weight": kept.residuals.weight,
        "step": memory.step,
        "scale": memory.scale,
        "rescaled": memory.rescaled,
        "levels": None if kept.levels is None else list(kept.levels),
        "parameters": parameters,
    }


# --------------------------------------------------------------------------- in


def read(
    kept: Kept,
    saved: Saved | Sequence[Saved],
    rank: int,
    ranks: int,
    levels: InNodes | None = None,
) -> Memory:
    """Checks what was saved, and makes of it what a state takes over; changes nothing.

    Args:
        kept: Of the state that is going to take it.
        saved: A rank's own state, or those of all ranks of a world of any size, in rank order.
        rank: Who takes it.
        ranks: Of how many.
        levels: Its place on two levels.

    Raises:
        TypeError: Something has another type.
        ValueError: Something is missing, damaged, or belongs to another world or model.
    """
    if isinstance(saved, Mapping):
        one = _Rank(kept, saved, "state")
        if (one.rank, one.world_size) != (rank, ranks):
            raise ValueError(
                f"state: saved by rank {one.rank} of {one.world_size}, loaded by rank "
                f"{rank} of {ranks}: give the states of all {one.world_size} ranks"
            )
        if one.levels != levels:
            raise ValueError(
                f"state: saved as {_described(one.levels)}, loaded as {_described(levels)}: "
                f"give the states of all {one.world_size} ranks"
            )
        if moved := one.moved():
            raise ValueError(
                f"state: this rank's shares of {moved[:5]} are others now, as the blocks of their "
                f"codecs are: give the states of all {one.world_size} ranks"
            )
        return one.memory()
    if not isinstance(saved, Sequence) or isinstance(saved, str | bytes):
        raise TypeError(f"state must be a dict, or one for each rank, got {type(saved).__name__}")
    if not saved:
        raise ValueError("state: an empty sequence")
    every = [_Rank(kept, each, f"state of rank {i}") for i, each in enumerate(saved)]
    for i, one in enumerate(every):
        if (one.rank, one.world_size) != (i, len(every)):
            raise ValueError(
                f"state: entry {i} of {len(every)} was saved by rank {one.rank} of {one.world_size}"
            )
    if len({one.step for one in every}) > 1:  # loss scales differ by rank in local steps
        text = differences([{"step": one.step} for one in every], list(range(len(every))))
        raise ValueError(f"state: ranks saved at different moments: {text}")
    same = len(every) == ranks and every[rank].levels == levels
    if same and not any(one.moved() for one in every):
        return every[rank].memory()
    return _shared(kept, every, 1 if levels is None else levels.local)


def levels_of(saved: object) -> InNodes | None:
    """The levels that a rank's own state says it is of, unchecked; ``None`` where it says none."""
    levels = saved.get("levels") if isinstance(saved, Mapping) else None
    if isinstance(levels, list | tuple) and len(levels) == len(InNodes._fields):
        return InNodes(*levels)
    return None


def _described(levels: InNodes | None) -> str:
    if levels is None:
        return "a rank on one level"
    return f"rank {levels.local_rank} of {levels.local} in node {levels.node} of {levels.nodes}"


class _Rank:
    """One rank's saved state, checked.

    Args:
        kept: Of the state that is going to take it.
        saved: What was saved.
        where: What messages call it.
    """

    def __init__(self, kept: Kept, saved: object, where: str) -> None:
        self._kept, self._where = kept, where
        if not isinstance(saved, Mapping):
            raise TypeError(f"{where} must be a dict, got {type(saved).__name__}")
        missing = [key for key in (*_SCALARS, "parameters") if key not in saved]
        if missing:
            raise ValueError(f"{where}: it is none of pydist's, or not whole: no {missing}")
        for key, kinds in _SCALARS.items():
            if not isinstance(saved[key], kinds) or isinstance(saved[key], bool):
                raise TypeError(f"{where}: {key} must be a number, got {saved[key]!r}")
        if saved["version"] != VERSION:
            raise ValueError(f"{where}: version {saved['version']}, this pydist reads {VERSION}")
        self.rank, self.world_size, self.step = saved["rank"], saved["world_size"], saved["step"]
        self.scale, self.rescaled = saved["scale"], float(saved["rescaled"])
        self.weight, self.levels = saved["weight"], self._levels(saved.get("levels"))
        self._check_numbers()
        entries = saved["parameters"]
        if not isinstance(entries, Mapping):
            raise TypeError(f"{where}: parameters must be a dict, got {type(entries).__name__}")
        unknown = [name for name in entries if kept.parameters.ordinal_of(str(name)) is None]
        if unknown:
            raise ValueError(f"{where}: parameters that the model does not have: {unknown[:5]}")
        self.entries = {
            self._kept.parameters.ordinal_of(name): _Entry(kept, name, entry, where)
            for name, entry in entries.items()
        }

    def _levels(self, levels: Any) -> InNodes | None:
        if levels is None:
            return None
        whole = isinstance(levels, list | tuple) and all(type(x) is int for x in levels)
        if not whole or len(levels) != 4:
            raise TypeError(f"{self._where}: levels must be four integers, got {levels!r}")
        found = InNodes(*levels)
        fits = 0 <= found.node < found.nodes and 0 <= found.local_rank < found.local
        if not fits or found.nodes * found.local != self.world_size:
            raise ValueError(f"{self._where}: levels {list(found)} of {self.world_size} ranks")
        return found

    def moved(self) -> list[str]:
        """Parameters of which the rank's share would be another one now, by name."""
        name: Callable[[int], str] = self._kept.parameters.name_of
        return [
            name(ordinal)
            for ordinal, entry in self.entries.items()
            if ordinal is not None
            and entry.span is not None
            and self.levels is not None
            and (now := self._kept.share_of(ordinal, self.levels)) is not None
            and now != entry.span
        ]

    @property
    def local(self) -> int:
        """Ranks whose sum what is kept belongs to."""
        return 1 if self.levels is None else self.levels.local

    @property
    def first_holder(self) -> bool:
        """Whether it is the first of the ranks that hold what owners of whole parameters keep."""
        return self.rank == 0 if self.levels is None else self.levels.node == 0

    def _check_numbers(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"{self._where}: rank {self.rank} of {self.world_size}")
        if not 0 <= self.step < 2**63:
            raise ValueError(f"{self._where}: step must be in [0, 2**63), got {self.step}")
        if self.weight not in (1, self.world_size):
            raise ValueError(f"{self._where}: weight {self.weight} of {self.world_size} ranks")
        for name, value in (("scale", self.scale), ("rescaled", self.rescaled)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{self._where}: {name} must be positive, got {value}")

    @property
    def unit(self) -> float:
        """What its residuals and momenta are multiplied by, against those of an unscaled loss."""
        return float(1.0 if self.scale is None else self.scale) * self.rescaled

    def memory(self) -> Memory:
        """All of it, as it was."""
        memory = Memory(self.step, self.scale, self.rescaled)
        dtype = self._kept.residuals.dtype
        for ordinal, entry in self.entries.items():
            assert ordinal is not None
            order, device = entry.order, entry.place.device
            memory.orders[ordinal] = order
            if entry.span is not None:
                memory.spans[ordinal] = entry.span
            if entry.residual is not None:
                memory.worker[ordinal] = entry.flat(entry.residual, dtype, device)
            if entry.momentum is not None:
                kind = self._kept.momenta.dtype_for(entry.place.dtype)
                memory.momenta[ordinal] = entry.flat(entry.momentum, kind, device)
            if entry.owner is not None:
                values = entry.owner.to(device, dtype, copy=True)
                memory.owner[ordinal] = OwnerShare(entry.first, values, entry.whole)
        return memory


class _Entry:
    """What one rank kept of one parameter, checked.

    Attributes:
        place: Where it belongs.
        order: In which it was kept, and is.
        span: Which elements both are of, as ``order`` counts them; ``None``: all.
        residual: What the rank had not sent, in the parameter's shape, or flat where it has a span.
        momentum: Its momentum, likewise.
        owner: What it had not handed out as an owner, flat in ``order``, from element ``first`` on.
    """

    def __init__(self, kept: Kept, name: str, entry: object, where: str) -> None:
        self._what = f"{where}: {name!r}"
        if not isinstance(entry, Mapping):
            raise TypeError(f"{self._what} must be a dict, got {type(entry).__name__}")
        odd = [key for key in entry if key not in _ENTRY]
        if odd:
            raise ValueError(f"{self._what} has entries that are none of pydist's: {odd[:5]}")
        ordinal = kept.parameters.ordinal_of(name)
        assert ordinal is not None
        self.place = self._placed(kept, ordinal, entry)
        self.order = self._ordered(entry)
        self.span = self._spanned(entry)
        size = self.order.size if self.span is None else (self.span[1] - self.span[0],)
        self.residual = self._tensor(entry, "residual", size)
        self.momentum = self._tensor(entry, "momentum", size)
        if self.momentum is not None and not kept.momenta.factor:
            raise ValueError(f"{self._what}: it has a momentum, and momentum is 0.0 here")
        self.owner: Tensor | None = None
        self.first, self.whole = 0, False
        if "owner" in entry or "owner_span" in entry:
            self._take_owner(entry)

    def _placed(self, kept: Kept, ordinal: int, entry: Mapping[str, Any]) -> Place:
        place = kept.parameters.place(ordinal)
        if place is not None:
            return place
        # A parameter that the first backward will number: its own shape counts, and is compared
        # with the parameter's as soon as that is known.
        values, whole = entry.get("residual", entry.get("momentum")), entry.get("size")
        if not isinstance(values, Tensor):
            raise TypeError(f"{self._what} has neither a residual nor a momentum")
        size = tuple(values.shape) if whole is None else tuple(map(int, whole))
        return Place(Strided.in_steps(size, contiguous(size)), CPU, values.dtype)

    def _ordered(self, entry: Mapping[str, Any]) -> Order:
        """The order in which it was kept: of a state that does not say so the parameter's own."""
        order, stride = self.place.order, entry.get("stride")
        if stride is None:
            return order
        if not isinstance(order, Strided):
            raise ValueError(f"{self._what} has a stride, which a sharded parameter does not have")
        whole = isinstance(stride, list | tuple) and all(type(x) is int for x in stride)
        if not whole or len(stride) != len(order.size):
            raise ValueError(f"{self._what}: stride {stride!r} does not fit {list(order.size)}")
        found = Strided.in_steps(order.size, stride)
        if not found.is_dense:
            raise ValueError(f"{self._what}: stride {stride} leaves gaps in {list(order.size)}")
        return found

    def _tensor(
        self, entry: Mapping[str, Any], key: str, size: tuple[int, ...] | None
    ) -> Tensor | None:
        if key not in entry:
            return None
        values = entry[key]
        if not isinstance(values, Tensor) or values.layout != torch.strided:
            raise TypeError(f"{self._what}: {key} must be a tensor, got {type(values).__name__}")
        if not values.is_floating_point():
            raise TypeError(f"{self._what}: {key} must be of floats, got {values.dtype}")
        if size is not None and tuple(values.shape) != tuple(size):
            raise ValueError(
                f"{self._what}: {key} has shape {list(values.shape)}, expected {list(size)}"
            )
        if is_damaged(values.detach()):
            raise ValueError(
                f"{self._what}: {key} holds values that are not finite, or beyond {LARGEST:g}"
            )
        return values.detach()

    def _take_owner(self, entry: Mapping[str, Any]) -> None:
        span, numel = entry.get("owner_span"), math.prod(self.order.size)
        if not isinstance(span, list | tuple) or len(span) != 3 or any(
            type(x) is not int for x in span
        ):  # fmt: skip
            raise TypeError(f"{self._what}: owner_span must be three integers, got {span!r}")
        first, last, whole = span
        if not 0 <= first <= last <= numel or whole not in (0, 1):
            raise ValueError(f"{self._what}: owner_span {list(span)} of {numel} elements")
        if self.residual is None:
            raise ValueError(f"{self._what} has an owner's residual alone")
        self.owner = self._tensor(entry, "owner", (last - first,))
        if self.owner is None:
            raise ValueError(f"{self._what} has an owner_span, and no owner")
        self.first, self.whole = first, bool(whole)

    def _spanned(self, entry: Mapping[str, Any]) -> Span | None:
        span, numel = entry.get("span"), math.prod(self.order.size)
        if span is None:
            return None
        whole = isinstance(span, list | tuple) and all(type(x) is int for x in span)
        if not whole or len(span) != 2:
            raise TypeError(f"{self._what}: span must be two integers, got {span!r}")
        if not 0 <= span[0] <= span[1] <= numel:
            raise ValueError(f"{self._what}: span {list(span)} of {numel} elements")
        return span[0], span[1]

    def flat(self, values: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A new flat tensor of what was kept, of the elements that it is of."""
        if self.span is not None:
            return values.to(device, dtype, copy=True)
        return self.order.flat(values, dtype, device)

    def part_of(self, values: Tensor, local: int) -> Tensor:
        """What one rank has of a sum over ``local`` ranks, flat, zeros outside of its span.

        Without a span all of these ranks hold the whole of it.
        """
        dtype = torch.promote_types(values.dtype, torch.float32)
        if self.span is None:
            return self.order.flat(values, dtype, CPU).div_(local)
        flat = torch.zeros(math.prod(self.order.size), dtype=dtype, device=CPU)
        flat[self.span[0] : self.span[1]] = values.to(CPU, dtype)
        return flat

    def unsent(self, one: _Rank) -> Tensor:
        """All that a rank had not sent, as its own contribution weighs, in the shape."""
        assert self.residual is not None
        flat = self.part_of(self.residual, one.local)
        if self.owner is not None and (one.first_holder or not self.whole):
            last = self.first + self.owner.numel()
            flat[self.first : last] += self.owner.to(CPU, torch.float32) * one.weight
        return self.order.shaped(flat)


def _shared(kept: Kept, every: Sequence[_Rank], local: int) -> Memory:
    """An equal part of what all old ranks had not sent, in the unit of rank 0's.

    Args:
        kept: Of the state that is going to take it.
        every: The old ranks.
        local: Ranks of a new node, whose part together a new rank takes; its share is cut later.
    """
    memory = Memory(every[0].step, every[0].scale, every[0].rescaled)
    ratios = [every[0].unit / one.unit for one in every]
    for ordinal in dict.fromkeys(ordinal for one in every for ordinal in one.entries):
        assert ordinal is not None
        held = [
            (one, ratio, one.entries[ordinal])
            for one, ratio in zip(every, ratios, strict=True)
            if ordinal in one.entries
        ]
        # Any order will do, as the parts are put together by index.
        place = held[0][2].place
        order = memory.orders[ordinal] = place.order
        momenta = [
            entry.order.shaped(entry.part_of(entry.momentum, one.local)) * ratio
            for one, ratio, entry in held
            if entry.momentum is not None
        ]
        if momenta:
            dtype = kept.momenta.dtype_for(place.dtype)
            mean = torch.stack(momenta).sum(0) / len(every) * local
            memory.momenta[ordinal] = order.flat(mean, dtype, place.device)
        unsent = [
            entry.unsent(one) * ratio for one, ratio, entry in held if entry.residual is not None
        ]
        if unsent:
            total = sum(unsent[1:], unsent[0]) / len(every) * local
            if is_damaged(total):
                name = kept.parameters.name_of(ordinal)
                raise ValueError(f"state: {name!r}: the ranks' residuals have a sum out of bounds")
            memory.worker[ordinal] = order.flat(total, kept.residuals.dtype, place.device)
    return memory

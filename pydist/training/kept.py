"""What a state remembers from step to step: what is saved, loaded and copied with it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pydist.encoding.levels import bounds_in_node
from pydist.encoding.shares import Part
from pydist.training.momentum import Momenta
from pydist.training.options import Options
from pydist.training.orders import Order
from pydist.training.residuals import OwnerShare, Residuals

Span = tuple[int, int]
"""First element of a parameter, and one past the last."""


class InNodes(NamedTuple):
    """A rank's place among nodes with equally many ranks.

    Attributes:
        node: Its node.
        nodes: Of how many.
        local_rank: Its place in the node.
        local: Ranks of a node.
    """

    node: int
    nodes: int
    local_rank: int
    local: int


class Place(NamedTuple):
    """Where what is kept of a parameter belongs.

    Attributes:
        order: In which its elements lie.
        device: Where its gradients are.
        dtype: Of its gradients; of the parts of complex ones.
    """

    order: Order
    device: torch.device
    dtype: torch.dtype


class Names(Protocol):
    """Parameters by place and by name."""

    def ordinal_of(self, name: str) -> int | None:
        """The place of a name; ``None`` where there is none such."""
        ...

    def name_of(self, ordinal: int) -> str:
        """The name of a place."""
        ...

    def place(self, ordinal: int) -> Place | None:
        """Where what is kept of a parameter belongs; ``None`` while the parameter is unknown."""
        ...

    def tensor_of(self, ordinal: int) -> Tensor | None:
        """The parameter; ``None`` while it is unknown."""
        ...


@dataclass
class Memory:
    """Everything that a checkpoint restores.

    Attributes:
        step: Number of the next step.
        scale: The loss scale that the residuals follow, where there is a scaler.
        rescaled: What ``rescale()`` has multiplied the loss scale by.
        worker: Residuals of this rank, flat, by ordinal.
        owner: Those of its shares, as their owner.
        momenta: Momenta, flat.
        orders: In which order each of these lies in memory.
        spans: Which elements of a parameter they are of; without an entry all.
    """

    step: int = 0
    scale: float | None = None
    rescaled: float = 1.0
    worker: dict[int, Tensor] = field(default_factory=dict)
    owner: dict[int, OwnerShare] = field(default_factory=dict)
    momenta: dict[int, Tensor] = field(default_factory=dict)
    orders: dict[int, Order] = field(default_factory=dict)
    spans: dict[int, Span] = field(default_factory=dict)

    def copied(self) -> Memory:
        """The same with tensors of its own."""
        return replace(
            self,
            worker={i: x.clone() for i, x in self.worker.items()},
            owner={i: replace(x, values=x.values.clone()) for i, x in self.owner.items()},
            momenta={i: x.clone() for i, x in self.momenta.items()},
        )


class Kept:
    """What is kept for a model.

    Args:
        options: As the user gave them.
        parameters: The model's.

    Attributes:
        residuals: The rank's.
        momenta: The rank's.
        orders: In which order what is kept of a parameter lies in memory, by ordinal.
        spans: Which elements of a parameter residual and momentum are of, by ordinal: first, and
            one past the last. Without an entry all.
        step: Number of the next step.
        scale: The loss scale that the residuals follow, where there is a scaler.
        rescaled: What :meth:`rescale` has multiplied the loss scale by.
        rank: This rank, and of how many; of a state that was loaded or copied those of the original
            until it is bound to a group.
        ranks: How many there are.
        levels: This rank's place on two levels; ``None`` on one.
        loaded: It was loaded or copied, and what ranks must hold alike was not compared since.
    """

    def __init__(self, options: Options, parameters: Names) -> None:
        self.options, self.parameters = options, parameters
        self.residuals = Residuals(options.residual_dtype, 1, options.op == "mean")
        self.momenta = Momenta(options.momentum, options.residual_dtype)
        self.orders: dict[int, Order] = {}
        self.spans: dict[int, Span] = {}
        self.step = 0
        self.scale: float | None = None
        self.rescaled = 1.0
        self.rank, self.ranks = 0, 1
        self.levels: InNodes | None = None
        self.loaded = False

    def join(self, rank: int, ranks: int, levels: InNodes | None = None) -> None:
        """Learns this rank's place."""
        self.rank, self.ranks, self.levels = rank, ranks, levels
        self.residuals.join(ranks)

    @property
    def empty(self) -> bool:
        """Whether nothing has been kept yet that belongs to one rank of a world."""
        return not (self.residuals.worker or self.residuals.owner or self.momenta.held)

    # ----------------------------------------------------------------- in which order

    def arrange(self, ordinal: int, order: Order, span: Span | None = None) -> None:
        """Brings what is kept of a parameter into the order in which its gradients lie.

        Args:
            ordinal: The parameter.
            order: In which order its gradients lie.
            span: Which of its elements this rank encodes; ``None``: all.

        Raises:
            ValueError: It is of another shape, or of other elements.
        """
        self._turn(ordinal, order)
        if span is not None and self.spans.setdefault(ordinal, span) != span:
            raise ValueError(
                f"what the state keeps of {self.parameters.name_of(ordinal)!r} is of elements "
                f"{list(self.spans[ordinal])}, this rank's share is {list(span)}"
            )
        if span is not None:
            self.residuals.cut(ordinal, *span)
            self.momenta.cut(ordinal, *span)

    def _turn(self, ordinal: int, order: Order) -> None:
        before = self.orders.get(ordinal)
        self.orders[ordinal] = order
        if before is None or before == order:
            return
        if before.size != order.size or ordinal in self.spans:
            self.orders[ordinal] = before
            name = self.parameters.name_of(ordinal)
            if before.size == order.size:
                raise ValueError(
                    f"the memory format of {name!r} has changed: on two levels a rank keeps what "
                    "belongs to a share of its memory; choose the format before DDP is made"
                )
            raise ValueError(
                f"what the state keeps of {name!r} has shape {list(before.size)}, the parameter "
                f"{list(order.size)}"
            )

        def change(flat: Tensor) -> Tensor:
            return order.flat(before.shaped(flat), flat.dtype, flat.device)

        numel = int(np.prod(order.size))
        self.residuals.turn(Part(ordinal, 0, numel), change)
        self.momenta.turn(ordinal, change)

    def share_of(self, ordinal: int, levels: InNodes) -> Span | None:
        """A rank's share of a parameter; ``None`` while the parameter is unknown."""
        place, param = self.parameters.place(ordinal), self.parameters.tensor_of(ordinal)
        if place is None or param is None:
            return None
        part = Part(ordinal, 0, math.prod(place.order.size))
        unit = self.options.unit(self.parameters.name_of(ordinal), param)
        first, last = bounds_in_node([part], [unit], levels.local)[0, levels.local_rank].tolist()
        return first, last

    def shaped(self, ordinal: int, flat: Tensor) -> Tensor:
        """What is kept of a parameter, in its shape."""
        return self.orders[ordinal].shaped(flat)

    # ----------------------------------------------------------------- all of it

    def memory(self) -> Memory:
        """Everything, without copies: of steps whose residuals are staged it stays as it is."""
        worker, owner = self.residuals.snapshot()
        return Memory(
            self.step, self.scale, self.rescaled, worker, owner, dict(self.momenta.held),
            dict(self.orders), dict(self.spans),
        )  # fmt: skip

    def replace(self, memory: Memory) -> None:
        """Takes over all of it."""
        self.step, self.scale, self.rescaled = memory.step, memory.scale, memory.rescaled
        self.residuals.replace(memory.worker, memory.owner)
        self.momenta.held, self.orders = memory.momenta, memory.orders
        self.spans = memory.spans

    def load(self, memory: Memory) -> None:
        """Takes over what was saved."""
        self.replace(memory)
        self.loaded = True

    def take_back(self, memory: Memory) -> None:
        """Returns to what there was before a step that did not count."""
        orders, spans = self.orders, self.spans
        self.replace(memory)
        for ordinal, order in orders.items():
            self.arrange(ordinal, order, spans.get(ordinal))

    def multiply(self, ratio: float) -> None:
        """Follows a loss scale that was multiplied by ``ratio``."""
        self.residuals.rescale(ratio)
        self.momenta.rescale(ratio)

    def shared_digest(self) -> int:
        """Checksum of what all ranks must hold alike: the step, and residuals of whole owners."""
        digest = zlib.crc32(str(self.step).encode())
        for ordinal, share in sorted(self.residuals.owner.items()):
            if share.whole:
                digest = zlib.crc32(f"{ordinal} {share.first}".encode(), digest)
                values = share.values.cpu().view(torch.uint8)
                digest = zlib.crc32(values.numpy().tobytes(), digest)
        return digest

    def drop_damaged(self) -> tuple[list[str], list[str]]:
        """Drops elements of residuals and momenta that no step could have left.

        Returns:
            Names of parameters that had some, and of those where other ranks hold the same, so that
            they stay.
        """
        dropped, common = self.residuals.drop_damaged()
        moved = self.momenta.drop_damaged()
        name: Callable[[int], str] = self.parameters.name_of
        return [name(i) for i in sorted({*dropped, *moved})], [name(i) for i in common]

    def __getstate__(self) -> dict[str, Any]:
        held = {k: v for k, v in self.__dict__.items() if k not in ("residuals", "momenta")}
        # Copied here, as training may go on before the one who asked has written it.
        return {**held, "memory": self.memory().copied()}

    def __setstate__(self, held: dict[str, Any]) -> None:
        memory = held.pop("memory")
        self.__dict__.update(held)
        fresh = Kept(self.options, self.parameters)
        self.residuals, self.momenta = fresh.residuals, fresh.momenta
        self.residuals.join(self.ranks)
        self.load(memory)

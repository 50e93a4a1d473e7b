"""Parameters of a sharded model: by place and by name, and how they travel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pydist.encoding.choose import bytes_in_bucket
from pydist.encoding.plans import Shards
from pydist.training.kept import Place
from pydist.training.names import named_parameters
from pydist.training.options import Choice, Options


@dataclass(frozen=True)
class Parameter:
    """One parameter of a sharded model.

    Attributes:
        name: Its name, without wrappers.
        ordinal: Its place in ``named_parameters()``.
        shape: Its shape before it was sharded.
        dtype: Of its shards.
        device: Where it computes.
        dim: The dimension along which it is sharded.
        ranks: Over how many ranks.
        requires_grad: Whether it was trained when the state was made.
    """

    name: str
    ordinal: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    dim: int
    ranks: int
    requires_grad: bool

    @property
    def numel(self) -> int:
        """Elements before it was sharded."""
        return self.shape.numel()

    def like(self) -> Tensor:
        """A tensor of its shape, without memory of its own."""
        return torch.empty(1, dtype=self.dtype, device=self.device).expand(self.shape)


@dataclass(frozen=True)
class ByShard:
    """The order in which residuals of a sharded parameter lie: all ranks' shards in rank order.

    Attributes:
        size: The parameter's shape.
        dim: The dimension along which it is sharded.
        ranks: Over how many ranks.
    """

    size: tuple[int, ...]
    dim: int
    ranks: int

    def shaped(self, flat: Tensor) -> Tensor:
        """A view where it is sharded along its first dimension, else a new tensor."""
        if self.dim == 0:
            return flat.view(self.size)
        part = list(self.size)
        part[self.dim] //= self.ranks
        return torch.cat([shard.view(part) for shard in flat.chunk(self.ranks)], self.dim)

    def flat(self, values: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A new flat tensor."""
        values = values.to(device, dtype)
        if self.dim == 0:
            return values.reshape(-1).clone()
        return torch.cat([shard.reshape(-1) for shard in values.chunk(self.ranks, self.dim)])


def unsharded(module: nn.Module) -> list[Parameter]:
    """The parameters of a model that is not sharded, in a single process."""
    return [
        Parameter(name, i, param.shape, param.dtype, param.device, 0, 1, param.requires_grad)
        for i, (name, param) in enumerate(named_parameters(module))
    ]


class Parameters:
    """The parameters of a sharded model by place and by name.

    Args:
        parameters: All of them, in the order of ``named_parameters()``.

    Attributes:
        names: Of all.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._all = {parameter.ordinal: parameter for parameter in parameters}
        self._ordinals = {parameter.name: parameter.ordinal for parameter in parameters}
        self.names = list(self._ordinals)

    def __getitem__(self, ordinal: int) -> Parameter:
        return self._all[ordinal]

    def ordinal_of(self, name: str) -> int | None:
        """The place of a name; ``None`` where there is none such."""
        return self._ordinals.get(name)

    def name_of(self, ordinal: int) -> str:
        """The name of a place."""
        return self._all[ordinal].name

    def place(self, ordinal: int) -> Place:
        """Where what is kept of a parameter belongs."""
        one = self._all[ordinal]
        return Place(ByShard(tuple(one.shape), one.dim, one.ranks), one.device, one.dtype)

    def tensor_of(self, ordinal: int) -> None:
        """None are kept."""

    def described(self) -> dict[str, Any]:
        """Name, dtype, shape and sharded dimension of all: equal on all ranks."""
        return {
            f"parameter {i}": [one.name, str(one.dtype), list(one.shape), one.dim]
            for i, one in self._all.items()
        }

    def named(self) -> Iterable[tuple[str, Tensor]]:
        """Names, and tensors without memory of their own, of those that are trained."""
        return [(one.name, one.like()) for one in self._all.values() if one.requires_grad]

    def with_residuals(self, options: Options) -> Iterable[tuple[int, str]]:
        """Place and name of every parameter that keeps residuals."""
        for ordinal, one in self._all.items():
            if one.requires_grad and options.choose(one.name, one.like(), torch.float32).feedback:
                yield ordinal, one.name


def choose(
    options: Options, parameter: Parameter, given: Tensor, shards: Shards, dtype: torch.dtype
) -> Choice:
    """How a sharded parameter travels as values of ``dtype``; a predicate sees ``given``."""
    choice = options.choose(parameter.name, parameter.like(), dtype)
    if choice.codec is not None and callable(options.exclude):
        choice = options.choose(parameter.name, given, dtype)
    if choice.codec is None:
        return choice
    # Every shard has blocks of its own, and the last of them is filled up.
    most = max(shards.numel)
    if (size := bytes_in_bucket(choice.codec, most)) and size >= most * dtype.itemsize:
        return Choice(None, reason="would not be smaller", too_small=True)
    return choice

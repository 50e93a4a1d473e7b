"""The parameters of a DDP model by place and by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pydist.training.buffers import real
from pydist.training.kept import Place
from pydist.training.names import named_parameters, plain_names
from pydist.training.orders import Strided, contiguous

Named = Iterable[tuple[str, Tensor]] | nn.Module
"""Parameters with their names, or the model that has them."""

_NUMBERED = "parameter "


class Parameters:
    """The parameters of a model by place and by name.

    Without names they are numbered as the first backward hands them out.

    A copy (``copy``, ``pickle``) has names, shapes and dtypes, and no tensors: :meth:`attach`.

    Args:
        named: ``model.named_parameters()``, or the model, whose wrappers are then known by their
            types; ``None`` numbers them.

    Attributes:
        named: Whether they have names.
        names: By place.
        shapes: By place.
        dtypes: By place.
        tensors: By place; empty in a copy that was not attached.

    Raises:
        TypeError: What was given holds anything but names and tensors.
        ValueError: Two have one name.
    """

    def __init__(self, named: Named | None) -> None:
        self.named = named is not None
        self.names: list[str] = []
        self.shapes: list[torch.Size] = []
        self.dtypes: list[torch.dtype] = []
        self.tensors: list[Tensor] = []
        self._places: dict[Tensor, int] = {}
        self._ordinals: dict[str, int] = {}
        for name, param in () if named is None else _checked(named):
            self._add(name, param)

    def _add(self, name: str, param: Tensor) -> int:
        if name in self._ordinals:
            raise ValueError(f"named_parameters: two parameters are called {name!r}")
        self._places[param] = self._ordinals[name] = ordinal = len(self.names)
        self.names.append(name)
        self.shapes.append(param.shape)
        self.dtypes.append(param.dtype)
        self.tensors.append(param)
        return ordinal

    def ordinal(self, param: Tensor) -> int:
        """A parameter's place.

        Raises:
            ValueError: There are names, and none is the parameter's.
        """
        place = self._places.get(param)
        if place is not None:
            return place
        if self.named and len(self.tensors) < len(self.names):
            raise ValueError(
                "this state is a copy and does not know the model: give it to it with "
                "pydist.ddp.compress(model, state)"
            )
        if self.named:
            raise ValueError("a bucket holds a parameter that named_parameters did not name")
        if len(self.tensors) < len(self.names):  # a copy, whose places are those of the original
            return self._place_again(param)
        return self._add(f"{_NUMBERED}{len(self.names)}", param)

    def _place_again(self, param: Tensor) -> int:
        ordinal = len(self.tensors)
        wanted, found = self.shapes[ordinal], param.shape
        if wanted != found:
            raise ValueError(
                f"{self.names[ordinal]} of this copied state has shape {list(wanted)}, the "
                f"model's {list(found)}"
            )
        self.tensors.append(param)
        self._places[param] = ordinal
        return ordinal

    def ordinal_of(self, name: str) -> int | None:
        """The place of a name; ``None`` where there is none such.

        Numbers have a place before their parameters are known.
        """
        number = name.removeprefix(_NUMBERED)
        if not self.named and number != name and number.isdecimal() and str(int(number)) == number:
            return int(number)
        return self._ordinals.get(name)

    def name_of(self, ordinal: int) -> str:
        """The name of a place."""
        known = self.named or ordinal < len(self.names)
        return self.names[ordinal] if known else f"{_NUMBERED}{ordinal}"

    def knows(self, param: Tensor) -> bool:
        """Whether a tensor is one of them."""
        return param in self._places

    def place(self, ordinal: int) -> Place | None:
        """Where what is kept of a parameter belongs; ``None`` while the parameter is unknown."""
        if ordinal < len(self.tensors):
            param = real(self.tensors[ordinal])
            return Place(Strided.of(param), param.device, param.dtype)
        if ordinal >= len(self.names):
            return None
        dtype, size = self.dtypes[ordinal], tuple(self.shapes[ordinal])
        if dtype.is_complex:
            dtype, size = dtype.to_real(), (*size, 2)
        return Place(Strided.in_steps(size, contiguous(size)), torch.device("cpu"), dtype)

    def tensor_of(self, ordinal: int) -> Tensor | None:
        """A parameter; ``None`` while it is unknown."""
        return self.tensors[ordinal] if ordinal < len(self.tensors) else None

    @property
    def device(self) -> torch.device:
        """Where they are; the host as long as that is unknown."""
        return self.tensors[0].device if self.tensors else torch.device("cpu")

    def described(self) -> dict[str, Any]:
        """Name, dtype and shape of all, where they have names: equal on all ranks."""
        if not self.named:
            return {}
        fields: dict[str, Any] = {"parameters": len(self.names)}
        described = zip(self.names, self.dtypes, self.shapes, strict=True)
        for i, (name, dtype, shape) in enumerate(described):
            fields[f"parameter {i}"] = [name, str(dtype), list(shape)]
        return fields

    def attach(self, named: Named) -> None:
        """Gives names to parameters that have none, or to a copy its tensors.

        Raises:
            ValueError: The names or shapes are others.
        """
        fresh = Parameters(named)
        if self.named and (fresh.names, fresh.shapes) != (self.names, self.shapes):
            mine = set(zip(self.names, self.shapes, strict=True))
            theirs = set(zip(fresh.names, fresh.shapes, strict=True))
            odd = sorted(name for name, _ in mine ^ theirs)[:5] or ["their order"]
            raise ValueError(f"the state is of a model with other parameters: {odd}")
        self.__dict__.update(fresh.__dict__)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tensors": [], "_places": {}}


def _checked(named: Named) -> Iterable[tuple[str, Tensor]]:
    """Plain names and their parameters; one that is there twice (shared weights) counts once."""
    if isinstance(named, nn.Module):
        yield from named_parameters(named)
        return
    pairs = list(named)
    for pair in pairs:
        proper = isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)
        if not proper or not isinstance(pair[1], Tensor):
            raise TypeError(
                "named_parameters must hold pairs of a name and a tensor, as "
                f"model.named_parameters() does, got {type(pair).__name__}"
            )
    seen: set[Tensor] = set()
    names = plain_names([name for name, _ in pairs])
    for name, (_, param) in zip(names, pairs, strict=True):
        if param not in seen:
            seen.add(param)
            yield name, param

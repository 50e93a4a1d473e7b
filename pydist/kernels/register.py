"""Kernels as people call them: one function for tensors and arrays alike.

A family's module declares each of its kernels once, as a function that checks its arguments and
launches. :func:`kernel` adds what all have in common: errors that name an argument of a wrong type,
and, where something of torch's looks at operators, the way through ``torch.ops.pydist``.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pydist.kernels.arguments import explain
from pydist.kernels.libraries import stacked

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    A = TypeVar("A", Tensor, npt.NDArray[Any])
    """A tensor, or an array of NumPy or CuPy; arguments and results of one call are alike."""

F = TypeVar("F", bound=Callable[..., Any])
Shape = tuple[int | None, ...]
"""A shape; ``None`` for a length that depends on the values of an argument."""
Rule = Callable[[Mapping[str, Any]], tuple[Shape, str]]
"""Shape and dtype of a result, from the arguments by name; tensors among them hold no values."""


@dataclass(frozen=True)
class CodecFields:
    """How a codec travels through an operator's schema: as the fields of a dataclass.

    Attributes:
        form: The dataclass; its fields are integers, floats, booleans and strings.
        of: An instance of it, from what the caller gives as the codec.
    """

    form: type[Any]
    of: Callable[[Any], Any]

    @property
    def names(self) -> list[str]:
        """Names of the fields."""
        return [field.name for field in fields(self.form)]


@dataclass(frozen=True)
class Kernel:
    """A kernel of the list.

    Attributes:
        function: What checks the arguments and launches.
        writes: Arguments that it changes.
        result: Shape and dtype of its result; ``None`` where it has none.
        codec: How its codec travels; ``None`` where it has none.
        returns: The argument that it gives back in place of a result.
    """

    function: Callable[..., Any]
    writes: tuple[str, ...]
    result: Rule | None
    codec: CodecFields | None
    returns: str | None

    @property
    def name(self) -> str:
        """Its name, in ``pydist.ops`` and ``torch.ops.pydist``."""
        return self.function.__name__

    @property
    def parameters(self) -> list[str]:
        """Names of its parameters, in order."""
        return list(inspect.signature(self.function).parameters)


KERNELS: dict[str, Kernel] = {}
"""All kernels, by name."""


def _look_for_torch(first: object) -> bool:
    """What :func:`pydist.kernels.operators.watched` says, which takes this one's place."""
    if "torch" not in sys.modules:
        return False
    return bool(importlib.import_module("pydist.kernels.operators").watched(first))


_watched: Callable[[object], bool] = _look_for_torch
"""Whether something of torch's looks at operators: compilation, a mode, a profiler."""
_operators: Any = None  # pydist.kernels.operators, once torch is there


def kernel(
    *,
    result: Rule | None = None,
    writes: tuple[str, ...] = (),
    codec: CodecFields | None = None,
    returns: str | None = None,
) -> Callable[[F], F]:
    """Declares a kernel; see :class:`Kernel` for the arguments."""

    def declare(function: F) -> F:
        entry = Kernel(function, writes, result, codec, returns)
        KERNELS[entry.name] = entry
        first_name, declared = next(iter(inspect.signature(function).parameters.items()))
        takes_sequence = "Sequence" in str(declared.annotation)

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            try:
                first: Any = args[0] if args else options.get(first_name)
                if takes_sequence and type(first) in (list, tuple):
                    first = stacked(first_name, first)
                    args, options = (first, *args[1:]), _without(first_name, options)
                if type(first) is not np.ndarray and _watched(first):
                    return _operators.call(entry, args, options)
                return function(*args, **options)
            except Exception as error:
                explain(function, args, options, error)
                raise

        call.kernel = entry  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return declare


def _without(name: str, options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != name}

"""Clear errors for arguments of a wrong type, at no cost to calls that are right.

A wrong type is noticed wherever it first does not fit, deep inside a call, and the error speaks of
that place. So once a call has failed its arguments are compared with the function's annotations.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable
from numbers import Real
from typing import Any, ParamSpec, TypeVar

import numpy as np

P = ParamSpec("P")
R = TypeVar("R")


def _is_int(value: object) -> bool:
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def _is_tensor(value: object) -> bool:
    """Whether something is a tensor; torch need not be there."""
    return any(f"{kind.__module__}.{kind.__name__}" == "torch.Tensor" for kind in type(value).mro())


def _is_array(value: object) -> bool:
    interfaces = ("__array_interface__", "__cuda_array_interface__", "__dlpack__")
    return any(hasattr(value, name) for name in interfaces) or _is_tensor(value)


# What an annotation asks for, and whether a value is that. Others are not looked at.
_KINDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "A": ("a tensor, or a NumPy or CuPy array", _is_array),
    "Sequence[A]": ("a sequence of them", lambda value: isinstance(value, list | tuple)),
    "int": ("an int", _is_int),
    "float": ("a number", lambda value: isinstance(value, Real | np.number)),
    "bool": ("a bool", lambda value: isinstance(value, bool | np.bool_)),
    "str": ("a str", lambda value: isinstance(value, str)),
    "None": ("None", lambda value: value is None),
}


def shown(value: object) -> str:
    """A value as a message shows it: scalars and codecs whole, of anything else its type."""
    whole = isinstance(value, str | Real | None) or (
        dataclasses.is_dataclass(value) and not isinstance(value, type)
    )
    return repr(value) if whole else type(value).__name__


def wrong_argument(function: Callable[..., Any], args: Any, options: Any) -> str:
    """Which argument is of another type than its annotation; empty where none is, or is missing."""
    signature = inspect.signature(function)
    try:
        bound = signature.bind(*args, **options)
    except TypeError:  # Python's own message names what is missing or unknown
        return ""
    for name, value in bound.arguments.items():
        kinds = str(signature.parameters[name].annotation).split(" | ")
        if not all(kind in _KINDS for kind in kinds):
            continue
        if not any(_KINDS[kind][1](value) for kind in kinds):
            wanted = " or ".join(_KINDS[kind][0] for kind in kinds if kind != "None")
            scalar = "A" not in kinds or value is None
            got = shown(value) if scalar else type(value).__name__
            return f"{name} must be {wanted}, got {got}"
        layout = str(getattr(value, "layout", "torch.strided"))
        if layout != "torch.strided":
            return f"{name} must be dense, got layout {layout}"
    return ""


def explain(function: Callable[..., Any], args: Any, options: Any, error: Exception) -> None:
    """Raises TypeError where an argument of a call that failed has a wrong type."""
    wrong = wrong_argument(function, args, options)
    if wrong and wrong != str(error):
        raise TypeError(wrong) from error


def explained(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose errors name an argument of a wrong type.

    Args:
        function: Its annotations must be strings (postponed).
    """

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        try:
            return function(*args, **options)
        except Exception as error:
            explain(function, args, options, error)
            raise

    return call

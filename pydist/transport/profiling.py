"""Ranges of a call's phases in the traces of ``torch.profiler``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch.autograd import profiler

P = ParamSpec("P")
T = TypeVar("T")


def phase(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Shows a function's time as a range; costs next to nothing where no profiler runs."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            # torch's own switch for ranges that are not free; without it they are always made.
            if not getattr(profiler, "_is_profiler_enabled", True):
                return function(*args, **kwargs)
            with profiler.record_function(name):
                return function(*args, **kwargs)

        return run

    return decorate

"""pydist: data-parallel training where the network is slow.

Optimizer updates travel as one bit a parameter. ``import pydist`` needs NumPy alone;
what needs torch is imported when it is first used.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from pydist.wire import WIRE_VERSION, segments

if TYPE_CHECKING:
    from pydist import (
        arrays,
        codecs,
        collectives,
        ddp,
        feedback,
        fsdp,
        ops,
        optim,
        reference,
        reference_blocks,
        reference_raw,
        reference_ternary,
        reference_topk,
        simulate,
    )
    from pydist.codecs import QSGD, BlockFloat, BlockInt, Codec, Raw, Sign, Ternary, TopK
    from pydist.collectives import all_gather, all_reduce, reduce_scatter
    from pydist.errors import MismatchError, PydistError
    from pydist.training.replicas import check_replicas

try:
    __version__ = version("pydist")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_MODULES = {
    "arrays", "codecs", "collectives", "ddp", "errors", "feedback", "fsdp", "ops", "optim",
    "reference", "reference_blocks", "reference_raw", "reference_ternary",
    "reference_topk", "simulate",
}  # fmt: skip
_HOMES = {
    "BlockFloat": "codecs",
    "BlockInt": "codecs",
    "Codec": "codecs",
    "QSGD": "codecs",
    "Raw": "codecs",
    "Sign": "codecs",
    "Ternary": "codecs",
    "TopK": "codecs",
    "all_gather": "collectives",
    "all_reduce": "collectives",
    "check_replicas": "training.replicas",
    "reduce_scatter": "collectives",
    "PydistError": "errors",
    "MismatchError": "errors",
}

__all__ = [
    "QSGD",
    "WIRE_VERSION",
    "BlockFloat",
    "BlockInt",
    "Codec",
    "MismatchError",
    "PydistError",
    "Raw",
    "Sign",
    "Ternary",
    "TopK",
    "all_gather",
    "all_reduce",
    "arrays",
    "check_replicas",
    "codecs",
    "collectives",
    "ddp",
    "feedback",
    "fsdp",
    "ops",
    "optim",
    "reduce_scatter",
    "reference",
    "reference_blocks",
    "reference_raw",
    "reference_ternary",
    "reference_topk",
    "segments",
    "simulate",
]


if not TYPE_CHECKING:  # else every name would be there, of any type

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f"pydist.{name}")
        if name in _HOMES:
            return getattr(importlib.import_module(f"pydist.{_HOMES[name]}"), name)
        raise AttributeError(f"module 'pydist' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))

"""pydist: data-parallel training where the network is slow.

Optimizer updates travel as one bit per parameter. ``import pydist`` needs NumPy alone;
what needs torch is imported when it is first used.
"""

from __future__ import annotations

import importlib
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from pydist.formats.wire import WIRE_VERSION, segments

if TYPE_CHECKING:
    from pydist import arrays, codecs, collectives, ddp, fsdp, ops, optim, reference, simulate
    from pydist.codecs import QSGD, BlockFloat, BlockInt, Codec, Raw, Sign, Ternary, TopK
    from pydist.collectives import all_gather, all_reduce, reduce_scatter
    from pydist.errors import MismatchError, PydistError
    from pydist.training.replicas import check_replicas

try:
    __version__ = version("pydist-train")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_MODULES = {
    "arrays", "codecs", "collectives", "ddp", "errors", "fsdp", "ops", "optim", "reference",
    "simulate",
}  # fmt: skip
_MOVED = {  # modules of older releases
    "blocks": "formats.blocks",
    "elias": "formats.elias",
    "environment": "kernels.environment",
    "feedback": "training.residuals",
    "reference_blocks": "reference.blocks",
    "reference_elias": "reference.elias",
    "reference_raw": "reference.raw",
    "reference_ternary": "reference.ternary",
    "reference_topk": "reference.topk",
    "ternary": "formats.ternary",
    "topk": "formats.topk",
    "wire": "formats.wire",
}
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
    "fsdp",
    "ops",
    "optim",
    "reduce_scatter",
    "reference",
    "segments",
    "simulate",
]


if not TYPE_CHECKING:  # else every name would be there, of any type

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f"pydist.{name}")
        if name in _HOMES:
            found = getattr(importlib.import_module(f"pydist.{_HOMES[name]}"), name)
            globals()[name] = found  # the next use finds it at once
            return found
        if name in _MOVED:
            home = f"pydist.{_MOVED[name]}"
            warnings.warn(f"pydist.{name} is now {home}", DeprecationWarning, stacklevel=2)
            return importlib.import_module(home)
        if name == "_C":  # whatever needs it comes by here first
            try:
                return importlib.import_module("pydist._C")
            except ModuleNotFoundError as error:
                raise ImportError(
                    f"pydist._C, the compiled module, is not in {__path__[0]}: in a checkout run "
                    "'pip install -e .' or 'make build', or leave its folder to use what is "
                    "installed elsewhere"
                ) from error
        raise AttributeError(f"module 'pydist' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))

"""What was built and what this machine has; needs neither torch nor a GPU."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydist import _C
from pydist.formats import wire


def package_version(name: str) -> str | None:
    """Installed version of a package, without importing it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def torch_sees_cuda() -> bool:
    """Whether torch is installed and has a CUDA device."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def has_cupy() -> bool:
    """Whether CuPy can be imported."""
    return importlib.util.find_spec("cupy") is not None


def cuda_devices() -> list[str]:
    """Names of the CUDA devices that the compiled module sees; empty without CUDA or a driver."""
    if _C.CUDA_BUILD is None:
        return []
    return [_C.cuda.device_name(i) for i in range(_C.cuda.device_count())]


def describe() -> dict[str, Any]:
    """What ``pydist info`` prints.

    Returns:
        Values that JSON can hold. ``isa`` is ``None`` where ``PYDIST_ISA`` names an instruction set
        that is not there; ``isa_error`` then says so.
    """
    from pydist import __version__

    isa: str | None = None
    isa_error: str | None = None
    try:
        isa = _C.current_isa()
    except ValueError as error:
        isa_error = str(error)
    return {
        "version": __version__,
        "wire_version": wire.WIRE_VERSION,
        "python": platform.python_version(),
        "numpy": package_version("numpy"),
        "torch": package_version("torch"),
        "isa": isa,
        "isa_error": isa_error,
        "supported_isas": _C.supported_isas(),
        "cuda_build": _C.CUDA_BUILD,
        "cuda_devices": cuda_devices(),
    }

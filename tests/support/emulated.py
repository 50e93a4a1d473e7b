"""The CUDA kernels on the CPU: loads the emulated module and steers it. See docs/emulation.md."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import importlib.util
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from guarded import guarded, guarded_bytes

from pydist import selfcheck
from pydist.kernels import libraries
from pydist.kernels.checks import ArrayInfo
from pydist.kernels.launch import LaunchTarget

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("PYDIST_EMULATED", ROOT / "build" / "emulation"))
LIBRARY = FOLDER / "libpydist_emulated.so"

# 0 runs blocks, warps and lanes in order; others permute them, each launch in its own way.
SEEDS = (0, 1, 2)


def _load() -> Any:
    found = sorted(FOLDER.glob(f"_C_emulated*{importlib.machinery.EXTENSION_SUFFIXES[0]}"))
    if not found:
        return None
    spec = importlib.util.spec_from_file_location("_C_emulated", found[0])
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def changed_since_built() -> list[str]:
    """Sources newer than an object that was made from them, as Ninja remembers it."""
    cache = (FOLDER / "CMakeCache.txt").read_text()
    ninja = re.search(r"^CMAKE_MAKE_PROGRAM:\w+=(.*)$", cache, re.MULTILINE)
    assert ninja
    deps = subprocess.run(
        [ninja[1], "-C", FOLDER, "-t", "deps"], capture_output=True, text=True, check=True
    )
    newer, built = set(), 0.0
    for line in deps.stdout.splitlines():
        if line and not line.startswith(" "):
            built = (FOLDER / line.split(":")[0]).stat().st_mtime
        elif line.startswith(f"    {ROOT}") and Path(line[4:]).stat().st_mtime > built:
            newer.add(line[4:])
    return sorted(newer)


MODULE = _load()
MARKS = (
    pytest.mark.emulated,
    pytest.mark.skipif(MODULE is None, reason="the emulated kernels are not built: `make emulate`"),
)


class Emulator:
    """The library that runs kernels: an order of threads, and what it counted."""

    COUNTERS = ("functions", "launches", "blocks", "threads", "meetings", "accesses")

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.emulation_configure.argtypes = [ctypes.c_uint64, ctypes.c_int]

    def configure(self, seed: int, *, races: bool = True) -> None:
        """Sets the order of the launches that follow, and whether data races end them."""
        self.library.emulation_configure(seed, races)

    def restart(self) -> None:
        """The launches that follow take the orders of those after the last restart."""
        self.library.emulation_restart()

    def counters(self) -> dict[str, int]:
        out = (ctypes.c_uint64 * len(self.COUNTERS))()
        self.library.emulation_counters(out)
        return dict(zip(self.COUNTERS, out, strict=True))


EMULATOR = Emulator(LIBRARY) if MODULE is not None else None
LAUNCHED: Counter[str] = Counter()
"""Calls of kernels, by name."""


class _Counted:
    """`_C_emulated.cuda`, counting calls."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(MODULE.cuda, name)

        def counted(*args: Any) -> None:
            LAUNCHED[name] += 1
            function(*args)

        return counted


class _Module:
    cuda = _Counted()


def target() -> LaunchTarget:
    """Where emulated kernels run: device memory is the host's, a stream is order only."""

    def upload(rows: Any) -> tuple[int, object]:
        table = guarded(rows, at_end=True)
        return table.__array_interface__["data"][0], table

    def scratch(size: int) -> tuple[int, object]:
        room = _GuardedNumPy.empty(size, np.uint8)
        return room.__array_interface__["data"][0], room

    return LaunchTarget(stream=0, upload=upload, scratch=scratch, module=_Module)


class Memory(selfcheck.HostMemory):
    """Guarded arrays for emulated kernels."""

    def __init__(self, seed: int, *, at_end: bool = True) -> None:
        super().__init__("none")
        self.name = f"emulated cuda, seed {seed}"
        self.seed = seed
        self.at_end = at_end

    def put(self, array: Any) -> Any:
        return guarded(array, at_end=self.at_end)

    def device(self) -> str:
        return "cuda:0"

    def target(self) -> LaunchTarget:
        assert EMULATOR is not None
        EMULATOR.configure(self.seed)
        return target()


class _GuardedNumPy:
    """NumPy for the door: new arrays end at a forbidden page."""

    @staticmethod
    def empty(shape: Any, dtype: Any) -> Any:
        dtype, shape = np.dtype(dtype), (shape,) if isinstance(shape, int) else shape
        size = int(np.prod(shape)) * dtype.itemsize
        fresh = guarded_bytes(size, at_end=True)
        fresh[...] = 0xA5
        return fresh.view(dtype).reshape(shape)

    @classmethod
    def zeros(cls, shape: Any, dtype: Any) -> Any:
        fresh = cls.empty(shape, dtype)
        fresh[...] = 0
        return fresh

    may_share_memory = staticmethod(np.may_share_memory)

    @staticmethod
    def ascontiguousarray(x: Any) -> Any:
        return x if x.flags.c_contiguous else guarded(np.ascontiguousarray(x), at_end=True)


class _Arrays(libraries.NumPy):
    """NumPy arrays as if they were in device memory."""

    module = _GuardedNumPy

    def info(self, name: str, x: Any, *, written: bool = False) -> ArrayInfo:
        info = super().info(name, x, written=written)
        return ArrayInfo(name, info.address, x.shape, info.dtype, "cuda:0", x)

    def target(self, x: Any, threads: int | None) -> LaunchTarget:
        return target()


@contextlib.contextmanager
def running(seed: int) -> Iterator[None]:
    """Within it, `pydist.arrays` runs NumPy arrays through the emulated kernels."""
    assert EMULATOR is not None
    EMULATOR.configure(seed)
    with mock.patch.dict(libraries.LIBRARIES, {np.ndarray: _Arrays()}):
        yield


def summary(seconds: float) -> str:
    """What was run, for the end of the tests."""
    assert EMULATOR is not None
    count = EMULATOR.counters()
    kernels = ", ".join(f"{name} {calls:,}" for name, calls in sorted(LAUNCHED.items()))
    return (
        f"emulated CUDA: {len(LAUNCHED)} kernels ({count['functions']} instantiations), "
        f"{LAUNCHED.total():,} launches checked in {seconds:.1f} s "
        f"({count['blocks']:,} blocks, {count['threads']:,} threads, {count['meetings']:,} "
        f"barriers and exchanges, {count['accesses']:,} memory accesses)\n  {kernels}"
    )

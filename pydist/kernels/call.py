"""One call of a kernel: its arrays, whatever library they are of, and the launch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from pydist.formats import wire
from pydist.kernels.checks import (
    FLOAT_NAMES,
    FLOATS,
    ArrayInfo,
    check_device,
    check_disjoint,
    check_dtype,
    check_flags,
    check_n,
    check_out,
    check_size,
)
from pydist.kernels.launch import LaunchTarget, Rows, launch, step_of
from pydist.kernels.libraries import Array, Library, library_of


class Call:
    """The arrays of one call, which are all of one library, and where it runs.

    Args:
        name: Name of the first array, for messages.
        x: The first array; the call runs on its device.
        threads: CPU threads; ``None`` for the library's own number.
    """

    __slots__ = ("_changed", "_name", "_x", "library", "target")

    def __init__(self, name: str, x: Array, threads: int | None = None) -> None:
        self.library: Library = library_of(name, x)
        self.target: LaunchTarget = self.library.target(x, threads)
        self._name, self._x = name, x
        self._changed: list[tuple[Array, Array]] = []

    # ----------------------------------------------------------------- arrays

    def input(self, name: str, x: Array) -> ArrayInfo:
        """An array that the kernel reads; a contiguous copy where it is not contiguous."""
        library = self.library
        if not library.holds(x):
            raise self._other_kind(name, x)
        return library.info(name, library.contiguous(x))

    def option(self, name: str, x: Array | None) -> ArrayInfo | None:
        """An input that need not be given."""
        return None if x is None else self.input(name, x)

    def update(self, name: str, x: Array) -> ArrayInfo:
        """An array that the kernel changes in place, of any strides without elements twice."""
        if not self.library.holds(x):
            raise self._other_kind(name, x)
        dense = self.library.writable(name, x)
        self._changed.append((x, dense))
        return self.library.info(name, dense)

    def flags(self, flags: Array | None, *others: ArrayInfo) -> tuple[ArrayInfo | None, int]:
        """The word in which a kernel raises bits, int32[1] apart from the others; its address."""
        if flags is None:
            return None, 0
        if not self.library.holds(flags):
            raise self._other_kind("flags", flags)
        info = self.library.info("flags", flags, written=True)
        check_flags(info, *others)
        check_device(others[0], info)
        return info, info.address

    def step(self, step: int | Array, like: ArrayInfo) -> tuple[int, int]:
        """The step where the host knows it, and the address at which a device is to read it."""
        shape: tuple[int, ...] = getattr(step, "shape", ())  # a number of NumPy's has none
        if shape or hasattr(step, "data_ptr"):
            return step_of(self.target, self.input("step", step), like)
        return step_of(self.target, wire.as_int("step", step), like)

    def result(
        self, out: Array | None, dtype: str, shape: tuple[int, ...], *inputs: ArrayInfo,
        gaps: bool = False,
    ) -> ArrayInfo:  # fmt: skip
        """Memory for what the kernel writes: ``out``, checked, or a new array.

        Args:
            out: What the caller has given.
            dtype: Name of the dtype it must have.
            shape: The shape it must have.
            *inputs: What it may not overlap.
            gaps: The kernel leaves padding out, which is zeroed here.
        """
        if out is None:
            out = self.library.empty(self._x, shape, dtype)
            info = self.library.info("out", out)
        else:
            info = self._given(out)
            check_out(info, dtype, shape, *inputs)
            self._changed.append((out, out))
        if gaps:
            self.library.zero(out)
        return info

    def values(self, out: Array | None, dtype: Any, n: int, *inputs: ArrayInfo) -> ArrayInfo:
        """Memory for ``n`` floats: ``out`` of any shape and the wanted dtype, or a new array."""
        check_n(n)
        wanted = "float32" if dtype is None else self.library.dtype_name(dtype)
        if wanted not in FLOATS:
            raise TypeError(f"dtype must be float32, float16 or bfloat16, got {wanted}")
        if out is None:
            return self.library.info("out", self.library.empty(self._x, (n,), wanted))
        info = self._given(out)
        if dtype is not None and info.dtype != wanted:
            raise TypeError(f"out must be {wanted}, got {info.dtype}")
        check_dtype(info, FLOAT_NAMES)
        check_size(info, n, "n")
        for other in inputs:
            check_device(other, info)
            check_disjoint(info, other)
        self._changed.append((out, out))
        return info

    def _given(self, out: Array) -> ArrayInfo:
        library = self.library
        if not library.holds(out):
            raise self._other_kind("out", out)
        if not library.is_contiguous(out):
            strides = out.stride() if hasattr(out, "stride") else out.strides
            raise ValueError(f"out must be contiguous, got strides {list(strides)}")
        return library.info("out", out, written=True)

    def check_apart(self, name_a: str, a: Array, name_b: str, b: Array) -> None:
        """Raises ValueError where arrays of which one is strided share memory."""
        library = self.library
        for name, x in ((name_a, a), (name_b, b)):
            if not library.holds(x):
                raise self._other_kind(name, x)
        if library.is_contiguous(a) and library.is_contiguous(b):
            return  # checks.check_disjoint sees it
        if library.may_overlap(a, b):
            raise ValueError(f"{name_a} and {name_b} overlap in memory")

    def _other_kind(self, name: str, x: Array) -> TypeError:
        kind = library_of(name, x).kind
        return TypeError(f"{name} is a {kind} array, {self._name} a {self.library.kind} array")

    # ----------------------------------------------------------------- launch

    def launch(self, kernel: str, rows: Rows, *args: object, unit: int = wire.WORD_BITS) -> None:
        """Runs the kernel (:func:`pydist.kernels.launch.launch`), and ends writes in place."""
        if self.target.stream is None:
            launch(self.target, kernel, rows, *args)
        else:
            with self.on_device():
                launch(self.target, kernel, rows, *args, unit=unit)
        self.end_writes()

    def on_device(self) -> AbstractContextManager[Any]:
        """Makes the arrays' device the current one."""
        return self.library.on_device(self._x)

    def end_writes(self) -> None:
        """Copies back arrays that had to be copied, and tells autograd what has changed."""
        for x, dense in self._changed:
            self.library.written(x, dense)

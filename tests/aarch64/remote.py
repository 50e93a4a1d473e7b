"""`pydist._C` of AArch64 on another processor: its CPU kernels run under qemu-user.

`install()` puts :class:`RemoteModule` where the compiled module would be, before pydist is
imported; everything above it, the doors and the tests included, then runs as it is. Addresses in
calls are those of this process: each array a kernel may touch is copied over, and copied back if
the kernel may write it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "aarch64"
SERVER = BUILD / "server"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
PACKAGES = "g++-aarch64-linux-gnu qemu-user"

PUT, GET, CALL, END = range(4)
KERNELS = (
    "pack_signs", "lion_pack", "lion_apply", "unpack_votes", "count_votes", "majority_vote",
    "quantize", "quantize_feedback", "reduce_quantized", "dequantize", "elias_encode",
    "elias_decode",
    "ternary_scale", "ternary_pack", "ternary_sum", "ternary_unpack", "ternary_unpack_sums",
    "topk_select", "topk_feedback", "topk_reduce", "topk_scatter", "sum_values",
    "crc32c", "seal_messages", "first_damaged",
)  # fmt: skip
X, MOMENTUM, MOMENTUM_OUT, N, WORD = range(5)  # columns of a row, see csrc/wire/layout.h
WIDTH = (4, 2, 2)  # bytes of each DType
TIES_ZERO = 1
NO_ROWS = np.zeros((1, 9), dtype=np.int64)
TERNARY_UNIT, TERNARY_SEGMENT = 160, 4096  # see csrc/wire/ternary.h


class GuestError(RuntimeError):
    """The process that runs the kernels ended, or found its memory damaged."""


def missing_tools() -> list[str]:
    """Programs that are needed and not there; Debian and Ubuntu have them as PACKAGES."""
    return [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]


def build() -> None:
    """Cross-compiles the server; only what has changed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake, ninja = (shutil.which(tool, path=path) for tool in ("cmake", "ninja"))
    configure = [
        cmake, "-S", ROOT / "tests" / "aarch64", "-B", BUILD, "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'cmake' / 'aarch64-linux-gnu.cmake'}",
    ]  # fmt: skip
    for command in (configure, [cmake, "--build", BUILD]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise GuestError(f"building {SERVER} failed:\n{done.stdout}{done.stderr}")


# --------------------------------------------------------------------------- the other process


class Guest:
    """The server, started when it is first needed, and again after it has ended."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        greeting = self._start()
        self.wire_version, self.max_ranks = int(greeting[0]), int(greeting[1])
        self.isa, self.isas = greeting[2], greeting[3:]

    def _start(self) -> list[str]:
        self._process = subprocess.Popen(
            ["sh", "-c", 'ulimit -c 0; exec "$0" "$1"', EMULATOR, SERVER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        greeting = self._process.stdout.readline().decode().split()
        return greeting or self._ended("at its start")

    def _ended(self, when: str) -> list[str]:
        process, self._process = self._process, None
        process.kill()
        raise GuestError(f"{' '.join([EMULATOR, SERVER.name])} ended {when}: {process.wait()}")

    def close(self) -> None:
        """Ends it."""
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def request(self, operation: int, *args: int, data: bytes = b"", size: int = 8) -> bytes:
        """Sends one request; returns the ``size`` bytes of the answer."""
        if self._process is None:
            self._start()
        message = struct.pack(f"<{2 + len(args)}q", operation, len(args), *args)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(message + data)
            self._process.stdin.flush()
        answer = self._process.stdout.read(size)
        if len(answer) < size:
            what = f"in {KERNELS[args[1]]}" if operation == CALL else f"in operation {operation}"
            self._ended(what)
        return answer


class Stage:
    """The arrays of one call over there."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._there: dict[tuple[int, int], int] = {}
        self._written: list[tuple[int, int]] = []

    def array(self, address: int, size: int, *, written: bool = False) -> int:
        """Address over there of the ``size`` bytes at ``address``; the same array stays one."""
        if address == 0:
            return 0
        key = (address, size)
        if key not in self._there:
            data = ctypes.string_at(address, size)
            answer = self._guest.request(PUT, size, address % 16, data=data)
            self._there[key] = struct.unpack("<q", answer)[0]
        if written and key not in self._written:
            self._written.append(key)
        return self._there[key]

    def column(self, rows: np.ndarray, column: int, width: int, *, written: bool = False) -> None:
        """Replaces the addresses in a column of a table of rows."""
        for row in rows:
            row[column] = self.array(int(row[column]), int(row[N]) * width, written=written)

    def finish(self) -> None:
        """Copies back what was written."""
        for address, size in self._written:
            data = self._guest.request(GET, self._there[address, size], size, size=size)
            ctypes.memmove(address, data, size)


@contextlib.contextmanager
def stage(guest: Guest) -> Iterator[Stage]:
    """Arrays over there for one call; afterwards their surroundings are looked at."""
    with guest.lock:
        arrays = Stage(guest)
        yield arrays
        arrays.finish()
        damaged = struct.unpack("<q", guest.request(END))[0]
        if damaged:
            raise GuestError(f"{damaged} arrays have been written around")


# --------------------------------------------------------------------------- pydist._C


def bits_of(x: float) -> int:
    """A double as the int64 that carries it."""
    return struct.unpack("<q", struct.pack("<d", x))[0]


class LionPackArgs:
    def __init__(self, *args: float) -> None:
        doubles = (0, 1, 2, 3, 5)
        self.words = [bits_of(a) if i in doubles else a for i, a in enumerate(args)]


class LionApplyArgs:
    def __init__(
        self, decay: float, step: float, planes: int, plane_words: int, ranks: int
    ) -> None:
        self.plane_bytes = planes * plane_words * 4
        self.words = [bits_of(decay), bits_of(step), planes, plane_words, ranks]


class VoteArgs:
    def __init__(self, payloads: int, stride: int, ranks: int, out: int, *rest: int) -> None:
        self.payloads, self.stride, self.ranks, self.out, self.rest = (
            payloads, stride, ranks, out, rest,
        )  # fmt: skip

    def words(self, arrays: Stage, planes: int) -> list[int]:
        payloads = arrays.array(self.payloads, self.stride * self.ranks)
        out = arrays.array(self.out, self.rest[0] * planes, written=True)
        return [payloads, self.stride, self.ranks, out, *self.rest]


class Unpack:
    def __init__(
        self, planes: int, plane_bytes: int, count: int, ranks: int, divisor: float
    ) -> None:
        self.planes, self.size = planes, plane_bytes * count
        self.rest = [plane_bytes, count, ranks, bits_of(divisor)]


class BlockFormat:
    def __init__(self, *words: int) -> None:
        self.words, self.block = [int(word) for word in words], words[2]

    def blocks(self, rows: np.ndarray) -> int:
        return int((rows[:, WORD] - -rows[:, N] // self.block).max())


class EncodeArgs:
    def __init__(self, form: BlockFormat, codes: int, scales: int, size: int, *rest: int) -> None:
        self.form, self.codes, self.scales, self.size, self.rest = form, codes, scales, size, rest

    def words(self, arrays: Stage, rows: np.ndarray) -> list[int]:
        codes = arrays.array(self.codes, self.size, written=True)
        scales = arrays.array(self.scales, 4 * self.form.blocks(rows), written=True)
        return [*self.form.words, codes, scales, self.size, *self.rest]


class DecodeArgs:
    def __init__(
        self, form: BlockFormat, codes: int, scales: int, stride: int, ranks: int, divisor: float
    ) -> None:
        self.form, self.codes, self.offset = form, codes, scales - codes
        self.stride, self.ranks, self.divisor = stride, ranks, divisor

    def words(self, arrays: Stage) -> list[int]:
        codes = arrays.array(self.codes, self.stride * self.ranks)
        rest = [codes + self.offset, self.stride, self.ranks, bits_of(self.divisor)]
        return [*self.form.words, codes, *rest]


class EliasArgs:
    """Addresses of a fixed payload and of one of variable length, each in one piece."""

    def __init__(
        self, form: BlockFormat, codes: int, scales: int, size: int, ends: int, coded_scales: int,
        streams: int, stream_bytes: int, result: int,
    ) -> None:  # fmt: skip
        self.form, self.codes, self.scales, self.size = form, codes, scales - codes, size
        self.ends, self.coded_scales, self.streams = ends, coded_scales - ends, streams - ends
        self.stream_bytes, self.result = stream_bytes, result

    def words(self, arrays: Stage, rows: np.ndarray, *, encodes: bool) -> list[int]:
        fixed_bytes = self.scales + 4 * self.form.blocks(rows)
        fixed = arrays.array(self.codes, fixed_bytes, written=not encodes)
        coded = arrays.array(self.ends, self.streams + self.stream_bytes, written=encodes)
        result = arrays.array(self.result, 8, written=True)
        return [
            *self.form.words, fixed, fixed + self.scales, self.size, coded,
            coded + self.coded_scales, coded + self.streams, self.stream_bytes, result,
        ]  # fmt: skip


class TernaryScaleArgs:
    def __init__(self, clip: float, scratch: int) -> None:
        self.clip, self.scratch = bits_of(clip), scratch

    def words(self, arrays: Stage, rows: np.ndarray) -> list[int]:
        segments = int(-(-rows[:, N] // TERNARY_SEGMENT).sum())
        return [self.clip, arrays.array(self.scratch, 8 * segments, written=True)]


class TernaryPackArgs:
    def __init__(self, payload: int, size: int, *rest: int) -> None:
        self.payload, self.size, self.rest = payload, size, rest

    def words(self, arrays: Stage) -> list[int]:
        return [arrays.array(self.payload, self.size, written=True), self.size, *self.rest]


class TernarySource:
    def __init__(self, data: int, size: int, stride: int, ranks: int, divisor: float) -> None:
        self.data, self.size, self.stride, self.ranks = data, size, stride, ranks
        self.divisor = bits_of(divisor)
        self.sum_bytes = (ranks.bit_length() + 1) * TERNARY_UNIT // 8  # of a unit

    def words(self, arrays: Stage, *, payloads: bool = True) -> list[int]:
        size = (self.ranks - 1) * self.stride + self.size if payloads else self.size
        there = arrays.array(self.data, size)
        return [there, self.size, self.stride, self.ranks, self.divisor]


def scalers(arrays: Stage, rows: np.ndarray, column: int, *, written: bool = False) -> None:
    """Replaces the addresses of one float a row."""
    for row in rows:
        row[column] = arrays.array(int(row[column]), 4, written=written)


class TopKFormat:
    def __init__(self, *words: int) -> None:
        self.words = list(words)


class TopKEncode:
    def __init__(self, form: TopKFormat, payload: int, size: int, *rest: int) -> None:
        self.form, self.payload, self.size, self.rest = form, payload, size, rest

    def words(self, arrays: Stage) -> list[int]:
        payload = arrays.array(self.payload, self.size, written=True)
        return [*self.form.words, payload, self.size, *self.rest]


class TopKDecode:
    def __init__(
        self, form: TopKFormat, payload: int, stride: int, ranks: int, divisor: float, clear: bool
    ) -> None:
        self.form, self.payload, self.stride, self.ranks = form, payload, stride, ranks
        self.rest = [bits_of(divisor), int(clear)]

    def words(self, arrays: Stage) -> list[int]:
        payload = arrays.array(self.payload, self.stride * self.ranks)
        return [*self.form.words, payload, self.stride, self.ranks, *self.rest]


class SumArgs:
    def __init__(self, values: int, stride: int, ranks: int, divisor: float, out: int) -> None:
        assert not out, "of messages alone, which are not sent here"
        self.values, self.stride, self.ranks, self.divisor = values, stride, ranks, divisor

    def words(self, arrays: Stage, end: int) -> list[int]:
        size = self.stride * (self.ranks - 1) + end
        values = arrays.array(self.values, size)
        return [values, self.stride, self.ranks, bits_of(self.divisor)]


def rows_of(table: tuple[int, ...]) -> np.ndarray:
    """A copy of the rows at (address, count); or of the one row whose nine numbers these are."""
    if len(table) == 9:
        return np.array([table], dtype=np.int64)
    address, count = table
    data = bytearray(ctypes.string_at(address, 72 * count))
    return np.frombuffer(data, dtype=np.int64).reshape(count, 9)


def payload_bytes(rows: np.ndarray) -> int:
    return int((rows[:, WORD] + (rows[:, N] + 31) // 32).max()) * 4


class RemoteModule(ModuleType):
    """What pydist/_C.pyi describes, without CUDA."""

    LionPackArgs, LionApplyArgs, VoteArgs, Unpack = LionPackArgs, LionApplyArgs, VoteArgs, Unpack
    BlockFormat, EncodeArgs, DecodeArgs = BlockFormat, EncodeArgs, DecodeArgs
    EliasArgs = EliasArgs
    TernaryScaleArgs, TernaryPackArgs = TernaryScaleArgs, TernaryPackArgs
    TernarySource = TernarySource
    TopKFormat, TopKEncode, TopKDecode = TopKFormat, TopKEncode, TopKDecode
    SumArgs = SumArgs
    CUDA_BUILD = None

    def __init__(self) -> None:
        super().__init__("pydist._C")
        self.guest = Guest()
        self.WIRE_VERSION, self.MAX_RANKS = self.guest.wire_version, self.guest.max_ranks
        self._isa = self.guest.isa
        self.cpu = SimpleNamespace(**{kernel: getattr(self, f"_{kernel}") for kernel in KERNELS})

    def address_of(self, x: np.ndarray) -> int:
        return x.__array_interface__["data"][0]

    def supported_isas(self) -> list[str]:
        return list(self.guest.isas)

    def current_isa(self) -> str:
        return self._isa

    def select_isa(self, name: str) -> None:
        if name not in self.guest.isas:
            raise ValueError(f"'{name}' is not an instruction set of the guest: {self.guest.isas}")
        self._isa = name

    def _call(self, arrays: Stage, kernel: str, rows: np.ndarray, threads: int, *args: int) -> None:
        table = arrays.array(rows.ctypes.data, rows.nbytes)
        numbers = self.guest.isas.index(self._isa), KERNELS.index(kernel)
        self.guest.request(CALL, *numbers, table, len(rows), threads, *args)

    def _pack_signs(self, table, dtype, payload, zero_bit, flags, threads) -> None:
        rows = rows_of(table)
        with stage(self.guest) as arrays:
            arrays.column(rows, X, WIDTH[dtype])
            out = arrays.array(payload, payload_bytes(rows), written=True)
            flag = arrays.array(flags, 4, written=True)
            self._call(arrays, "pack_signs", rows, threads, dtype, out, zero_bit, flag)

    def _lion_pack(self, table, grad, momentum, payload, args, flags, threads) -> None:
        rows = rows_of(table)
        with stage(self.guest) as arrays:
            arrays.column(rows, X, WIDTH[grad])
            arrays.column(rows, MOMENTUM, WIDTH[momentum])
            arrays.column(rows, MOMENTUM_OUT, WIDTH[momentum], written=True)
            out = arrays.array(payload, payload_bytes(rows), written=True)
            flag = arrays.array(flags, 4, written=True)
            self._call(arrays, "lion_pack", rows, threads, grad, momentum, out, *args.words, flag)

    def _lion_apply(self, table, dtype, planes, args, skip, threads) -> None:
        if skip and struct.unpack("<i", ctypes.string_at(skip, 4))[0]:
            return  # as csrc/bindings.cpp does
        rows = rows_of(table)
        with stage(self.guest) as arrays:
            arrays.column(rows, X, WIDTH[dtype], written=True)
            there = arrays.array(planes, args.plane_bytes)
            self._call(arrays, "lion_apply", rows, threads, dtype, there, *args.words)

    def _unpack_votes(self, table, dtype, args, threads) -> None:
        rows = rows_of(table)
        with stage(self.guest) as arrays:
            arrays.column(rows, X, WIDTH[dtype], written=True)
            there = arrays.array(args.planes, args.size)
            self._call(arrays, "unpack_votes", rows, threads, dtype, there, *args.rest)

    def _count_votes(self, table, args, threads) -> None:
        with stage(self.guest) as arrays:
            words = args.words(arrays, args.ranks.bit_length())
            self._call(arrays, "count_votes", rows_of(table), threads, *words)

    def _majority_vote(self, table, args, threads) -> None:
        with stage(self.guest) as arrays:
            words = args.words(arrays, 2 if args.rest[1] == TIES_ZERO else 1)
            self._call(arrays, "majority_vote", rows_of(table), threads, *words)

    def _quantize(self, table, dtype, args, flags, threads) -> None:
        rows = rows_of(table)
        with stage(self.guest) as arrays:
            words = args.words(arrays, rows)
            arrays.column(rows, X, WIDTH[dtype])
            flag = arrays.array(flags, 4, written=True)
            self._call(arrays, "quantize", rows, threads, dtype, *words, flag)

    def _quantize_feedback(self, table, dtype, residual, args, flags, threads) -> None:
        rows = rows_of(table)
        with stage(self.guest) as arrays:
            words = args.words(arrays, rows)
            arrays.column(rows, X, WIDTH[dtype])
            arrays.column(rows, MOMENTUM, WIDTH[residual])
            arrays.column(rows, MOMENTUM_OUT, WIDTH[residual], written=True)
            flag = arrays.array(flags, 4, written=True)
            self._call(arrays, "quantize_feedback", rows, threads, dtype, residual, *words, flag)

    def _reduce_quantized(self, table, source, to, flags, threads) -> None:
        rows = rows_of(table)
        with stage(self.guest) as arrays:
            words = source.words(arrays) + to.words(arrays, rows)
            flag = arrays.array(flags, 4, written=True)
            self._call(arrays, "reduce_quantized", rows, threads, *words, flag)

    def _dequantize(self, table, dtype, args, threads) -> None:
        rows = rows_of(table)
        with stage(self.guest) as arrays:
            arrays.column(rows, X, WIDTH[dtype], written=True)
            self._call(arrays, "dequantize", rows, threads, dtype, *args.words(arrays))

    def _elias_encode(self, table, args, threads) -> None:
        rows = rows_of(table)
        with stage(self.guest) as arrays:
            words = args.words(arrays, rows, encodes=True)
            self._call(arrays, "elias_encode", rows, threads, *words)

    def _elias_decode(self, table, args, threads) -> None:
        rows = rows_of(table)
        with stage(self.guest) as arrays:
            words = args.words(arrays, rows, encodes=False)
            self._call(arrays, "elias_decode", rows, threads, *words)

    def _ternary_scale(self, table, dtype, args, flags, threads) -> None:
        rows = rows_of(table)
        with stage(self.guest) as arrays:
            arrays.column(rows, X, WIDTH[dtype])
            scalers(arrays, rows, MOMENTUM, written=True)
            words = args.words(arrays, rows)
            flag = arrays.array(flags, 4, written=True)
            self._call(arrays, "ternary_scale", rows, threads, dtype, *words, flag)

    def _ternary_pack(self, table, dtype, args, flags, threads) -> None:
        rows = rows_of(table)
        with stage(self.guest) as arrays:
            arrays.column(rows, X, WIDTH[dtype])
            scalers(arrays, rows, MOMENTUM)
            scalers(arrays, rows, MOMENTUM_OUT)
            flag = arrays.array(flags, 4, written=True)
            self._call(arrays, "ternary_pack", rows, threads, dtype, *args.words(arrays), flag)

    def _ternary_sum(self, table, source, out, flags, threads) -> None:
        rows = rows_of(table)
        units = int((rows[:, WORD] - -rows[:, N] // TERNARY_UNIT).max())
        with stage(self.guest) as arrays:
            there = arrays.array(out, units * source.sum_bytes, written=True)
            flag = arrays.array(flags, 4, written=True)
            self._call(arrays, "ternary_sum", rows, threads, *source.words(arrays), there, flag)

    def _ternary_values(self, kernel, table, dtype, source, flags, threads) -> None:
        rows = rows_of(table)
        with stage(self.guest) as arrays:
            arrays.column(rows, X, WIDTH[dtype], written=True)
            scalers(arrays, rows, MOMENTUM_OUT)
            words = source.words(arrays, payloads=kernel == "ternary_unpack")
            flag = arrays.array(flags, 4, written=True)
            self._call(arrays, kernel, rows, threads, dtype, *words, flag)

    def _ternary_unpack(self, *args) -> None:
        self._ternary_values("ternary_unpack", *args)

    def _ternary_unpack_sums(self, *args) -> None:
        self._ternary_values("ternary_unpack_sums", *args)

    def _topk_select(self, table, dtype, args, flags, threads) -> None:
        rows = rows_of(table)
        with stage(self.guest) as arrays:
            words = args.words(arrays)
            arrays.column(rows, X, WIDTH[dtype])
            flag = arrays.array(flags, 4, written=True)
            self._call(arrays, "topk_select", rows, threads, dtype, *words, flag)

    def _topk_feedback(self, table, dtype, residual, args, flags, threads) -> None:
        rows = rows_of(table)
        with stage(self.guest) as arrays:
            words = args.words(arrays)
            arrays.column(rows, X, WIDTH[dtype])
            arrays.column(rows, MOMENTUM, WIDTH[residual])
            arrays.column(rows, MOMENTUM_OUT, WIDTH[residual], written=True)
            flag = arrays.array(flags, 4, written=True)
            self._call(arrays, "topk_feedback", rows, threads, dtype, residual, *words, flag)

    def _topk_reduce(self, table, source, to, flags, threads) -> None:
        with stage(self.guest) as arrays:
            words = source.words(arrays) + to.words(arrays)
            flag = arrays.array(flags, 4, written=True)
            self._call(arrays, "topk_reduce", rows_of(table), threads, *words, flag)

    def _topk_scatter(self, table, dtype, args, flags, threads) -> None:
        rows = rows_of(table)
        with stage(self.guest) as arrays:
            words = args.words(arrays)
            arrays.column(rows, X, WIDTH[dtype], written=True)
            flag = arrays.array(flags, 4, written=True)
            self._call(arrays, "topk_scatter", rows, threads, dtype, *words, flag)

    def _sum_values(self, table, source, to, args, flags, threads) -> None:
        rows = rows_of(table)
        with stage(self.guest) as arrays:
            end = int((32 * rows[:, WORD] + rows[:, N]).max()) * WIDTH[source]
            words = args.words(arrays, end)
            arrays.column(rows, X, WIDTH[to], written=True)
            flag = arrays.array(flags, 4, written=True)
            self._call(arrays, "sum_values", rows, threads, source, to, *words, flag)

    def _crc32c(self, data, n, before) -> int:
        result = ctypes.c_uint32()
        with stage(self.guest) as arrays:
            there = arrays.array(ctypes.addressof(result), 4, written=True)
            self._call(arrays, "crc32c", NO_ROWS, 1, arrays.array(data, n), n, before, there)
        return result.value

    def _seal_messages(self, rows, n, stride, size) -> None:
        with stage(self.guest) as arrays:
            there = arrays.array(rows, stride * (n - 1) + size, written=True)
            self._call(arrays, "seal_messages", NO_ROWS, 1, there, n, stride, size)

    def _first_damaged(self, rows, n, stride, size, digest) -> int:
        result = ctypes.c_int64()
        with stage(self.guest) as arrays:
            found = arrays.array(ctypes.addressof(result), 8, written=True)
            there = arrays.array(rows, stride * (n - 1) + size)
            self._call(arrays, "first_damaged", NO_ROWS, 1, there, n, stride, size, digest, found)
        return result.value


def install() -> None:
    """Makes `pydist._C` the module of AArch64; pydist must not have been imported."""
    assert "pydist" not in sys.modules, "pydist has been imported already"
    sys.modules["pydist._C"] = RemoteModule()

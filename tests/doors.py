"""Both doors, `pydist.ops` and `pydist.arrays`, as runners of the self-check; and emulated CUDA.

A door can hold its arrays in awkward places: behind an odd offset, or strided. Around each array
lie guard bytes; a kernel that writes there, or into one of its inputs, fails the test.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import emulated
import numpy as np
import pytest
import torch
from guarded import guarded_bytes
from ternary_doors import TernaryDoor

from pydist import _C, arrays, ops
from pydist.kernels.signs import LionOptions
from pydist.selfcheck import Bits, assert_same_bits, storage_of

try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None

HOST_DOORS = [(kind, isa) for kind in ("torch", "numpy") for isa in _C.supported_isas()]
EMULATED_DOORS = [("emulated", f"seed{seed}") for seed in emulated.SEEDS]
DOORS = HOST_DOORS + EMULATED_DOORS
DOOR_PARAMS = [pytest.param(key, id="-".join(key)) for key in HOST_DOORS] + [
    pytest.param(key, id="-".join(key), marks=emulated.MARKS) for key in EMULATED_DOORS
]
# For tests that compare several doors with one costly reference.
DOOR_GROUPS = [
    pytest.param(HOST_DOORS, id="host"),
    pytest.param(EMULATED_DOORS, id="emulated", marks=emulated.MARKS),
]
GUARD = 0x5A
PRESET_FLAG = 1 << 20  # some other bit, which kernels must leave alone


class Placed:
    """An array somewhere inside a larger block of guard bytes; or right before a guard page."""

    def __init__(self, what: str, bits: Bits, layout: str, *, guard_page: bool = False) -> None:
        self.what, self.original = what, bits
        offset = {"dense": 64, "offset": bits.itemsize, "unaligned": 1, "strided": 0}[layout]
        step = 2 if layout == "strided" else 1
        size = offset + step * bits.nbytes
        self.memory = guarded_bytes(size, at_end=True) if guard_page else np.empty(size + 64, "u1")
        self.memory[...] = GUARD
        self.bits = self._inside(self.memory, offset, step)
        self.bits[...] = bits
        before = self.memory.copy()
        self._before, self._inside_before = before, self._inside(before, offset, step)

    def _inside(self, memory: Any, offset: int, step: int) -> Bits:
        bits = self.original
        room = memory[offset : offset + step * bits.nbytes].view(bits.dtype)
        return room.reshape(*bits.shape, step)[..., 0]

    def unchanged(self) -> None:
        assert_same_bits(self.memory, self._before, f"{self.what} is an input: memory")

    def result(self) -> Bits:
        """A copy of what was written, once it is clear that nothing else was."""
        self._inside_before[...] = self.bits
        assert_same_bits(self.memory, self._before, f"memory around {self.what}")
        return self.bits.copy()


@dataclasses.dataclass
class Door(TernaryDoor):
    """One door, instruction set (emulated: order of threads), layout of arrays, CPU threads."""

    kind: str
    isa: str
    layout: str = "dense"
    threads: int = 1
    separate: bool = False  # lion_pack_ with momentum_out

    @property
    def name(self) -> str:
        return f"{self.kind} {self.isa} {self.layout} threads={self.threads}"

    @property
    def module(self) -> ModuleType:
        return ops if self.kind == "torch" else arrays

    @property
    def storages(self) -> tuple[str, ...]:
        """NumPy knows bfloat16 only where ml_dtypes is installed."""
        known = self.kind == "torch" or ml_dtypes is not None
        return ("float32", "float16", "bfloat16") if known else ("float32", "float16")

    @property
    def layouts(self) -> tuple[str, ...]:
        """Only NumPy has arrays whose address is not a multiple of the element's size."""
        return ("offset", "strided") + (("unaligned",) if self.kind == "numpy" else ())

    def using(self, **changes: Any) -> Door:
        return dataclasses.replace(self, **changes)

    def native(self, bits: Bits | None) -> Any:
        """The same memory as an array of this door."""
        if bits is None:
            return None
        if self.kind == "torch":
            tensor = torch.from_numpy(bits)
            return tensor.view(torch.bfloat16) if bits.dtype == np.uint16 else tensor
        return bits.view(ml_dtypes.bfloat16) if bits.dtype == np.uint16 else bits

    def call(self, function: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a function of the door; tensors that come back are NumPy arrays."""
        if self.kind == "emulated":
            with emulated.running(int(self.isa.removeprefix("seed"))):
                return self._bits(getattr(arrays, function)(*args, **kwargs))
        isa, threads = _C.current_isa(), torch.get_num_threads()
        _C.select_isa(self.isa)
        if self.kind == "torch":
            torch.set_num_threads(self.threads)
        else:
            kwargs["threads"] = self.threads
        try:
            result = getattr(self.module, function)(*args, **kwargs)
        finally:
            _C.select_isa(isa)
            torch.set_num_threads(threads)
        return self._bits(result)

    @staticmethod
    def _bits(result: Any) -> Any:
        if isinstance(result, torch.Tensor):
            result = result.view(torch.uint16) if result.dtype == torch.bfloat16 else result
            return result.numpy()
        if result is not None and result.dtype.name == "bfloat16":
            return result.view(np.uint16)
        return result

    # ----------------------------------------------------------------- selfcheck.Runner

    def _place(self, what: str, bits: Bits) -> tuple[Placed, Any]:
        guard_page = self.kind == "emulated" and not self.isa.endswith("1")
        placed = Placed(what, np.ascontiguousarray(bits), self.layout, guard_page=guard_page)
        return placed, self.native(placed.bits)

    def _flags(self) -> tuple[Any, Any]:
        flags = np.array([PRESET_FLAG], dtype=np.int32)
        return flags, self.native(flags)

    @staticmethod
    def _raised(flags: Any) -> int:
        assert flags[0] & PRESET_FLAG, "a flag that was there before is gone"
        return int(flags[0]) & ~PRESET_FLAG

    def pack_signs(self, x: Bits, *, zero_bit: int, segments: Any) -> tuple[Any, int]:
        placed, native = self._place("x", x)
        flags, native_flags = self._flags()
        payload = self.call(
            "pack_signs", native,
            zero_bit=zero_bit, flags=native_flags, segments=self.native(segments),
        )  # fmt: skip
        placed.unchanged()
        return payload, self._raised(flags)

    def _dtype(self, storage: str) -> Any:
        if self.kind == "torch":
            return getattr(torch, storage)
        return ml_dtypes.bfloat16 if storage == "bfloat16" else storage

    def unpack_votes(self, planes: Any, n: int, *, ranks: Any, mean: bool, storage: str) -> Any:
        placed, native = self._place("planes", planes)
        dtype = self._dtype(storage)
        values = self.call("unpack_votes", native, n, ranks=ranks, mean=mean, dtype=dtype)
        placed.unchanged()
        return values

    def count_votes(self, payloads: Any) -> Any:
        placed, native = self._place("payloads", payloads)
        planes = self.call("count_votes", native)
        placed.unchanged()
        return planes

    def majority_vote(
        self, payloads: Any, *, ties: str, seed: int, step: int, n: Any, segments: Any
    ) -> Any:
        placed, native = self._place("payloads", payloads)
        planes = self.call(
            "majority_vote", native,
            ties=ties, seed=seed, step=step, n=n, segments=self.native(segments),
        )  # fmt: skip
        placed.unchanged()
        return planes

    def lion_pack(
        self, grad: Bits, momentum: Bits, options: LionOptions, segments: Any
    ) -> tuple[Any, Bits, int]:
        g, native_g = self._place("grad", grad)
        m, native_m = self._place("momentum", momentum)
        out, native_out = self._place("momentum_out", np.zeros_like(momentum))
        flags, native_flags = self._flags()
        payload = self.call(
            "lion_pack_", native_g, native_m,
            momentum_out=native_out if self.separate else None, flags=native_flags,
            segments=self.native(segments), **dataclasses.asdict(options),
        )  # fmt: skip
        g.unchanged()
        if self.separate:
            m.unchanged()
        return payload, (out if self.separate else m).result(), self._raised(flags)

    def lion_apply(
        self, param: Bits, planes: Any, *, lr: float, weight_decay: float, ranks: Any
    ) -> Bits:
        x, native_x = self._place("param", param)
        p, native_p = self._place("planes", planes)
        self.call("lion_apply_", native_x, native_p, lr=lr, weight_decay=weight_decay, ranks=ranks)
        p.unchanged()
        assert storage_of(x.bits) == storage_of(param)
        return x.result()

    def sum_values(self, values: Bits, *, mean: bool, storage: str) -> tuple[Bits, int]:
        placed, native = self._place("values", values)
        flags, native_flags = self._flags()
        out = self.call(
            "sum_values", native, mean=mean, dtype=self._dtype(storage), flags=native_flags
        )
        placed.unchanged()
        return out, self._raised(flags)

    # ----------------------------------------------------------------- selfcheck.BlockRunner

    def _encode(
        self, function: str, args: list[Any], options: Any, segments: Any, **more: Any
    ) -> tuple[Any, int]:
        flags, native_flags = self._flags()
        payload = self.call(
            function, *args, **more, flags=native_flags,
            segments=self.native(segments), **dataclasses.asdict(options),
        )  # fmt: skip
        return payload, self._raised(flags)

    def quantize(self, x: Bits, form: Any, options: Any, segments: Any) -> tuple[Any, int]:
        placed, native = self._place("x", x)
        result = self._encode("quantize", [native, Codec(form)], options, segments)
        placed.unchanged()
        return result

    def quantize_feedback(
        self, x: Bits, residual: Bits, form: Any, options: Any, segments: Any
    ) -> tuple[Any, Bits, int]:
        placed, native = self._place("x", x)
        kept, native_kept = self._place("residual", residual)
        args = [native, native_kept, Codec(form)]
        payload, flags = self._encode("quantize_feedback_", args, options, segments)
        placed.unchanged()
        return payload, kept.result(), flags

    def reduce_quantized(
        self, payloads: Any, n: int, form: Any, options: Any, *, mean: bool, segments: Any
    ) -> tuple[Any, int]:
        placed, native = self._place("payloads", payloads)
        args = [native, Codec(form), n]
        result = self._encode("reduce_quantized", args, options, segments, mean=mean)
        placed.unchanged()
        return result

    def sum_quantized(
        self, payloads: Any, n: int, form: Any, *, mean: bool, storage: str, segments: Any
    ) -> Any:
        placed, native = self._place("payloads", payloads)
        values = self.call(
            "sum_quantized", native, Codec(form), n,
            mean=mean, dtype=self._dtype(storage), segments=self.native(segments),
        )  # fmt: skip
        placed.unchanged()
        return values

    # ----------------------------------------------------------------- selfcheck.EliasRunner

    def elias_encode(self, payload: Any, n: int, form: Any, segments: Any) -> Any:
        return self._coded("elias_encode", payload, n, form, segments)

    def elias_decode(self, payload: Any, n: int, form: Any, segments: Any) -> Any:
        return self._coded("elias_decode", payload, n, form, segments)

    def _coded(self, function: str, payload: Any, n: int, form: Any, segments: Any) -> Any:
        placed, native = self._place("payload", payload)
        segments = self.native(segments)
        try:
            return self.call(function, native, Codec(form), n, segments=segments)
        finally:
            placed.unchanged()

    # ----------------------------------------------------------------- selfcheck.TopKRunner

    def _with_flags(self, function: str, *args: Any, **more: Any) -> tuple[Any, int]:
        flags, native_flags = self._flags()
        segments = self.native(more.pop("segments"))
        result = self.call(function, *args, **more, segments=segments, flags=native_flags)
        return result, self._raised(flags)

    def topk_select(self, x: Bits, form: Any, order: Any, segments: Any) -> tuple[Any, int]:
        placed, native = self._place("x", x)
        result = self._with_flags(
            "topk_select", native, TopKCodec(form), segments=segments, **dataclasses.asdict(order)
        )
        placed.unchanged()
        return result

    def topk_feedback(
        self, x: Bits, residual: Bits, form: Any, order: Any, segments: Any
    ) -> tuple[Any, Bits, int]:
        placed, native = self._place("x", x)
        kept, native_kept = self._place("residual", residual)
        payload, flags = self._with_flags(
            "topk_feedback_", native, native_kept, TopKCodec(form), segments=segments,
            **dataclasses.asdict(order),
        )  # fmt: skip
        placed.unchanged()
        return payload, kept.result(), flags

    def topk_reduce(
        self, payloads: Any, n: int, form: Any, order: Any, *, mean: bool, segments: Any
    ) -> tuple[Any, int]:
        placed, native = self._place("payloads", payloads)
        result = self._with_flags(
            "topk_reduce", native, TopKCodec(form), n, mean=mean, segments=segments,
            **dataclasses.asdict(order),
        )  # fmt: skip
        placed.unchanged()
        return result

    def topk_scatter(
        self, payloads: Any, n: int, form: Any, *, mean: bool, storage: str, segments: Any
    ) -> tuple[Any, int]:
        placed, native = self._place("payloads", payloads)
        result = self._with_flags(
            "topk_scatter", native, TopKCodec(form), n,
            mean=mean, dtype=self._dtype(storage), segments=segments,
        )  # fmt: skip
        placed.unchanged()
        return result

    def topk_clear(self, x: Bits, payload: Any, form: Any, segments: Any) -> tuple[Bits, int]:
        placed, native = self._place("payload", payload)
        changed, native_x = self._place("x", x)
        _, flags = self._with_flags(
            "topk_clear_", native_x, native, TopKCodec(form), segments=segments
        )
        placed.unchanged()
        return changed.result(), flags


@dataclasses.dataclass(frozen=True)
class Codec:
    """A codec of any format."""

    block_format: Any


@dataclasses.dataclass(frozen=True)
class TopKCodec:
    """A codec of any top-k format."""

    topk_format: Any

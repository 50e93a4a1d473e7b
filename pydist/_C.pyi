# Types of the compiled module, after csrc/bindings.cpp. Arguments are positional: integers that are
# addresses come first as `int`, dtypes are indices into pydist.kernels.FLOATS.

from collections.abc import Callable
from typing import Any, ClassVar

import numpy.typing as npt

WIRE_VERSION: int
MAX_RANKS: int
CUDA_BUILD: str | None  # None: built without CUDA, and then there is no `cuda`

def address_of(x: npt.NDArray[Any], /) -> int: ...
def supported_isas() -> list[str]: ...
def current_isa() -> str: ...
def select_isa(name: str, /) -> None: ...
def stream_above(size: int, /) -> int: ...

class LionPackArgs:
    def __init__(
        self,
        beta1: float,
        one_minus_beta1: float,
        beta2: float,
        one_minus_beta2: float,
        zero_bit: int,
        inv_range: float,
        seed: int,
        key1: int,
        step: int,
        step_at: int,
        /,
    ) -> None: ...

class LionApplyArgs:
    def __init__(
        self, decay: float, step: float, planes: int, plane_words: int, ranks: int, /
    ) -> None: ...

class VoteArgs:
    def __init__(
        self,
        payloads: int,
        stride: int,
        ranks: int,
        out: int,
        plane_bytes: int,
        ties: int,
        seed: int,
        step: int,
        step_at: int,
        /,
    ) -> None: ...

class Unpack:
    def __init__(
        self, planes: int, plane_bytes: int, count: int, ranks: int, divisor: float, /
    ) -> None: ...

class TopKFormat:
    def __init__(self, block: int, low_bits: int, values: int, density: int, /) -> None: ...

class TopKEncode:
    def __init__(
        self, form: TopKFormat, payload: int, size: int, seed: int, step: int, step_at: int, /
    ) -> None: ...

class TopKDecode:
    def __init__(
        self,
        form: TopKFormat,
        payload: int,
        stride: int,
        ranks: int,
        divisor: float,
        clear: bool,
        /,
    ) -> None: ...

class BlockFormat:
    def __init__(
        self, scheme: int, bits: int, block: int, norm: int, stochastic: bool, /
    ) -> None: ...

class EncodeArgs:
    def __init__(
        self,
        form: BlockFormat,
        codes: int,
        scales: int,
        code_bytes: int,
        zero_bit: int,
        seed: int,
        key1: int,
        step: int,
        step_at: int,
        /,
    ) -> None: ...

class DecodeArgs:
    def __init__(
        self,
        form: BlockFormat,
        codes: int,
        scales: int,
        stride: int,
        ranks: int,
        divisor: float,
        /,
    ) -> None: ...

class SumArgs:
    def __init__(
        self, values: int, stride: int, ranks: int, divisor: float, out: int, /
    ) -> None: ...

class EliasArgs:
    def __init__(
        self,
        form: BlockFormat,
        codes: int,
        fixed_scales: int,
        code_bytes: int,
        ends: int,
        scales: int,
        streams: int,
        stream_bytes: int,
        result: int,
        /,
    ) -> None: ...

class TernaryScaleArgs:
    def __init__(self, clip: float, scratch: int, /) -> None: ...

class TernaryPackArgs:
    def __init__(
        self, payload: int, size: int, seed: int, key1: int, step: int, step_at: int, /
    ) -> None: ...

class TernarySource:
    def __init__(
        self, data: int, size: int, stride: int, ranks: int, divisor: float, /
    ) -> None: ...

# The submodules, as classes: a stub file can't hold a module. A kernel takes its rows, what its
# C++ function takes (csrc/cpu/driver.h, csrc/cuda/launch.h), and last threads or a stream.

_Kernel = Callable[..., None]

class cpu:
    pack_signs: ClassVar[_Kernel]
    lion_pack: ClassVar[_Kernel]
    lion_apply: ClassVar[_Kernel]
    unpack_votes: ClassVar[_Kernel]
    count_votes: ClassVar[_Kernel]
    majority_vote: ClassVar[_Kernel]
    quantize: ClassVar[_Kernel]
    quantize_feedback: ClassVar[_Kernel]
    reduce_quantized: ClassVar[_Kernel]
    dequantize: ClassVar[_Kernel]
    sum_values: ClassVar[_Kernel]
    elias_encode: ClassVar[_Kernel]
    elias_decode: ClassVar[_Kernel]
    ternary_scale: ClassVar[_Kernel]
    ternary_pack: ClassVar[_Kernel]
    ternary_sum: ClassVar[_Kernel]
    ternary_unpack: ClassVar[_Kernel]
    ternary_unpack_sums: ClassVar[_Kernel]
    topk_select: ClassVar[_Kernel]
    topk_feedback: ClassVar[_Kernel]
    topk_reduce: ClassVar[_Kernel]
    topk_scatter: ClassVar[_Kernel]
    @staticmethod
    def crc32c(data: int, n: int, before: int, /) -> int: ...
    @staticmethod
    def seal_messages(rows: int, n: int, stride: int, size: int, /) -> None: ...
    @staticmethod
    def first_damaged(rows: int, n: int, stride: int, size: int, digest: int, /) -> int: ...

class cuda:
    @staticmethod
    def device_count() -> int: ...
    @staticmethod
    def device_name(device: int, /) -> str: ...
    pack_signs: ClassVar[_Kernel]
    lion_pack: ClassVar[_Kernel]
    lion_apply: ClassVar[_Kernel]
    unpack_votes: ClassVar[_Kernel]
    count_votes: ClassVar[_Kernel]
    majority_vote: ClassVar[_Kernel]
    quantize: ClassVar[_Kernel]
    quantize_feedback: ClassVar[_Kernel]
    reduce_quantized: ClassVar[_Kernel]
    dequantize: ClassVar[_Kernel]
    sum_values: ClassVar[_Kernel]
    elias_encode: ClassVar[_Kernel]
    elias_decode: ClassVar[_Kernel]
    ternary_scale: ClassVar[_Kernel]
    ternary_pack: ClassVar[_Kernel]
    ternary_sum: ClassVar[_Kernel]
    ternary_unpack: ClassVar[_Kernel]
    ternary_unpack_sums: ClassVar[_Kernel]
    topk_select: ClassVar[_Kernel]
    topk_feedback: ClassVar[_Kernel]
    topk_reduce: ClassVar[_Kernel]
    topk_scatter: ClassVar[_Kernel]
    find_used: ClassVar[_Kernel]
    keep_used: ClassVar[_Kernel]
    put_headers: ClassVar[_Kernel]
    merge_headers: ClassVar[_Kernel]
    fill_nan: ClassVar[_Kernel]

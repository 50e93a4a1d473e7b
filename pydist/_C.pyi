# Types of the compiled module, after csrc/bindings.cpp. Arguments are positional: integers that are
# addresses come first as `int`, dtypes are indices into pydist.kernels.FLOATS.

WIRE_VERSION: int
MAX_RANKS: int
CUDA_BUILD: str | None  # None: built without CUDA, and then there is no `cuda`

def supported_isas() -> list[str]: ...
def current_isa() -> str: ...
def select_isa(name: str, /) -> None: ...

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
    def __init__(self, values: int, stride: int, ranks: int, divisor: float, /) -> None: ...

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

# The submodules, as classes: a stub file can't hold a module.

class cpu:
    @staticmethod
    def pack_signs(
        rows: int,
        n: int,
        dtype: int,
        payload: int,
        zero_bit: int,
        flags: int,
        threads: int,
        /,
    ) -> None: ...
    @staticmethod
    def lion_pack(
        rows: int,
        n: int,
        grad: int,
        momentum: int,
        payload: int,
        args: LionPackArgs,
        flags: int,
        threads: int,
        /,
    ) -> None: ...
    @staticmethod
    def lion_apply(
        rows: int,
        n: int,
        dtype: int,
        planes: int,
        args: LionApplyArgs,
        skip: int,
        threads: int,
        /,
    ) -> None: ...
    @staticmethod
    def unpack_votes(rows: int, n: int, dtype: int, args: Unpack, threads: int, /) -> None: ...
    @staticmethod
    def count_votes(rows: int, n: int, args: VoteArgs, threads: int, /) -> None: ...
    @staticmethod
    def majority_vote(rows: int, n: int, args: VoteArgs, threads: int, /) -> None: ...
    @staticmethod
    def quantize(
        rows: int, n: int, dtype: int, args: EncodeArgs, flags: int, threads: int, /
    ) -> None: ...
    @staticmethod
    def quantize_feedback(
        rows: int,
        n: int,
        dtype: int,
        residual: int,
        args: EncodeArgs,
        flags: int,
        threads: int,
        /,
    ) -> None: ...
    @staticmethod
    def reduce_quantized(
        rows: int, n: int, source: DecodeArgs, to: EncodeArgs, flags: int, threads: int, /
    ) -> None: ...
    @staticmethod
    def dequantize(rows: int, n: int, dtype: int, args: DecodeArgs, threads: int, /) -> None: ...
    @staticmethod
    def sum_values(
        rows: int, n: int, source: int, to: int, args: SumArgs, flags: int, threads: int, /
    ) -> None: ...
    @staticmethod
    def elias_encode(rows: int, n: int, args: EliasArgs, threads: int, /) -> None: ...
    @staticmethod
    def elias_decode(rows: int, n: int, args: EliasArgs, threads: int, /) -> None: ...
    @staticmethod
    def ternary_scale(
        rows: int, n: int, dtype: int, args: TernaryScaleArgs, flags: int, threads: int, /
    ) -> None: ...
    @staticmethod
    def ternary_pack(
        rows: int, n: int, dtype: int, args: TernaryPackArgs, flags: int, threads: int, /
    ) -> None: ...
    @staticmethod
    def ternary_sum(
        rows: int, n: int, source: TernarySource, out: int, flags: int, threads: int, /
    ) -> None: ...
    @staticmethod
    def ternary_unpack(
        rows: int, n: int, dtype: int, source: TernarySource, flags: int, threads: int, /
    ) -> None: ...
    @staticmethod
    def ternary_unpack_sums(
        rows: int, n: int, dtype: int, source: TernarySource, flags: int, threads: int, /
    ) -> None: ...
    @staticmethod
    def topk_select(
        rows: int, n: int, dtype: int, args: TopKEncode, flags: int, threads: int, /
    ) -> None: ...
    @staticmethod
    def topk_feedback(
        rows: int,
        n: int,
        dtype: int,
        residual: int,
        args: TopKEncode,
        flags: int,
        threads: int,
        /,
    ) -> None: ...
    @staticmethod
    def topk_reduce(
        rows: int, n: int, source: TopKDecode, to: TopKEncode, flags: int, threads: int, /
    ) -> None: ...
    @staticmethod
    def topk_scatter(
        rows: int, n: int, dtype: int, args: TopKDecode, flags: int, threads: int, /
    ) -> None: ...
    @staticmethod
    def crc32c(data: int, n: int, before: int, /) -> int: ...
    @staticmethod
    def seal_messages(rows: int, n: int, stride: int, size: int, /) -> None: ...
    @staticmethod
    def first_damaged(rows: int, n: int, stride: int, size: int, digest: int, /) -> int: ...

class cuda:
    class Rows:
        def __init__(
            self, table: int, n_rows: int, total_words: int, inline_row: list[int], /
        ) -> None: ...

    @staticmethod
    def device_count() -> int: ...
    @staticmethod
    def device_name(device: int, /) -> str: ...
    @staticmethod
    def pack_signs(
        rows: Rows, dtype: int, payload: int, zero_bit: int, flags: int, stream: int, /
    ) -> None: ...
    @staticmethod
    def lion_pack(
        rows: Rows,
        grad: int,
        momentum: int,
        payload: int,
        args: LionPackArgs,
        flags: int,
        stream: int,
        /,
    ) -> None: ...
    @staticmethod
    def lion_apply(
        rows: Rows, dtype: int, planes: int, args: LionApplyArgs, skip: int, stream: int, /
    ) -> None: ...
    @staticmethod
    def unpack_votes(rows: Rows, dtype: int, args: Unpack, stream: int, /) -> None: ...
    @staticmethod
    def count_votes(rows: Rows, args: VoteArgs, stream: int, /) -> None: ...
    @staticmethod
    def majority_vote(rows: Rows, args: VoteArgs, stream: int, /) -> None: ...
    @staticmethod
    def quantize(rows: Rows, dtype: int, args: EncodeArgs, flags: int, stream: int, /) -> None: ...
    @staticmethod
    def quantize_feedback(
        rows: Rows, dtype: int, residual: int, args: EncodeArgs, flags: int, stream: int, /
    ) -> None: ...
    @staticmethod
    def reduce_quantized(
        rows: Rows, source: DecodeArgs, to: EncodeArgs, flags: int, stream: int, /
    ) -> None: ...
    @staticmethod
    def dequantize(rows: Rows, dtype: int, args: DecodeArgs, stream: int, /) -> None: ...
    @staticmethod
    def sum_values(
        rows: Rows, source: int, to: int, args: SumArgs, flags: int, stream: int, /
    ) -> None: ...
    @staticmethod
    def elias_encode(rows: Rows, args: EliasArgs, stream: int, /) -> None: ...
    @staticmethod
    def elias_decode(rows: Rows, args: EliasArgs, stream: int, /) -> None: ...
    @staticmethod
    def ternary_scale(
        rows: Rows, dtype: int, args: TernaryScaleArgs, flags: int, stream: int, /
    ) -> None: ...
    @staticmethod
    def ternary_pack(
        rows: Rows, dtype: int, args: TernaryPackArgs, flags: int, stream: int, /
    ) -> None: ...
    @staticmethod
    def ternary_sum(
        rows: Rows, source: TernarySource, out: int, flags: int, stream: int, /
    ) -> None: ...
    @staticmethod
    def ternary_unpack(
        rows: Rows, dtype: int, source: TernarySource, flags: int, stream: int, /
    ) -> None: ...
    @staticmethod
    def ternary_unpack_sums(
        rows: Rows, dtype: int, source: TernarySource, flags: int, stream: int, /
    ) -> None: ...
    @staticmethod
    def topk_select(
        rows: Rows, dtype: int, args: TopKEncode, flags: int, stream: int, /
    ) -> None: ...
    @staticmethod
    def topk_feedback(
        rows: Rows, dtype: int, residual: int, args: TopKEncode, flags: int, stream: int, /
    ) -> None: ...
    @staticmethod
    def topk_reduce(
        rows: Rows,
        source: TopKDecode,
        to: TopKEncode,
        flags: int,
        room: int,
        slots: int,
        stream: int,
        /,
    ) -> None: ...
    @staticmethod
    def topk_scatter(
        rows: Rows,
        dtype: int,
        args: TopKDecode,
        flags: int,
        room: int,
        slots: int,
        stream: int,
        /,
    ) -> None: ...

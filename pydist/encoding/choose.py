"""From a codec and the arguments of a collective to the coder that goes the road."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor

from pydist.codecs import QSGD, BlockFloat, BlockInt, Codec, Raw, Sign, Ternary, TopK
from pydist.encoding.blocks import BlockCoder, GatherBlockCoder, ScatterBlockCoder, TensorBlockCoder
from pydist.encoding.elias import EliasStage
from pydist.encoding.raw import GatherRawCoder, ScatterRawCoder, TensorRawCoder
from pydist.encoding.signs import OPS, GatherVoteCoder, ScatterVoteCoder, TensorVoteCoder, VoteRule
from pydist.encoding.ternary import GatherTernaryCoder, ScatterTernaryCoder, TensorTernaryCoder
from pydist.encoding.topk import GatherTopKCoder, ScatterTopKCoder, TensorTopKCoder
from pydist.formats import ternary, wire
from pydist.formats.blocks import BlockFormat, check_choice
from pydist.kernels import checks
from pydist.transport.coder import Coder, Worker

_NAMES: dict[type, str] = {
    QSGD: "qsgd", BlockInt: "block_int", BlockFloat: "block_float", Raw: "raw",
    Ternary: "ternary", TopK: "topk",
}  # fmt: skip


def check_codec(codec: object) -> None:
    """Raises TypeError unless ``codec`` is a codec."""
    if not isinstance(codec, Codec):
        raise TypeError(f"codec must be a pydist codec, got {type(codec).__name__}")


def check_op(op: str, codec: Codec, known: Sequence[str] = OPS) -> None:
    """Raises ValueError unless the codec's values can be reduced so."""
    check_choice("op", op, tuple(known))
    if op == "vote" and not (isinstance(codec, Sign) and codec.scale is None):
        raise ValueError(f"op='vote' needs codec Sign(scale=None), got {codec}")


def number_of(codec: Codec) -> int:
    """The codec's number in a header."""
    if isinstance(codec, QSGD) and codec.entropy == "elias":
        return wire.CODECS["qsgd_elias"]
    scaled = "sign" if codec.block_format is None else "scaled_sign"
    return wire.CODECS[_NAMES.get(type(codec), scaled)]


BlockCoders = TypeVar("BlockCoders", bound=BlockCoder)


def _staged(coder: BlockCoders, codec: Codec) -> BlockCoders:
    """The coder, with the entropy coding that its codec asks for."""
    if isinstance(codec, QSGD) and codec.entropy == "elias":
        coder.stage = EliasStage(coder)
    return coder


def unit_of(codec: Codec) -> int:
    """Elements that stay together: a block, a unit of trits, or a payload word of signs."""
    if isinstance(codec, Ternary):
        return ternary.UNIT
    if isinstance(codec, TopK):
        return codec.block
    return wire.WORD_BITS if codec.block_format is None else codec.block_format.block


def _wire_dtype(codec: Raw, x: Tensor) -> str:
    """Name of the dtype in which values of ``x`` travel."""
    return codec.dtype or str(x.dtype)[6:]


def _topk_format(codec: TopK) -> Any:
    """The format, which coders of top-k take in the place of a format with a scale."""
    return codec.topk_format


def _rule(codec: Codec, op: str, ties: str, seed: int) -> tuple[VoteRule, BlockFormat | None]:
    """The rule of a vote, and the format of the codec; the arguments are checked in any case."""
    check_codec(codec)
    check_op(op, codec)
    return VoteRule(average=op != "vote", ties=ties, seed=seed), codec.block_format


def all_reduce_coder(
    tensor: Tensor, codec: Codec, worker: Worker, *, op: str, ties: str, seed: int
) -> Coder:
    """The coder of an all-reduce in place; see :func:`pydist.all_reduce` for the arguments."""
    rule, form = _rule(codec, op, ties, seed)
    mean = op == "mean"
    if isinstance(codec, Raw):
        return TensorRawCoder(tensor, _wire_dtype(codec, tensor), worker, mean=mean)
    if isinstance(codec, Ternary):
        return TensorTernaryCoder(tensor, codec.clip, worker, mean=mean, seed=seed)
    if isinstance(codec, TopK):
        return TensorTopKCoder(
            tensor, _topk_format(codec), number_of(codec), worker, mean=mean, seed=seed
        )
    if form is None:
        return TensorVoteCoder(tensor, rule, worker, mean=mean)
    coder = TensorBlockCoder(tensor, form, number_of(codec), worker, mean=mean, seed=seed)
    return _staged(coder, codec)


def reduce_scatter_coder(
    output: Tensor, data: Tensor, codec: Codec, worker: Worker, *, op: str, ties: str, seed: int
) -> Coder:
    """The coder of a reduce-scatter of ``data`` into ``output``."""
    rule, form = _rule(codec, op, ties, seed)
    mean = op == "mean"
    if isinstance(codec, Raw):
        return ScatterRawCoder(output, data, _wire_dtype(codec, data), worker, mean=mean)
    if isinstance(codec, Ternary):
        return ScatterTernaryCoder(output, data, codec.clip, worker, mean=mean, seed=seed)
    if isinstance(codec, TopK):
        return ScatterTopKCoder(
            output, data, _topk_format(codec), number_of(codec), worker, mean=mean, seed=seed
        )
    if form is None:
        return ScatterVoteCoder(output, data, rule, worker, mean=mean)
    coder = ScatterBlockCoder(output, data, form, number_of(codec), worker, mean=mean, seed=seed)
    return _staged(coder, codec)


def all_gather_coder(
    output: Tensor, data: Tensor, codec: Codec, worker: Worker, *, seed: int
) -> Coder:
    """The coder of an all-gather of ``data`` into ``output``."""
    check_codec(codec)
    checks.check_seed(seed)
    if isinstance(codec, Raw):
        return GatherRawCoder(output, data, _wire_dtype(codec, data), worker)
    if isinstance(codec, Ternary):
        return GatherTernaryCoder(output, data, codec.clip, worker, seed=seed)
    if isinstance(codec, TopK):
        form = _topk_format(codec)
        return GatherTopKCoder(output, data, form, number_of(codec), worker, seed=seed)
    if codec.block_format is None:
        return GatherVoteCoder(output, data, worker)
    form = codec.block_format
    coder = GatherBlockCoder(output, data, form, number_of(codec), worker, seed=seed)
    return _staged(coder, codec)

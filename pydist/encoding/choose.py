"""From a codec and the arguments of a collective to its coder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from pydist.codecs import (
    QSGD,
    BlockFloat,
    BlockInt,
    Codec,
    Raw,
    Sign,
    Ternary,
    TopK,
    is_custom,
)
from pydist.encoding.blocks import BlockRows
from pydist.encoding.coders import GatherCoder, PlanCoder, ReduceCoder, ScatterCoder
from pydist.encoding.custom import CustomRows, check_custom
from pydist.encoding.entropy import EliasCoder
from pydist.encoding.plans import Plan
from pydist.encoding.raw import DoubleRows, RawRows
from pydist.encoding.rows import RowCodec
from pydist.encoding.signs import OPS, SignRows, VoteRule
from pydist.encoding.ternary import TernaryRows
from pydist.encoding.topk import TopKRows
from pydist.formats import wire
from pydist.formats.blocks import check_choice
from pydist.kernels import checks
from pydist.transport.coder import Coder, Worker

_BUILT_IN = (Sign, QSGD, BlockInt, BlockFloat, Raw, Ternary, TopK)
_NAMES: dict[type, str] = {
    QSGD: "qsgd", BlockInt: "block_int", BlockFloat: "block_float", Raw: "raw",
    Ternary: "ternary", TopK: "topk",
}  # fmt: skip


def check_codec(codec: object) -> None:
    """Raises TypeError unless ``codec`` is a codec."""
    if not isinstance(codec, Codec):
        raise TypeError(f"codec must be a pydist codec, got {type(codec).__name__}")
    if is_custom(codec):
        check_custom(codec)
    elif not isinstance(codec, _BUILT_IN):
        raise TypeError(f"codec {type(codec).__name__} has no encode: see pydist.Codec")


def check_op(op: str, codec: Codec, known: Sequence[str] = OPS) -> None:
    """Raises ValueError unless the codec's values can be reduced so."""
    check_choice("op", op, tuple(known))
    if op == "vote" and not (isinstance(codec, Sign) and codec.scale is None):
        raise ValueError(f"op='vote' needs codec Sign(scale=None), got {codec}")


def number_of(codec: Codec) -> int:
    """The codec's number in a header."""
    if is_custom(codec):
        return wire.CODECS["custom"]
    if isinstance(codec, QSGD) and codec.entropy == "elias":
        return wire.CODECS["qsgd_elias"]
    if isinstance(codec, Sign):
        return wire.CODECS["sign" if codec.scale is None else "scaled_sign"]
    return wire.CODECS[_NAMES[type(codec)]]


def rows_of(
    codec: Codec | None,
    dtype: torch.dtype,
    ranks: int,
    *,
    rule: VoteRule | None = None,
    numel: int | None = None,
) -> RowCodec:
    """The class of a codec on the wire.

    Args:
        codec: The codec; ``None`` for values as they are.
        dtype: Of the data.
        ranks: Ranks that take part.
        rule: How bare signs become a result; default their mean, or their sum.
        numel: Elements of a dense tensor, which travels as short as it is; ``None`` for whole
            units.
    """
    if codec is not None and is_custom(codec):
        return CustomRows(codec, numel)
    if codec is None or isinstance(codec, Raw):
        name = None if codec is None else codec.dtype
        wide = dtype == torch.float64 and name is None
        return (DoubleRows if wide else RawRows)(getattr(torch, name) if name else dtype, numel)
    if isinstance(codec, Ternary):
        return TernaryRows(codec.clip, ranks, numel)
    if isinstance(codec, TopK):
        return TopKRows(codec.topk_format, number_of(codec), numel)
    if codec.block_format is None:
        return SignRows(VoteRule(average=True) if rule is None else rule, ranks)
    return BlockRows(codec.block_format, number_of(codec), numel)


def bytes_in_bucket(codec: Codec, numel: int) -> int:
    """Bytes of the messages of one parameter's whole units; 0 of codecs that are always smaller."""
    coding = rows_of(codec, torch.float32, 1)
    return (
        0
        if isinstance(coding, RawRows | SignRows)
        else -(-numel // coding.unit) * coding.unit_bytes
    )


def unit_of(codec: Codec) -> int:
    """Elements that stay together: a block, a unit of trits, or a payload word of signs."""
    return rows_of(codec, torch.float32, 1).unit


Coders = TypeVar("Coders", bound=PlanCoder)


def with_entropy(coder: Coders, codec: Codec) -> Coders:
    """The coder, with the entropy coding that its codec asks for."""
    if isinstance(codec, QSGD) and codec.entropy == "elias":
        assert isinstance(coder.rows, BlockRows)
        coder.entropy_coder = EliasCoder(coder, coder.rows)
    return coder


def _checked(
    x: Tensor, codec: Codec, worker: Worker, numel: int, *, op: str, ties: str, seed: int
) -> RowCodec:
    """The codec on the wire of dense tensors; the arguments are checked in any case."""
    check_codec(codec)
    check_op(op, codec)
    rule = VoteRule(average=op != "vote", ties=ties, seed=seed)
    return rows_of(codec, x.dtype, worker.ranks, rule=rule, numel=numel)


def all_reduce_coder(
    tensor: Tensor, codec: Codec, worker: Worker, *, op: str, ties: str, seed: int
) -> Coder:
    """The coder of an all-reduce in place; see :func:`pydist.all_reduce` for the arguments."""
    n = tensor.numel()
    coding = _checked(tensor, codec, worker, n, op=op, ties=ties, seed=seed)
    plan = Plan.dense(n, coding.unit, first=worker.first)
    flat, mean = tensor.view(-1), op == "mean"
    return with_entropy(ReduceCoder(flat, coding, plan, worker, mean=mean, seed=seed), codec)


def reduce_scatter_coder(
    output: Tensor, data: Tensor, codec: Codec, worker: Worker, *, op: str, ties: str, seed: int
) -> ScatterCoder:
    """The coder of a reduce-scatter of ``data`` into ``output``."""
    n = output.numel()
    coding = _checked(data, codec, worker, n, op=op, ties=ties, seed=seed)
    plan = Plan.dense(n, coding.unit, worker.ranks, worker.first)
    mean = op == "mean"
    return with_entropy(
        ScatterCoder(output, data, coding, plan, worker, mean=mean, seed=seed), codec
    )


def all_gather_coder(
    output: Tensor, data: Tensor, codec: Codec, worker: Worker, *, seed: int
) -> GatherCoder:
    """The coder of an all-gather of ``data`` into ``output``."""
    check_codec(codec)
    checks.check_seed(seed)
    n = data.numel()
    coding = rows_of(codec, data.dtype, worker.ranks, rule=VoteRule(), numel=n)
    plan = Plan.dense(n, coding.unit, worker.ranks, worker.first, alike=True)
    return with_entropy(GatherCoder(output, data, coding, plan, worker, seed=seed), codec)

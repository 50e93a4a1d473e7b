"""Codecs: frozen values that say how numbers become bytes. No process group, no state, no torch.

:class:`Codec` is what all of them are, and the protocol of codecs written in Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydist.formats import ternary, wire
from pydist.formats.blocks import BlockFormat, check_bits, check_block, check_choice
from pydist.formats.elias import ENTROPIES
from pydist.formats.ternary import check_clip
from pydist.formats.topk import TopKFormat

__all__ = ["QSGD", "BlockFloat", "BlockInt", "Codec", "Raw", "Sign", "Ternary", "TopK"]

HALVES = ("float16", "bfloat16")
RAW_DTYPES = ("float32", *HALVES)


class Codec:
    """What all codecs are; and the base of a codec of your own, in one Python file.

    A codec of your own is a frozen dataclass below this class with the three methods. It works in
    ``pydist.all_reduce``, ``reduce_scatter`` and ``all_gather``, in ``ddp.compress`` and
    ``fsdp.compress`` with error feedback, and in ``pydist.simulate``. The owner of a share decodes
    the payloads of all ranks, adds them in rank order in float32, and encodes the sum again::

        @dataclass(frozen=True)
        class Half(pydist.Codec):
            def payload_bytes(self, n):
                return 2 * n

            def encode(self, x):
                return x.half().view(torch.uint8)

            def decode(self, payload, n):
                return payload.view(torch.float16).float()

    Elements travel in blocks of :attr:`block`. Where a tensor is cut into messages depends on its
    length and on the number of ranks, always between blocks; so a block must be encoded alike
    whatever is before or behind it. The last block of a parameter may be shorter.

    Attributes:
        block: Elements that are encoded together: of a scale, of a bit field.
        contracts: ``|x - decode(encode(x))|`` is below ``|x|``: error feedback then helps, and
            ``error_feedback="auto"`` keeps residuals. Without it, residuals may grow with each
            step.
    """

    block = 1024
    contracts = False

    @property
    def block_format(self) -> BlockFormat | None:
        """What the kernels are told of a codec with blocks and scales; ``None`` of others."""
        return None

    def payload_bytes(self, n: int) -> int:
        """Bytes of the payload of ``n`` elements, of any number of blocks.

        Of ``QSGD(entropy="elias")`` those before it is shortened, by as much as the data allows.
        """
        if self.block_format is None:
            raise NotImplementedError(f"{type(self).__name__} has no payload_bytes: pydist.Codec")
        return self.block_format.payload_bytes(n)

    def encode(self, x: Any) -> Any:
        """Makes a payload of elements.

        A codec that rounds at random takes another argument, ``draws``:
        ``draws.uniform()`` is a number from 0 to 1 for each element, a function of (seed, rank,
        step, parameter, element). Nothing else may be random: with ``algorithm="all_gather"``
        every rank encodes the sum for itself, and all must make the same bytes of it.

        Args:
            x: float32 tensor [n], n > 0, contiguous; not to be changed. It is on the data's device,
                or on the CPU where an owner encodes what came through host memory.

        Returns:
            uint8 tensor (or NumPy array) [payload_bytes(n)].
        """
        raise NotImplementedError(f"{type(self).__name__} is encoded by kernels: pydist.ops")

    def decode(self, payload: Any, n: int) -> Any:
        """Makes elements of a payload.

        Args:
            payload: uint8 tensor [payload_bytes(n)], contiguous; not to be changed.
            n: Elements.

        Returns:
            float32 tensor (or NumPy array) [n].
        """
        raise NotImplementedError(f"{type(self).__name__} is decoded by kernels: pydist.ops")


def is_custom(codec: Codec) -> bool:
    """Whether a codec is encoded in Python, by methods of its own."""
    return type(codec).encode is not Codec.encode


@dataclass(frozen=True)
class Sign(Codec):
    """Signs, bare or with a scale per block.

    Attributes:
        scale: ``None``: a vote of ±1. ``"l1"``: ± the mean magnitude of the block, the scale with
            the least error (EF-SGD). ``"l2"``: ± the root of its mean square (1-bit Adam).
        block: Elements that share a scale, a multiple of 32 from 32 to 65,536.

    Raises:
        ValueError: An attribute is out of range.
    """

    scale: str | None
    block: int = 512

    def __post_init__(self) -> None:
        if self.scale is not None:
            check_choice("scale", self.scale, ("l1", "l2"))
        check_block(self.block)

    @property
    def block_format(self) -> BlockFormat | None:
        """What the kernels are told; ``None`` for bare votes, which have kernels of their own."""
        return None if self.scale is None else BlockFormat("sign", 1, self.block, self.scale)

    def payload_bytes(self, n: int) -> int:
        """Bytes of the payload of ``n`` elements."""
        return wire.payload_bytes(n) if self.scale is None else super().payload_bytes(n)


@dataclass(frozen=True)
class QSGD(Codec):
    """Quantized SGD (Alistarh et al., NeurIPS 2017, arXiv 1610.02132): unbiased.

    A value is rounded up or down to one of ``2**bits - 1`` levels between ± the norm, at random and
    so that its expectation stays (to 2**-16 of a level).

    Attributes:
        bits: Bits per element, 2 … 8.
        block: Elements that share a norm, a multiple of 32 from 32 to 65,536.
        norm: ``"max"``: the largest magnitude, as in the paper's experiments; ``"l2"``: the
            Euclidean norm, as in its theorems: sparser, and of larger variance.
        entropy: ``"elias"``: blocks are sent as the paper's Elias codes, of variable length and
            never longer than ``None`` by more than a byte and 4 bytes of table. Values are
            bit-identical.

    Raises:
        TypeError: A number is not an integer.
        ValueError: An attribute is out of range.
    """

    bits: int
    block: int = 512
    norm: str = "max"
    entropy: str | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_block(self.block)
        check_choice("norm", self.norm, ("max", "l2"))
        if self.entropy not in ENTROPIES:
            raise ValueError(f"entropy must be None or 'elias', got {self.entropy!r}")

    @property
    def block_format(self) -> BlockFormat:
        """What the kernels are told."""
        return BlockFormat("levels", self.bits, self.block, self.norm, stochastic=True)


@dataclass(frozen=True)
class BlockInt(Codec):
    """Symmetric integers: ± the largest magnitude of a block in ``2**bits - 1`` equal steps.

    The largest magnitude decodes to itself. With ``rounding="nearest"`` what was decoded encodes to
    the same codes again.

    Attributes:
        bits: Bits per element, 2 … 8.
        block: Elements that share a scale, a multiple of 32 from 32 to 65,536.
        rounding: ``"nearest"`` (even in ties) or ``"stochastic"`` (unbiased to 2**-16 of a step).

    Raises:
        TypeError: A number is not an integer.
        ValueError: An attribute is out of range.
    """

    bits: int
    block: int = 128
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_block(self.block)
        check_choice("rounding", self.rounding, ("nearest", "stochastic"))

    @property
    def block_format(self) -> BlockFormat:
        """What the kernels are told."""
        stochastic = self.rounding == "stochastic"
        return BlockFormat("levels", self.bits, self.block, "max", stochastic=stochastic)


@dataclass(frozen=True)
class BlockFloat(Codec):
    """8-bit floats times a power of two (OCP microscaling, with a float32 scale).

    The codes are those of torch's casts to ``float8_e4m3fn`` and ``float8_e5m2``: rounded to
    nearest even, held to the largest value. What was decoded encodes to the same codes again.

    Attributes:
        format: ``"e4m3"``: 3 bits of mantissa; ``"e5m2"``: 2 bits, and a wider range.
        block: Elements that share a scale, a multiple of 32 from 32 to 65,536.

    Raises:
        TypeError: A number is not an integer.
        ValueError: An attribute is out of range.
    """

    format: str = "e4m3"
    block: int = 128

    def __post_init__(self) -> None:
        check_choice("format", self.format, ("e4m3", "e5m2"))
        check_block(self.block)

    @property
    def block_format(self) -> BlockFormat:
        """What the kernels are told."""
        return BlockFormat(self.format, 8, self.block, "max")


@dataclass(frozen=True)
class Ternary(Codec):
    """TernGrad (Wen et al., NeurIPS 2017, arXiv 1705.07878): unbiased but for the clipping.

    Values of a layer (a segment, or a bare tensor) are clipped, and then rounded at random to 0 or
    ± the scaler, the largest magnitude that any rank has left. As ranks share it, their sum is one
    of integers: it is exact, and nothing is lost on its way back. Five elements take a byte, the
    sum over n ranks ceil(log2(2 n + 1)) bits per element.

    The last layer is usually left alone, as are those of few elements.

    Attributes:
        clip: Magnitudes are held to so many standard deviations of the rank's own layer, the
            deviation being the root of the mean square; ``None`` for no clipping.

    Raises:
        TypeError: ``clip`` is not a number.
        ValueError: ``clip`` is not positive, or not one that float32 holds well.
    """

    clip: float | None = 2.5

    def __post_init__(self) -> None:
        check_clip(self.clip)
        if self.clip is not None:  # 2 and 2.0 are the same codec on all ranks
            object.__setattr__(self, "clip", float(self.clip))

    def payload_bytes(self, n: int) -> int:
        """Bytes of the payload of ``n`` elements."""
        return ternary.payload_bytes(n)


@dataclass(frozen=True)
class TopK(Codec):
    """The largest entries of every block; what is not sent belongs into a residual.

    The selection is exact, and every block sends the same number of entries: density · block, to
    nearest and at least one. Gradient dropping (Aji and Heafield, EMNLP 2017, arXiv 1704.05021) and
    deep gradient compression (Lin et al., ICLR 2018, arXiv 1712.01887) select from a whole layer,
    and so need a message of another length in every step. A position takes about
    2 + log2(1 / density) bits.

    Attributes:
        density: Share of the elements that travel, above 0 and at most 1.
        block: Elements per block, a multiple of 32 from 32 to 65,536.
        values: ``"float32"``, ``"bfloat16"`` or ``"float16"``: how a value travels.

    Raises:
        TypeError: ``block`` is not an integer.
        ValueError: An attribute is out of range.
    """

    density: float = 0.001
    block: int = 65536
    values: str = "float32"

    def __post_init__(self) -> None:
        _ = self.topk_format

    @property
    def topk_format(self) -> TopKFormat:
        """What the kernels are told."""
        return TopKFormat(self.density, self.block, self.values)

    def payload_bytes(self, n: int) -> int:
        """Bytes of the payload of ``n`` elements."""
        return self.topk_format.payload_bytes(n)


@dataclass(frozen=True)
class Raw(Codec):
    """Values uncompressed: what other codecs are compared with, and what goes where links are fast.

    Every value travels as a float. The owner of a shard adds in float32, in rank order, divides
    once for a mean, and rounds once to the dtype of the wire; so ``Raw()`` loses nothing but what
    float32 sums lose. As with every codec a NaN or an infinity on any rank, or a value or sum that
    the wire's dtype cannot hold, makes the whole result NaN on all ranks.

    Attributes:
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"`` on the wire, rounded to nearest even;
            ``None``: that of the tensor.

    Raises:
        ValueError: ``dtype`` is not one of these.
    """

    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None:
            check_choice("dtype", self.dtype, RAW_DTYPES)

    def payload_bytes(self, n: int) -> int:
        """Bytes of ``n`` values; with ``dtype=None`` those of float32."""
        return wire.WORD_BYTES * wire.words_for(n * (16 if self.dtype in HALVES else 32))

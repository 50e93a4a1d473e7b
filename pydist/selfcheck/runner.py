"""The kernels of one backend on NumPy arrays of stored bits, which uint16 is for bfloat16."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pydist.formats.blocks import BlockFormat
from pydist.formats.topk import TopKFormat
from pydist.formats.wire import IntArray
from pydist.kernels.block_formats import EncodeOptions
from pydist.kernels.lion import LionOptions
from pydist.kernels.ternary import Clip
from pydist.reference.signs import F32, U8, Storage, Ties
from pydist.selfcheck.bits import Bits

Segments = IntArray | None


@dataclass(frozen=True)
class Order:
    """What the order of equal magnitudes depends on."""

    seed: int = 0
    step: int = 0


class Runner:
    """Calls kernels on copies of arrays: no call changes its input.

    Attributes:
        name: The backend's, for messages.
    """

    name: str

    def run(self, name: str, *args: Any, **options: Any) -> Any:
        """Calls a kernel.

        Args:
            name: Its name in :mod:`pydist.ops`.
            *args: Its arrays, codec and length.
            **options: Its options.

        Returns:
            Its result, new values of the arrays that it changes, its flags: those there are.
        """
        raise NotImplementedError

    def pack_signs(self, x: Bits, *, zero_bit: int, segments: Segments) -> tuple[U8, int]:
        """Payload and flags."""
        return self.run("pack_signs", x, zero_bit=zero_bit, segments=segments)

    def unpack_votes(
        self, planes: U8, n: int, *, ranks: int | None, mean: bool, storage: Storage
    ) -> Bits:
        """Values of a vote."""
        return self.run("unpack_votes", planes, n, ranks=ranks, mean=mean, dtype=storage)

    def count_votes(self, payloads: U8) -> U8:
        """Count planes."""
        return self.run("count_votes", payloads)

    def majority_vote(
        self, payloads: U8, *, ties: Ties, seed: int, step: int, n: int | None, segments: Segments
    ) -> U8:
        """Sign plane, or sign and non-zero planes."""
        return self.run(
            "majority_vote", payloads, ties=ties, seed=seed, step=step, n=n, segments=segments
        )

    def lion_pack(
        self, grad: Bits, momentum: Bits, options: LionOptions, segments: Segments
    ) -> tuple[U8, Bits, int]:
        """Payload, new momentum and flags."""
        return self.run("lion_pack_", grad, momentum, segments=segments, **asdict(options))

    def lion_apply(
        self, param: Bits, planes: U8, *, lr: float, weight_decay: float, ranks: int | None
    ) -> Bits:
        """New parameters."""
        return self.run("lion_apply_", param, planes, lr=lr, weight_decay=weight_decay, ranks=ranks)

    def sum_values(self, values: Bits, *, mean: bool, storage: Storage) -> tuple[Bits, int]:
        """The sum, or the mean, of the rows, and flags."""
        return self.run("sum_values", values, mean=mean, dtype=storage)

    def quantize(
        self, x: Bits, form: BlockFormat, options: EncodeOptions, segments: Segments
    ) -> tuple[U8, int]:
        """Payload and flags."""
        return self.run("quantize", x, form, segments=segments, **asdict(options))

    def quantize_feedback(
        self, x: Bits, residual: Bits, form: BlockFormat, options: EncodeOptions, segments: Segments
    ) -> tuple[U8, Bits, int]:
        """Payload, new residual and flags."""
        return self.run(
            "quantize_feedback_", x, residual, form, segments=segments, **asdict(options)
        )

    def reduce_quantized(
        self,
        payloads: U8,
        n: int,
        form: BlockFormat,
        options: EncodeOptions,
        *,
        mean: bool,
        segments: Segments,
    ) -> tuple[U8, int]:
        """Payload and flags."""
        return self.run(
            "reduce_quantized", payloads, form, n, mean=mean, segments=segments, **asdict(options)
        )

    def sum_quantized(
        self,
        payloads: U8,
        n: int,
        form: BlockFormat,
        *,
        mean: bool,
        storage: Storage,
        segments: Segments,
    ) -> Bits:
        """The sum, or the mean, of what payloads hold."""
        return self.run(
            "sum_quantized", payloads, form, n, mean=mean, dtype=storage, segments=segments
        )

    def elias_encode(self, payload: U8, n: int, form: BlockFormat, segments: Segments) -> U8:
        """The payload of variable length."""
        return self.run("elias_encode", payload, form, n, segments=segments)

    def elias_decode(self, payload: U8, n: int, form: BlockFormat, segments: Segments) -> U8:
        """The payload of fixed length; raises MalformedError, or ValueError for its length."""
        return self.run("elias_decode", payload, form, n, segments=segments)

    def ternary_scale(self, x: Bits, clip: float | None, segments: Segments) -> tuple[F32, int]:
        """Scalers and flags."""
        return self.run("ternary_scale", x, Clip(clip), segments=segments)

    def ternary_pack(
        self, x: Bits, scalers: F32, shared: F32, options: EncodeOptions, segments: Segments
    ) -> tuple[U8, int]:
        """Payload and flags."""
        draws = {"seed": options.seed, "rank": options.rank, "step": options.step}
        return self.run("ternary_pack", x, scalers, shared=shared, segments=segments, **draws)

    def ternary_sum(self, payloads: U8, n: int, segments: Segments) -> tuple[U8, int]:
        """Sums and flags."""
        return self.run("ternary_sum", payloads, n, segments=segments)

    def ternary_unpack(
        self,
        payloads: U8,
        scalers: F32,
        n: int,
        *,
        mean: bool,
        storage: Storage,
        segments: Segments,
    ) -> tuple[Bits, int]:
        """Values and flags."""
        return self.run(
            "ternary_unpack", payloads, scalers, n, mean=mean, dtype=storage, segments=segments
        )

    def ternary_unpack_sums(
        self,
        sums: U8,
        scalers: F32,
        n: int,
        *,
        ranks: int,
        mean: bool,
        storage: Storage,
        segments: Segments,
    ) -> tuple[Bits, int]:
        """Values and flags."""
        return self.run(
            "ternary_unpack_sums", sums, scalers, n, ranks=ranks, mean=mean, dtype=storage,
            segments=segments,
        )  # fmt: skip

    def topk_select(
        self, x: Bits, form: TopKFormat, order: Order, segments: Segments
    ) -> tuple[U8, int]:
        """Payload and flags."""
        return self.run("topk_select", x, form, segments=segments, **asdict(order))

    def topk_feedback(
        self, x: Bits, residual: Bits, form: TopKFormat, order: Order, segments: Segments
    ) -> tuple[U8, Bits, int]:
        """Payload, new residual and flags."""
        return self.run("topk_feedback_", x, residual, form, segments=segments, **asdict(order))

    def topk_scatter(
        self,
        payloads: U8,
        n: int,
        form: TopKFormat,
        *,
        mean: bool,
        storage: Storage,
        segments: Segments,
    ) -> tuple[Bits, int]:
        """Values and flags."""
        return self.run(
            "topk_scatter", payloads, form, n, mean=mean, dtype=storage, segments=segments
        )

    def topk_reduce(
        self,
        payloads: U8,
        n: int,
        form: TopKFormat,
        order: Order,
        *,
        mean: bool,
        segments: Segments,
    ) -> tuple[U8, int]:
        """Payload and flags."""
        return self.run(
            "topk_reduce", payloads, form, n, mean=mean, segments=segments, **asdict(order)
        )

    def topk_clear(
        self, x: Bits, payload: U8, form: TopKFormat, segments: Segments
    ) -> tuple[Bits, int]:
        """The changed values, and flags."""
        return self.run("topk_clear_", x, payload, form, segments=segments)

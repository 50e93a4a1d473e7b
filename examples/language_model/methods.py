"""The methods that the demo compares, with their tuned settings and what they should send."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pydist import QSGD, BlockFloat, BlockInt, Raw, Sign, Ternary, TopK
from pydist.codecs import Codec
from pydist.encoding.choose import bytes_in_bucket
from pydist.transport.exchange import LATENCY_BYTES


@dataclass(frozen=True)
class Settings:
    """What all methods share.

    Attributes:
        steps: Training steps.
        seed: Seed of initialisation and batches.
        batch_size: Sequences a worker and step.
        context: Bytes a sequence.
        width: Size of the residual stream.
        depth: Number of blocks.
        heads: Number of attention heads.
        warmup: Steps of linear warm-up.
        learning_rate: Replaces every method's own; 0 keeps them.
    """

    steps: int = 1500
    seed: int = 0
    batch_size: int = 8
    context: int = 64
    width: int = 64
    depth: int = 2
    heads: int = 4
    warmup: int = 30
    learning_rate: float = 0.0


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        title: Name for people.
        lr: Best learning rate of the grid in `README.md`.
        betas: As the optimizer takes them; SGD has the first as momentum.
        weight_decay: Decoupled weight decay.
        aggregate: How Distributed Lion reduces votes; empty for averaged gradients.
        codec: How gradients travel, through pydist's `compress`; none: as torch sends them.
        correction: Momentum of `compress` (DGC), instead of the optimizer's.
        sharded: Under FSDP2 instead of DDP.
        weights: How weights are gathered there.
        error_feedback: As `compress` takes it.
        sgd: SGD with momentum.
        frozen_after: 1-bit Adam: share of the steps after which its variance is frozen.
    """

    title: str
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    aggregate: str = ""
    codec: Codec | None = None
    correction: float = 0.0
    sharded: bool = False
    weights: Codec | None = None
    error_feedback: str | bool = "auto"
    sgd: bool = False
    frozen_after: float = 0.0

    def predicted_bytes(self, parameters: int, workers: int) -> float | None:
        """Payload bytes a worker sends in a step, without headers; only of the demo's methods.

        An all-reduce of float32 gradients sends every byte twice but for the worker's own share; a
        vote sends one bit up and the majority (or the count of the votes) down. Two workers, or
        workers with little to say, send each other all their votes instead: one phase, not two.
        """
        if self.codec is not None or self.sgd or self.sharded or self.frozen_after:
            return None
        share = (workers - 1) / workers
        if not self.aggregate:
            return 2 * share * 4 * parameters
        down = 1 if self.aggregate == "majority" else workers.bit_length()
        votes = parameters / 8
        gathered, two_phase = (workers - 1) * votes, share * (1 + down) * votes
        return gathered if gathered - two_phase <= LATENCY_BYTES else two_phase

    def bits_a_gradient(self) -> float:
        """Bits that a worker sends for a gradient of a large parameter, on its way to the owner."""
        if self.frozen_after:
            return 32 * self.frozen_after + (1 - self.frozen_after)
        if self.codec is None:
            return 1.0 if self.aggregate else 32.0
        if isinstance(self.codec, Raw):
            return 32.0 if self.codec.dtype in (None, "float32") else 16.0
        large = 1 << 20
        return 8 * bytes_in_bucket(self.codec, large) / large


METHODS = {
    "adamw": Method("AdamW, fp32 gradients", 12e-3, (0.9, 0.95), 0.1),
    "lion": Method("Lion, fp32 gradients", 6e-3, (0.9, 0.95), 0.5),
    "majority": Method("Distributed Lion, majority", 6e-3, (0.9, 0.95), 0.5, "majority"),
    "average": Method("Distributed Lion, average", 24e-3, (0.9, 0.95), 0.5, "average"),
}


def _adamw(title: str, codec: Codec | None, **options: Any) -> Method:
    return replace(METHODS["adamw"], title=title, codec=codec, **options)


def _sgd(title: str, codec: Codec | None, lr: float = 0.5, **options: Any) -> Method:
    return Method(f"SGD, {title}", lr, (0.0, 0.0), 0.0, codec=codec, sgd=True, **options)


def _momentum(title: str, codec: Codec | None) -> Method:
    return Method(f"SGD, momentum 0.9, {title}", 0.1, (0.9, 0.0), 0.0, codec=codec, sgd=True)


CODECS = {
    "bf16": _adamw("bfloat16", Raw("bfloat16")),
    "float8": _adamw("BlockFloat(e4m3)", BlockFloat("e4m3")),
    "qsgd8": _adamw("QSGD(8)", QSGD(8)),
    "qsgd4": _adamw("QSGD(4)", QSGD(4)),
    "qsgd2": _adamw("QSGD(2), no feedback", QSGD(2)),
    "int4": _adamw("BlockInt(4)", BlockInt(4)),
    "ternary": _adamw("Ternary, no feedback", Ternary()),
    "sign": _adamw("Sign(l1)", Sign("l1")),
    "sign-plain": _adamw("Sign(l1), no feedback", Sign("l1"), error_feedback=False),
    "topk": _adamw("TopK(0.01)", TopK(0.01)),
    "topk-plain": _adamw("TopK(0.01), no feedback", TopK(0.01), error_feedback=False),
    "onebit-adam": _adamw("1-bit Adam", None, frozen_after=0.2),
    "sgd": _sgd("fp32 gradients", None),
    "sgd-sign": _sgd("Sign(l1)", Sign("l1")),
    "sgd-sign-plain": _sgd("Sign(l1), no feedback", Sign("l1"), error_feedback=False),
    "sgd-topk": _sgd("TopK(0.01)", TopK(0.01)),
    "sgd-topk-plain": _sgd("TopK(0.01), no feedback", TopK(0.01), error_feedback=False),
    "momentum": _momentum("fp32 gradients", None),
    "momentum-topk": _momentum("TopK(0.01)", TopK(0.01)),
    "momentum-dgc": _sgd("TopK(0.01), momentum 0.9 corrected", TopK(0.01), lr=0.1, correction=0.9),
    "fsdp": _adamw("FSDP2, fp32", None, sharded=True),
    "fsdp8": _adamw(
        "FSDP2, QSGD(8), weights BlockInt(8)", QSGD(8), sharded=True, weights=BlockInt(8)
    ),
    "fsdp4-8": _adamw(
        "FSDP2, QSGD(4), weights BlockInt(8)", QSGD(4), sharded=True, weights=BlockInt(8)
    ),
    "fsdp4": _adamw(
        "FSDP2, QSGD(4), weights BlockInt(4)", QSGD(4), sharded=True, weights=BlockInt(4)
    ),
}
"""What `convergence.py` compares with AdamW, or with SGD, on averaged float32 gradients."""

"""The methods that the demo compares, with their tuned settings and what they should send."""

from __future__ import annotations

from dataclasses import dataclass


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
    """

    steps: int = 600
    seed: int = 0
    batch_size: int = 4
    context: int = 64
    width: int = 128
    depth: int = 2
    heads: int = 4
    warmup: int = 30


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        title: Name for people.
        lr: Best learning rate of the grid in `README.md`.
        betas: As the optimizer takes them.
        weight_decay: Decoupled weight decay.
        aggregate: How Distributed Lion reduces votes; empty for averaged gradients.
    """

    title: str
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    aggregate: str = ""

    def predicted_bytes(self, parameters: int, workers: int) -> float:
        """Payload bytes a worker sends in a step, without headers.

        An all-reduce of float32 gradients sends every byte of a shard twice but for the worker's
        own; a vote sends one bit up and the majority (or the count of votes) down.
        """
        share = (workers - 1) / workers
        if not self.aggregate:
            return 2 * share * 4 * parameters
        down = 1 if self.aggregate == "majority" else workers.bit_length()
        return share * (1 + down) * parameters / 8


METHODS = {
    "adamw": Method("AdamW, fp32 gradients", 6e-3, (0.9, 0.95), 0.02),
    "lion": Method("Lion, fp32 gradients", 7e-4, (0.9, 0.95), 0.1),
    "majority": Method("Distributed Lion, majority", 7e-4, (0.9, 0.95), 0.1, "majority"),
    "average": Method("Distributed Lion, average", 1.4e-3, (0.9, 0.95), 0.1, "average"),
}

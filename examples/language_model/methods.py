"""The methods that the demo compares, with their tuned settings and what they should send."""

from __future__ import annotations

from dataclasses import dataclass

from pydist.road import LATENCY_BYTES


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

        An all-reduce of float32 gradients sends every byte twice but for the worker's own share; a
        vote sends one bit up and the majority (or the count of the votes) down. Two workers, or
        workers with little to say, send each other all their votes instead: one phase, not two.
        """
        share = (workers - 1) / workers
        if not self.aggregate:
            return 2 * share * 4 * parameters
        down = 1 if self.aggregate == "majority" else workers.bit_length()
        votes = parameters / 8
        gathered, two_phase = (workers - 1) * votes, share * (1 + down) * votes
        return gathered if gathered - two_phase <= LATENCY_BYTES else two_phase


METHODS = {
    "adamw": Method("AdamW, fp32 gradients", 12e-3, (0.9, 0.95), 0.1),
    "lion": Method("Lion, fp32 gradients", 6e-3, (0.9, 0.95), 0.5),
    "majority": Method("Distributed Lion, majority", 6e-3, (0.9, 0.95), 0.5, "majority"),
    "average": Method("Distributed Lion, average", 24e-3, (0.9, 0.95), 0.5, "average"),
}

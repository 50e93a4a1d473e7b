"""Distributed Lion again, all workers in one process, in NumPy: what ranks are compared with.

Written from the paper (arXiv 2404.00438, Algorithm 1) and the design's rules for zeros, ties,
missing and non-finite gradients; it shares with the package only the tie hash and the draws.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pydist.reference import signs as reference

F32 = npt.NDArray[np.float32]
f = np.float32


@dataclass
class Param:
    """A parameter as all workers hold it, in memory order, with each worker's momentum."""

    value: F32
    storage: str
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    momenta: list[F32] = field(default_factory=list)


@dataclass
class Oracle:
    params: list[Param]
    workers: int
    aggregate: str = "majority"
    ties: Any = "hash"
    seed: int = 0
    momentum_storage: Any = "float32"
    binarization_range: float | None = None
    exact_skip: bool = False
    steps: int = 0
    skipped: int = 0

    def __post_init__(self) -> None:
        for p in self.params:
            p.momenta = [np.zeros_like(p.value) for _ in range(self.workers)]

    def _vote(
        self, ordinal: int, worker: int, grad: F32
    ) -> tuple[npt.NDArray[np.bool_], F32, bool]:
        """A worker's votes, its new momentum, and whether all was finite."""
        p = self.params[ordinal]
        beta1, beta2 = p.betas
        m = p.momenta[worker]
        with np.errstate(all="ignore"):
            c = f(beta1) * m + f(1 - beta1) * grad
            new = reference.round_to(f(beta2) * m + f(1 - beta2) * grad, self.momentum_storage)
            if self.binarization_range is None:
                zero_votes_up = (worker + self.steps) % 2 == 1
                votes = (c > 0) | ((c == 0) & zero_votes_up)
            else:
                draws = reference.draws16(self.seed, worker << 2, self.steps, ordinal, 0, grad.size)
                chance = (c * f(1 / self.binarization_range) + f(1)) * f(32768)
                votes = chance > draws.astype(np.float32)
        good = np.isfinite(grad) & np.isfinite(new)
        return votes, np.where(good, new, m).astype(np.float32), bool(good.all())

    def _delta(self, ordinal: int, votes: list[npt.NDArray[np.bool_]]) -> F32:
        total = 2 * np.stack(votes).astype(np.int64).sum(0) - self.workers
        if self.aggregate == "average":
            return total.astype(np.float32)
        up = reference.tie_bits(self.seed, self.steps, ordinal, 0, total.size)
        at_tie = {"hash": 2.0 * up - 1, "zero": 0.0 * up, "positive": 0.0 * up + 1}[self.ties]
        return np.where(total == 0, at_tie, np.sign(total)).astype(np.float32)

    def step(self, grads: list[list[F32 | None]]) -> None:
        """``grads[worker][parameter]``, ``None`` where a worker has none."""
        n = self.workers
        used = [any(grads[w][i] is not None for w in range(n)) for i in range(len(self.params))]
        finite, news, deltas = True, {}, {}
        for i, p in enumerate(self.params):
            votes = []
            for w in range(n):
                grad = grads[w][i]
                grad = np.zeros_like(p.value) if grad is None else grad
                vote, news[w, i], good = self._vote(i, w, grad)
                votes.append(vote)
                finite &= good
            deltas[i] = self._delta(i, votes)
        for (w, i), new in news.items():
            # Without exact_skip a worker's momentum moves even if the step is skipped; that of a
            # parameter it has no gradient for waits until it is known that others have one.
            keeps = not finite and (self.exact_skip or grads[w][i] is None)
            if used[i] and not keeps:
                self.params[i].momenta[w] = new
        if finite:
            for i, p in enumerate(self.params):
                if used[i]:
                    rate = f(p.lr if self.aggregate == "majority" else p.lr / n)
                    moved = p.value * f(1 - p.lr * p.weight_decay) - rate * deltas[i]
                    p.value = reference.round_to(moved, p.storage)  # type: ignore[arg-type]
        self.skipped += not finite
        self.steps += 1

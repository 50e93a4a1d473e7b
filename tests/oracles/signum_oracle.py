"""signSGD and Signum with majority vote again, all workers in one process, in NumPy.

Written from arXiv 1810.05291 (Algorithm 1) and the design's rules for zeros, ties, missing and
non-finite gradients; it shares with the package only the tie hash.
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
class Oracle:
    """``beta=None`` is signSGD; ``values[parameter]`` are updated in place."""

    values: list[F32]
    workers: int
    lr: float
    weight_decay: float
    beta: float | None
    storage: Any = "float32"
    momentum_storage: Any = "float32"
    aggregate: str = "majority"
    ties: str = "hash"
    seed: int = 0
    exact_skip: bool = False
    steps: int = 0
    skipped: int = 0
    momenta: list[list[F32]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.momenta = [[np.zeros_like(x) for x in self.values] for _ in range(self.workers)]

    def _direction(self, worker: int, i: int, grad: F32) -> F32:
        if self.beta is None:
            return grad
        return f(self.beta) * self.momenta[worker][i] + f(1 - self.beta) * grad

    def _decided(self, ordinal: int, up: list[npt.NDArray[np.bool_]]) -> F32:
        """The sum of the votes, or its sign."""
        total = 2 * np.stack(up).sum(0, dtype=np.int64) - self.workers
        if self.aggregate == "average":
            return total.astype(np.float32)
        fair = reference.tie_bits(self.seed, self.steps, ordinal, 0, total.size)
        even = {"hash": 2.0 * fair - 1, "zero": 0.0 * fair, "positive": 0.0 * fair + 1}[self.ties]
        return np.where(total == 0, even, np.sign(total)).astype(np.float32)

    def step(self, grads: list[list[F32 | None]]) -> None:
        """``grads[worker][parameter]``, ``None`` where a worker has none."""
        finite, news, decided = True, {}, {}
        for i, value in enumerate(self.values):
            if all(grads[w][i] is None for w in range(self.workers)):
                continue
            up = []
            for w in range(self.workers):
                given = grads[w][i]
                grad = np.zeros_like(value) if given is None else given
                with np.errstate(all="ignore"):
                    v = self._direction(w, i, grad)
                    # A zero votes up where rank + step is odd.
                    up.append((v > 0) | ((v == 0) & ((w + self.steps) % 2 == 1)))
                    new = reference.round_to(v, self.momentum_storage)
                good = np.isfinite(grad) & np.isfinite(new)
                finite &= bool(good.all())
                news[w, i] = (np.where(good, new, self.momenta[w][i]), given is None)
            decided[i] = self._decided(i, up)
        for (w, i), (new, missing) in news.items():
            if finite or not (self.exact_skip or missing):
                self.momenta[w][i] = new.astype(np.float32)
        if finite:
            rate = f(self.lr if self.aggregate == "majority" else self.lr / self.workers)
            for i, delta in decided.items():
                kept = self.values[i] * f(1 - self.lr * self.weight_decay)
                self.values[i] = reference.round_to(kept - rate * delta, self.storage)
        self.skipped += not finite
        self.steps += 1

"""1-bit Adam, 0/1 Adam and 1-bit LAMB again, all workers in one process, in NumPy.

Written from the equations in the optimizers' docstrings (arXiv 2102.02888, 2202.06009, 2104.06069)
and the design's rules for missing and non-finite gradients. Of the package it uses the codecs'
specification (:mod:`pydist.reference.blocks`), nothing else.

Every operation is one in float32, so bit identity can be asked for; sums over a layer add
halves in double precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pydist.formats.blocks import BlockFormat
from pydist.reference import signs as reference
from pydist.reference.blocks import Draws, dequantize, quantize_feedback

F32 = npt.NDArray[np.float32]
Grads = list[list["F32 | None"]]
f = np.float32


@dataclass
class Param:
    """A parameter, with what all workers share of its state and what each has for itself."""

    x: F32
    m: F32
    v: F32
    residuals: list[F32]
    owner: F32
    steps: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Oracle:
    """What the three have in common; ``step(grads)`` with ``grads[worker][parameter]``."""

    start: list[F32]
    workers: int
    storage: Any = "float32"
    lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.1
    form: BlockFormat | None = BlockFormat("sign", 1, 512, "l2")
    bias_correction: bool = True
    residual_storage: Any = "float32"
    seed: int = 0
    calls: int = 0
    skipped: int = 0

    def __post_init__(self) -> None:
        def zeros(x: F32) -> F32:
            return np.zeros_like(x)

        self.params = [
            Param(x.copy(), zeros(x), zeros(x), [zeros(x) for _ in range(self.workers)], zeros(x))
            for x in self.start
        ]

    # ----------------------------------------------------------------- on the wire

    def raw_mean(self, values: list[F32]) -> F32:
        """In rank order, rounded to the parameter's type."""
        total = values[0]
        for value in values[1:]:
            total = total + value
        return reference.round_to(total / f(self.workers), self.storage)

    def feedback_mean(self, ordinal: int, values: list[F32]) -> tuple[F32, list[F32], F32]:
        """Mean, new worker residuals, new owner's residual of one parameter."""
        p = self.params[ordinal]
        if self.form is None:
            total = values[0]
            for value in values[1:]:
                total = total + value
            return total / f(self.workers), p.residuals, p.owner
        if not values[0].size:
            return values[0], p.residuals, p.owner
        segments = np.array([[0, values[0].size, ordinal, 0]], dtype=np.int64)
        decoded, residuals = [], []
        for w, value in enumerate(values):
            sent, residual, _ = quantize_feedback(
                value, p.residuals[w], self.form, storage=self.residual_storage,
                zero_bit=(w + self.calls) % 2, segments=segments,
                draws=Draws(self.seed, w, 0, self.calls),
            )  # fmt: skip
            decoded.append(dequantize(sent, self.form, value.size, segments=segments))
            residuals.append(residual)
        total = decoded[0]
        for value in decoded[1:]:
            total = total + value
        sent, owner, _ = quantize_feedback(
            total / f(self.workers), p.owner, self.form, storage=self.residual_storage,
            zero_bit=self.calls % 2, segments=segments, draws=Draws(self.seed, 0, 1, self.calls),
        )  # fmt: skip
        return dequantize(sent, self.form, total.size, segments=segments), residuals, owner

    # ----------------------------------------------------------------- a step

    def step(self, grads: Grads) -> None:
        finite = all(np.isfinite(g).all() for row in grads for g in row if g is not None)
        if finite:
            for i in range(len(self.params)):
                given = [grads[w][i] for w in range(self.workers)]
                if any(g is not None for g in given):
                    self.move(i, [np.zeros_like(self.start[i]) if g is None else g for g in given])
        self.skipped += not finite
        self.calls += 1

    def move(self, i: int, grads: list[F32]) -> None:
        raise NotImplementedError

    def skipped_by(self, worker: int) -> int:
        """Steps that a worker did not make."""
        return self.skipped

    def local(self, i: int, worker: int) -> F32:
        """A worker's parameter."""
        return self.params[i].x

    def momentum(self, i: int, worker: int) -> F32:
        """A worker's momentum."""
        return self.params[i].m

    # ----------------------------------------------------------------- equations

    def blend(self, m: F32, g: F32) -> F32:
        return m * f(self.betas[0]) + g * f(1 - self.betas[0])

    def blend_squares(self, v: F32, g: F32) -> F32:
        return v * f(self.betas[1]) + g * f(1 - self.betas[1]) * g

    def root(self, v: F32, updates: int) -> F32:
        c2 = 1 / math.sqrt(1 - self.betas[1] ** updates) if self.bias_correction else 1.0
        return np.sqrt(v) * f(c2) + f(self.eps)

    def c1(self, steps: int) -> float:
        return 1 / (1 - self.betas[0] ** steps) if self.bias_correction else 1.0

    def moved(self, x: F32, decay: float, way: F32) -> F32:
        return reference.round_to(x * f(decay) - way, self.storage)

    def compressed_momentum(self, i: int, grads: list[F32]) -> None:
        """Step 1 and 2 of the compressed stage, and m."""
        p = self.params[i]
        mask = (p.v != 0).astype(np.float32)
        sent = [self.blend(p.m, g) * mask for g in grads]
        mean, residuals, owner = self.feedback_mean(i, sent)
        p.m = np.where(mask == 0, f(0), mean)
        p.residuals = [np.where(mask == 0, f(0), e) for e in residuals]
        p.owner = np.where(mask == 0, f(0), owner)


@dataclass
class Adam(Oracle):
    warmup_steps: int = 3

    def moments(self, i: int, grads: list[F32]) -> bool:
        """m and v of the step; whether it was compressed."""
        p = self.params[i]
        compressed = p.steps >= self.warmup_steps
        if compressed:
            self.compressed_momentum(i, grads)
        else:
            g = self.raw_mean(grads)
            p.m, p.v = self.blend(p.m, g), self.blend_squares(p.v, g)
        p.steps += 1
        return compressed

    def move(self, i: int, grads: list[F32]) -> None:
        self.moments(i, grads)
        p = self.params[i]
        way = p.m / self.root(p.v, min(p.steps, self.warmup_steps)) * f(self.lr * self.c1(p.steps))
        p.x = self.moved(p.x, 1 - self.lr * self.weight_decay, way)


@dataclass
class Lamb(Adam):
    eps: float = 1e-6
    max_coeff: float = 10.0
    min_coeff: float = 0.01
    coeff_beta: float = 0.9
    factor_max: float = 4.0
    factor_min: float = 0.5
    factor_threshold: float = 0.1

    def move(self, i: int, grads: list[F32]) -> None:
        p = self.params[i]
        before = p.m
        compressed = self.moments(i, grads)
        divisor = self.root(p.v, min(p.steps, self.warmup_steps))
        adam = p.m / divisor * f(self.c1(p.steps))
        u = adam + p.x * f(self.weight_decay) if self.weight_decay else adam
        if not compressed:
            c = self.trust_ratio(p, norm(p.x), norm(u))
        else:
            c = p.extra.get("mean", 1.0) * self.factor(p, before, divisor, adam, u)
        p.x = self.moved(p.x, 1.0, u * f(self.lr * c))

    def trust_ratio(self, p: Param, weight: float, update: float) -> float:
        if weight == 0 or update == 0:
            return 1.0
        c = float(np.clip(weight / update, self.min_coeff, self.max_coeff))
        mean = p.extra.get("mean")
        p.extra["mean"] = c if mean is None else self.coeff_beta * mean + (1 - self.coeff_beta) * c
        return c

    def factor(self, p: Param, before: F32, divisor: F32, adam: F32, u: F32) -> float:
        g = (p.m - before * f(self.betas[0])) * f(1 / (1 - self.betas[0]))
        p.extra["fresh"] = self.blend_squares(p.extra.get("fresh", p.v), g)
        ratios = divisor / self.root(p.extra["fresh"], self.warmup_steps)
        r = float(np.where(p.v == 0, f(0), ratios).max()) if p.x.size else 1.0
        if self.weight_decay and norm(u):
            s = min(1.0, norm(adam) / norm(u))
            r = r * s + (1 - s)
        last, t = p.extra.get("factor", 1.0), self.factor_threshold
        r = float(
            np.clip(np.clip(r, self.factor_min, self.factor_max), last * (1 - t), last * (1 + t))
        )
        p.extra["factor"] = r
        return r


def norm(x: F32) -> float:
    """Squares in double precision, added by halves."""
    squares = x.astype(np.float64) ** 2
    while squares.size > 1:
        half = (squares.size + 1) // 2
        first, second = squares[:half], squares[half:]
        squares = first + np.pad(second, (0, half - second.size))
    return math.sqrt(squares.sum())


@dataclass
class ZeroOne(Oracle):
    """``extra`` has each worker's ``m``, ``u`` and ``x`` between two syncs, and ``anchor``."""

    var_freeze_step: int = 6
    var_update_scaler: int = 2
    local_step_scaler: int = 4
    local_step_clipper: int = 4
    lrs: list[float] | None = None
    made: int = 0
    rate_sum: float = 0.0
    kept: float = 1.0
    pending: int = 0
    local_skips: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.local_skips = [0] * self.workers
        # T_v, written out.
        self.variance_steps, k, j = set[int](), 0, 0
        while k < self.var_freeze_step:
            self.variance_steps.add(k)
            k, j = k + 2 ** (j // self.var_update_scaler), j + 1

    def step(self, grads: Grads) -> None:
        t = self.calls
        if self.lrs is not None:
            self.lr = self.lrs[t]
        if not self.lr > 0:
            grads = [[None if g is None else np.zeros_like(g) for g in row] for row in grads]
        since = max(0, t - self.var_freeze_step)
        interval = min(2 ** (since // self.local_step_scaler), self.local_step_clipper)
        self.in_variance_step = t in self.variance_steps
        before = (self.rate_sum, self.kept)
        if self.lr > 0:
            self.rate = self.lr * self.c1(self.made + 1)
            self.rate_sum += self.rate
            self.kept *= 1 - self.lr * self.weight_decay
        if not self.in_variance_step and self.pending + 1 < interval:
            self.local_step(grads)
            self.calls += 1
            self.pending += 1
            self.made += self.lr > 0
            return
        finite = all(np.isfinite(g).all() for row in grads for g in row if g is not None)
        if finite and self.rate_sum > 0:
            for i in range(len(self.params)):
                given = [grads[w][i] for w in range(self.workers)]
                if self.pending or any(g is not None for g in given):
                    self.move(i, [np.zeros_like(self.start[i]) if g is None else g for g in given])
        self.calls += 1
        self.skipped += not finite
        if not finite:
            self.rate_sum, self.kept = before
        else:
            self.made += self.lr > 0
            self.rate_sum, self.kept, self.pending = 0.0, 1.0, 0

    def local_step(self, grads: Grads) -> None:
        for w, row in enumerate(grads):
            if not all(np.isfinite(g).all() for g in row if g is not None):
                self.local_skips[w] += 1
                continue
            for i, given in enumerate(row):
                p = self.params[i]
                if self.lr > 0:
                    m, u = self.next(i, w, np.zeros_like(p.x) if given is None else given)
                    way = u / self.root(p.v, max(1, p.steps))
                    p.extra[w] = (m, u, self.moved(p.x, self.kept, way))

    def next(self, i: int, w: int, g: F32) -> tuple[F32, F32]:
        p = self.params[i]
        m, u, _ = p.extra.get(w, (p.m, np.zeros_like(p.x), p.x))
        if self.lr > 0:
            m = self.blend(m, g) * (p.v != 0).astype(np.float32)
            u = u + m * f(self.rate) if w in p.extra else m * f(self.rate)
        return m, u

    def move(self, i: int, grads: list[F32]) -> None:
        p = self.params[i]
        first = p.steps == 0 and self.calls < self.var_freeze_step
        if self.in_variance_step or first:
            g = self.raw_mean(grads)
            p.m, p.v = self.blend(p.m, g), self.blend_squares(p.v, g)
            p.steps += 1
            u = p.m * f(self.rate_sum)
        else:
            mean, residuals, owner = self.feedback_mean(
                i, [self.next(i, w, g)[1] for w, g in enumerate(grads)]
            )
            never = p.v == 0
            u = np.where(never, f(0), mean)
            p.residuals = [np.where(never, f(0), e) for e in residuals]
            p.owner = np.where(never, f(0), owner)
            p.m = u * f(1 / self.rate_sum)
        p.x = self.moved(p.x, self.kept, u / self.root(p.v, max(1, p.steps)))
        p.extra.clear()

    def skipped_by(self, worker: int) -> int:
        return self.skipped + self.local_skips[worker]

    def local(self, i: int, worker: int) -> F32:
        p = self.params[i]
        return p.extra[worker][2] if worker in p.extra else p.x

    def momentum(self, i: int, worker: int) -> F32:
        p = self.params[i]
        return p.extra[worker][0] if worker in p.extra else p.m

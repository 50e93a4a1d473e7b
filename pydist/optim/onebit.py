"""What the 1-bit optimizers share: a warm-up, compressed momenta, residuals, checkpoints.

Arithmetic, for all of them: float32, every operation rounded on its own; scalars are computed in
double precision and rounded once.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pydist.codecs import Codec
from pydist.encoding.choose import check_codec
from pydist.kernels import checks
from pydist.optim.base import Algorithm, DistributedOptimizer
from pydist.optim.exchange import MeanExchange
from pydist.optim.layout import (
    Layout,
    check_betas,
    check_count,
    check_gradient,
    check_number,
    check_rates,
)
from pydist.optim.state import Kept
from pydist.optim.unsent import Unsent, mean_unsent
from pydist.training.residuals import contracts
from pydist.transport.exchange import ALGORITHMS

RESIDUAL, OWNER, SPAN = _UNSENT = ("residual", "owner_residual", "owner_span")


class OneBitOptimizer(DistributedOptimizer):
    """Adam-like optimizers that send momenta with error feedback on both sides.

    Subclasses say which parameters are compressed in a step, what is sent of them, and how the mean
    that comes back changes them. The arguments are documented at :class:`pydist.optim.OneBitAdam`.
    """

    _agreed_options: tuple[str, ...] = ("lr", "betas", "eps", "weight_decay")

    _copied = (
        *DistributedOptimizer._copied, "_codec", "_bias_correction", "_seed", "_algorithm",
        "_residual_dtype", "_numbers",
    )  # fmt: skip

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        codec: Codec | None,
        bias_correction: bool,
        group: dist.ProcessGroup | None,
        seed: int,
        algorithm: Algorithm,
        residual_dtype: torch.dtype,
        replica_check_every: int,
        positive: Mapping[str, int],
    ) -> None:
        self._codec = codec
        self._bias_correction = bias_correction
        self._seed, self._algorithm, self._residual_dtype = seed, algorithm, residual_dtype
        self._numbers = dict(positive)

        def prepare() -> None:
            if codec is not None:
                check_codec(codec)
                if not contracts(codec):
                    raise ValueError(
                        f"codec must be one whose error feedback converges, got {codec}"
                    )
            if not isinstance(bias_correction, bool):
                raise TypeError(f"bias_correction must be True or False, got {bias_correction!r}")
            checks.check_seed(seed)
            if algorithm not in ALGORITHMS:
                raise ValueError(f"algorithm must be one of {ALGORITHMS}, got {algorithm!r}")
            if residual_dtype not in (torch.float32, torch.bfloat16):
                raise TypeError(f"residual_dtype must be float32 or bfloat16, got {residual_dtype}")
            for name, value in positive.items():
                check_count(name, value, 1)

        super().__init__(params, defaults, group, prepare, replica_check_every)

    def _begin(self) -> None:
        super()._begin()
        self._exchange: MeanExchange | None = None

    @cached_property
    def kept(self) -> Mapping[str, Kept]:
        """Steps, momentum, variance, and what was not sent (:mod:`pydist.optim.unsent`)."""
        dtype = self._residual_dtype
        return {
            "step": Kept(int),
            "exp_avg": Kept(torch.float32),
            "exp_avg_sq": Kept(torch.float32, least=0.0),
            RESIDUAL: Kept(dtype, by_rank=True, later=True),
            OWNER: Kept(dtype, by_rank=True, later=True),
            SPAN: Kept(torch.int64, by_rank=True, later=True, rows=(4,)),
        }

    def _settings(self) -> dict[str, Any]:
        return {
            "codec": repr(self._codec),
            "bias_correction": self._bias_correction,
            "seed": self._seed,
            "algorithm": self._algorithm,
            "residual_dtype": str(self._residual_dtype),
            **self._numbers,
        }

    def _check_options(self, group: dict[str, Any]) -> None:
        check_rates(group)
        check_betas(group["betas"])
        if not 0 < check_number("eps", group["eps"]) < math.inf:
            raise ValueError(f"eps must be positive, got {group['eps']}")

    def _adopt(self, layout: Layout) -> None:
        super()._adopt(layout)
        self.exchange.cover(layout)

    @property
    def exchange(self) -> MeanExchange:
        """What averages over the ranks; it has the residuals."""
        if self._exchange is None:
            self._exchange = MeanExchange(
                self._codec, self._seed, self._algorithm, self._residual_dtype, *self.rank_and_world
            )
        return self._exchange

    # ----------------------------------------------------------------- of a subclass

    def _compressed(self) -> np.ndarray:
        """Which of the trained parameters are compressed in this step, bool [parameters]."""
        raise NotImplementedError

    def _fill(self, i: int, p: Tensor, group: dict[str, Any], grad: Tensor, squeeze: bool) -> None:
        """Writes what is sent of a parameter into its view of the exchange."""
        raise NotImplementedError

    def _update(self, i: int, p: Tensor, group: dict[str, Any], squeeze: bool) -> None:
        """Changes a parameter and its state by the mean in its view of the exchange."""
        raise NotImplementedError

    # ----------------------------------------------------------------- a step

    def _gradients(self) -> tuple[list[Tensor | None], str | None]:
        """Gradients of the trained parameters; why they cannot be used."""
        grads: list[Tensor | None] = []
        problem = self._problem or self._damaged
        try:
            self._unscale()
            for i, p, _ in self._with_groups() if problem is None else ():
                self.entry_of(i, p)
                if p.grad is not None:
                    check_gradient(self.name_of(i), p.grad, p)
                grads.append(p.grad)
        except Exception as error:
            problem = str(error)
        return grads, problem

    def _advance(self) -> None:
        self.look()
        grads, problem = self._gradients()
        self._average(grads, problem, np.array([grad is not None for grad in grads], dtype=bool))

    def _average(
        self, grads: Sequence[Tensor | None], problem: str | None, has: np.ndarray
    ) -> bool:
        """Sends, waits, and updates what any rank has a gradient for; False where none moved."""
        compressed = self._compressed() if problem is None else np.zeros(0, dtype=bool)
        fields = {"compressed": zlib.crc32(compressed.tobytes())}
        fields |= self._checksums(self.layout.active) if problem is None else {}
        call = self._call(fields, problem)
        trained = list(self._with_groups())

        def fill() -> None:
            for (i, p, group), grad, squeeze in zip(trained, grads, compressed, strict=True):
                given = torch.zeros_like(p) if grad is None else grad
                self._fill(i, p, group, given, bool(squeeze))

        used = self.exchange.mean(self.communicator, call, has, compressed, fill, self._counters)
        self._to_compare.clear()
        self._skipped.add(used is None)
        if used is None:
            return False
        for (i, p, group), moves, squeeze in zip(trained, used, compressed, strict=True):
            if moves:
                self._update(i, p, group, bool(squeeze))
        return True

    # ----------------------------------------------------------------- state

    def saved_value(self, ordinal: int, p: Tensor, key: str) -> Any:
        """What a checkpoint holds of an entry of a parameter's state."""
        if key not in _UNSENT:
            return super().saved_value(ordinal, p, key)
        return self.exchange.unsent(p, self.order_of(p))[_UNSENT.index(key)]

    def share_out(self, values: dict[str, list[Any]]) -> dict[str, Any]:
        """This rank's part of what all ranks of another world kept of a parameter."""
        everyones = [Unsent(*one) for one in zip(*map(values.pop, _UNSENT), strict=True)]
        unsent = mean_unsent(everyones)
        return super().share_out(values) | dict(zip(_UNSENT, unsent, strict=True))

    def check_entry(self, name: str, entry: Mapping[str, Any]) -> None:
        """Raises ValueError where the parts of a loaded entry do not fit together."""
        Unsent(*(entry[key] for key in _UNSENT)).check(f"{SPAN} of {name}")

    def _begin_taking(self) -> None:
        self.exchange.residuals.clear()
        self.exchange.cover(self._laid_out())

    def _take_entry(
        self, ordinal: int, p: Tensor, entry: dict[str, Any], options: Mapping[str, Any]
    ) -> None:
        self.exchange.take(p, Unsent(*(entry[key] for key in _UNSENT)))
        nowhere = dict.fromkeys(_UNSENT)  # the exchange keeps them
        super()._take_entry(ordinal, p, entry | nowhere, options)

    def _held(self, ordinal: int, p: Tensor) -> Iterator[tuple[str, Tensor, bool]]:
        yield from super()._held(ordinal, p)
        residuals = self.exchange.residuals
        if ordinal in residuals.worker:
            yield RESIDUAL, residuals.worker[ordinal], False
        if ordinal in residuals.owner:
            share = residuals.owner[ordinal]
            yield OWNER, share.values, share.whole

    def _kept_memory(self) -> dict[str, float]:
        residuals = self.exchange.residuals
        return super()._kept_memory() | {
            "residual_bytes": residuals.memory_bytes,
            "residual_norm": residuals.norm(),
        }

    # ----------------------------------------------------------------- arithmetic

    def _corrections(self, group: dict[str, Any], steps: int, updates: int) -> tuple[float, float]:
        """Factors that undo the bias of the momentum and of the variance's root.

        Args:
            group: The parameter group.
            steps: Steps that the momentum has seen.
            updates: Gradients that the variance has seen.
        """
        if not self._bias_correction:
            return 1.0, 1.0
        beta1, beta2 = group["betas"]
        return 1 / (1 - beta1**steps), 1 / math.sqrt(1 - beta2**updates)


def blend(m: Tensor, grad: Tensor, beta: float) -> Tensor:
    """``beta * m + (1 - beta) * grad``, a new tensor."""
    return m.mul(beta).add_(grad.float().mul(1 - beta))


def blend_squares_(v: Tensor, grad: Tensor, beta: float) -> None:
    """``v = beta * v + ((1 - beta) * grad) * grad``."""
    v.mul_(beta).add_(grad.mul(1 - beta).mul_(grad))


def root(v: Tensor, factor: float, eps: float) -> Tensor:
    """``sqrt(v) * factor + eps``.

    torch's float32 root is off by a last bit on some machines (it may be MKL's); one in double
    precision, even if it is off itself, always rounds to the right float32.
    """
    return v.double().sqrt_().float().mul_(factor).add_(eps)


def move_(p: Tensor, start: Tensor, decay: float, way: Tensor) -> None:
    """``p = start * decay - way`` in float32, rounded once to the parameter's type."""
    p.copy_(start.float().mul(decay).sub_(way))

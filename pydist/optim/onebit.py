"""What the 1-bit optimizers share: a warm-up, compressed momenta, residuals, checkpoints.

Arithmetic, for all of them: float32, every operation rounded on its own; scalars are computed in
double precision and rounded once.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pydist import checks
from pydist.codecs.coders import Codec, check_codec
from pydist.feedback import contracts
from pydist.optim import checkpoint
from pydist.optim.base import DistributedOptimizer
from pydist.optim.exchange import Exchange
from pydist.optim.layout import check_betas, check_gradient, with_strides_of
from pydist.road import ALGORITHMS


class OneBitOptimizer(DistributedOptimizer):
    """Adam-like optimizers that send momenta with error feedback on both sides.

    Subclasses say which parameters are compressed in a step, what is sent of them, and how the mean
    that comes back changes them. The arguments are documented at :class:`pydist.optim.OneBitAdam`.
    """

    _agreed_options: tuple[str, ...] = ("lr", "betas", "eps", "weight_decay")

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        codec: Codec | None,
        bias_correction: bool,
        group: dist.ProcessGroup | None,
        seed: int,
        algorithm: str,
        residual_dtype: torch.dtype,
        positive: Mapping[str, int],
    ) -> None:
        self._codec = codec
        self._bias_correction = bias_correction
        self._seed, self._algorithm, self._residual_dtype = seed, algorithm, residual_dtype
        self._numbers = dict(positive)
        self._exchange: Exchange | None = None

        def prepare() -> None:
            if codec is not None:
                check_codec(codec)
                if not contracts(codec):
                    raise ValueError(
                        f"codec must be one whose error feedback converges, got {codec}"
                    )
            checks.check_seed(seed)
            if algorithm not in ALGORITHMS:
                raise ValueError(f"algorithm must be one of {ALGORITHMS}, got {algorithm!r}")
            if residual_dtype not in (torch.float32, torch.bfloat16):
                raise TypeError(f"residual_dtype must be float32 or bfloat16, got {residual_dtype}")
            for name, value in positive.items():
                if not isinstance(value, int) or value < 1:
                    raise ValueError(f"{name} must be a positive integer, got {value!r}")

        super().__init__(params, defaults, group, prepare)

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
        checks.check_rates(float(group["lr"]), float(group["weight_decay"]))
        check_betas(tuple(group["betas"]))
        if not 0 < group["eps"] < math.inf:
            raise ValueError(f"eps must be positive, got {group['eps']}")

    def _agree_on_layout(self) -> None:
        super()._agree_on_layout()
        params = list(self.parameters())
        if self._exchange is None:
            self._exchange = Exchange(
                self._comm, params, self._codec, self._seed, self._algorithm, self._residual_dtype
            )
        else:
            self._exchange.cover(params)

    @property
    def exchange(self) -> Exchange:
        """What averages over the ranks; it has the residuals."""
        assert self._exchange is not None
        return self._exchange

    # ----------------------------------------------------------------- of a subclass

    def _compressed(self) -> np.ndarray:
        """Which parameters are compressed in this step, bool [parameters]."""
        raise NotImplementedError

    def _fill(self, i: int, p: Tensor, group: dict[str, Any], grad: Tensor, squeeze: bool) -> None:
        """Writes what is sent of a parameter into its view of the exchange."""
        raise NotImplementedError

    def _update(self, i: int, p: Tensor, group: dict[str, Any], squeeze: bool) -> None:
        """Changes a parameter and its state by the mean in its view of the exchange."""
        raise NotImplementedError

    # ----------------------------------------------------------------- a step

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        """A parameter's state; zeros at first."""
        state: dict[str, Any] = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
        return state

    def _gradients(self) -> tuple[list[Tensor | None], str | None]:
        """All gradients in their parameters' memory order; why they cannot be used."""
        grads: list[Tensor | None] = []
        try:
            self._unscale()
            for i, p in enumerate(self.parameters()):
                if p.grad is not None:
                    check_gradient(self.name_of(i), p.grad)
                grads.append(None if p.grad is None else with_strides_of(p, p.grad))
        except Exception as error:
            return grads, str(error)
        return grads, None

    def _advance(self) -> None:
        grads, problem = self._gradients()
        self._average(grads, problem, np.array([grad is not None for grad in grads], dtype=bool))

    def _average(
        self, grads: Sequence[Tensor | None], problem: str | None, has: np.ndarray
    ) -> bool:
        """Sends, waits, and updates what any rank has a gradient for; False where none moved."""
        compressed = self._compressed()
        call = self._call({"compressed": zlib.crc32(compressed.tobytes())}, problem)

        def fill() -> None:
            for (i, p, group), grad in zip(self._with_groups(), grads, strict=True):
                given = torch.zeros_like(p) if grad is None else grad
                self._fill(i, p, group, given, bool(compressed[i]))

        used = self.exchange.mean(call, has, compressed, fill)
        if used is None:
            self._skipped += 1
            return False
        for i, p, group in self._with_groups():
            if used[i]:
                self._update(i, p, group, bool(compressed[i]))
        return True

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

    # ----------------------------------------------------------------- checkpoint

    def state_dict(self) -> dict[str, Any]:
        """State of this rank: residuals differ by rank, so every rank saves its own."""
        return checkpoint.state_dict(self, super().state_dict())

    def load_state_dict(self, state_dict: Any) -> None:
        """Loads what ``state_dict()`` gave.

        In a world of another size every rank takes an equal part of what had not been sent
        (:mod:`pydist.optim.checkpoint`).

        Args:
            state_dict: This rank's own, saved by the same rank of as many; or those of all ranks of
                a world of any size, in rank order.

        Raises:
            ValueError: The state is of another rank or world size.
        """
        saved = checkpoint.choose(self, state_dict)
        super().load_state_dict({**saved, "state": {}})
        checkpoint.take(self, saved)


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

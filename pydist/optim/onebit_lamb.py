"""1-bit LAMB (arXiv 2104.06069): LAMB at first, then 1-bit momenta with adapted trust ratios."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pydist.codecs import Codec, Sign
from pydist.optim.base import Algorithm
from pydist.optim.layout import check_number, in_order
from pydist.optim.onebit import blend_squares_, move_, root
from pydist.optim.onebit_adam import OneBitAdam
from pydist.optim.state import Kept
from pydist.training.norms import norm


class OneBitLamb(OneBitAdam):
    """1-bit LAMB (arXiv 2104.06069, Algorithm 1).

    m, v, what is sent, the warm-up, masks, missing and non-finite gradients and checkpoints are
    those of :class:`pydist.optim.OneBitAdam`. A parameter (a layer) moves by
    ``x -= lr * c * u`` with ``u = c1 * m / (sqrt(v) * c2 + eps) + weight_decay * x``:

    - warm-up: ``c = |x| / |u|``, held to ``min_coeff`` … ``max_coeff``, or 1 where a norm is zero;
      its running mean is ``c_avg = coeff_beta * c_avg + (1 - coeff_beta) * c``;
    - compressed: the gradient is reconstructed, ``g = (m - beta1 * m_before) / (1 - beta1)``, and
      ``f = beta2 * f + (1 - beta2) * g * g`` goes on where v stopped. The factor
      ``r = max((sqrt(v) * c2 + eps) / (sqrt(f) * c2 + eps))`` says how much larger steps could be.
      With weight decay only the part ``s = min(1, |u - weight_decay * x| / |u|)`` of u has it:
      ``r = r * s + 1 - s``. It is held to ``factor_min`` … ``factor_max`` and to within
      ``factor_threshold`` of the last one; then ``c = c_avg * r``.

    This follows the authors' code (DeepSpeed) where it says more than the paper, but for: c_avg
    starts with the first c, not with zero; biases are corrected; elements that never had a gradient
    have no say in r. The paper scales every layer's momentum to a common magnitude before it
    compresses all of them with one scale. Here blocks never reach over a layer's end and have
    scales of their own, so such a scale would cancel out and there is none.

    Norms are sums of squares in double precision, in a fixed order (:mod:`pydist.training.norms`).

    Args:
        params: ``model.named_parameters()``, parameters, or parameter groups; float32, float16 or
            bfloat16, all on one device.
        lr: Learning rate, LAMB's.
        betas: Weights of the old momentum and of the old variance.
        eps: Added to the root of the variance; positive.
        weight_decay: Weight decay, inside the trust ratio and outside m and v.
        warmup_steps: Uncompressed steps.
        max_coeff: Largest trust ratio of the warm-up.
        min_coeff: Smallest one.
        coeff_beta: Weight of the old mean of trust ratios.
        factor_max: Largest factor.
        factor_min: Smallest factor.
        factor_threshold: How much the factor may change in a step, relatively.
        codec: As of :class:`pydist.optim.OneBitAdam`.
        bias_correction: Correct the bias of m and v as LAMB does.
        group: Process group; ``None`` is the world.
        seed: Seed of codecs that round at random.
        algorithm: ``"auto"``, ``"two_phase"`` or ``"all_gather"`` (:func:`pydist.all_reduce`).
        residual_dtype: float32, or bfloat16 for half the memory of residuals.
        replica_check_every: Steps from one comparison of parameters over the ranks to the next
            (:func:`pydist.check_replicas`); 0: none.

    Raises:
        TypeError: A parameter has an unsupported dtype or layout.
        ValueError: An argument is out of range, or there is no process group.
        MismatchError: The ranks' models or settings differ; raised on every rank.
    """

    _copied = (*OneBitAdam._copied, "_limits")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        warmup_steps: int,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        coeff_beta: float = 0.9,
        factor_max: float = 4.0,
        factor_min: float = 0.5,
        factor_threshold: float = 0.1,
        codec: Codec | None = Sign("l2"),  # noqa: B008, a frozen value
        bias_correction: bool = True,
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
        algorithm: Algorithm = "auto",
        residual_dtype: torch.dtype = torch.float32,
        replica_check_every: int = 0,
    ) -> None:
        self._limits = {
            "max_coeff": max_coeff, "min_coeff": min_coeff, "coeff_beta": coeff_beta,
            "factor_max": factor_max, "factor_min": factor_min,
            "factor_threshold": factor_threshold,
        }  # fmt: skip
        super().__init__(
            params, lr, betas, eps, weight_decay, warmup_steps=warmup_steps, codec=codec,
            bias_correction=bias_correction, group=group, seed=seed, algorithm=algorithm,
            residual_dtype=residual_dtype,
            replica_check_every=replica_check_every,
        )  # fmt: skip

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | self._limits

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        limits = self._limits
        for low, high in (("min_coeff", "max_coeff"), ("factor_min", "factor_max")):
            least, most = (check_number(name, limits[name]) for name in (low, high))
            if not 0 < least <= most < math.inf:
                raise ValueError(
                    f"{low} and {high} must be positive and in order, got {limits[low]} and "
                    f"{limits[high]}"
                )
        for name in ("coeff_beta", "factor_threshold"):
            if not 0 <= check_number(name, limits[name]) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {limits[name]}")

    @cached_property
    def kept(self) -> Mapping[str, Kept]:
        """Also the mean trust ratio (0: none yet), the last factor, the variance that goes on."""
        return {
            **super().kept,
            "coeff": Kept(float, least=0.0),
            "factor": Kept(float, least=0.0, first=1.0),
            "exp_avg_sq_fresh": Kept(torch.float32, least=0.0, later=True),
        }

    def _take_entry(
        self, ordinal: int, p: Tensor, entry: dict[str, Any], options: Mapping[str, Any]
    ) -> None:
        if entry["step"] <= self._numbers["warmup_steps"]:
            entry["exp_avg_sq_fresh"] = None
        super()._take_entry(ordinal, p, entry, options)

    def _update(self, i: int, p: Tensor, group: dict[str, Any], squeeze: bool) -> None:
        before = self.state[p]["exp_avg"].clone() if squeeze else None
        state = self._moments(i, p, group, squeeze)
        c1, c2 = self._factors(state, group)
        lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
        divisor = root(state["exp_avg_sq"], c2, group["eps"])
        adam = (state["exp_avg"] / divisor).mul_(c1)
        order = self.layout.orders[i]
        update = adam + in_order(p, order).float().mul(weight_decay) if weight_decay else adam
        if before is None:
            coeff = self._trust_ratio(state, norm(in_order(p, order)), norm(update))
        else:
            ratio = self._ratio(state, group, before, divisor, c2)
            length = norm(update) if weight_decay else 0.0
            share = min(1.0, norm(adam) / length) if length else 1.0
            coeff = (state["coeff"] or 1.0) * self._factor(state, ratio * share + (1 - share))
        move_(p, p, 1.0, update * (lr * coeff))

    def _trust_ratio(self, state: dict[str, Any], length: float, way: float) -> float:
        """The ratio of a warm-up step, which its running mean takes in."""
        limits = self._limits
        if not length or not way:
            return 1.0
        coeff = min(max(length / way, limits["min_coeff"]), limits["max_coeff"])
        beta, mean = limits["coeff_beta"], state["coeff"]
        state["coeff"] = beta * mean + (1 - beta) * coeff if mean else coeff
        return coeff

    def _ratio(
        self, state: dict[str, Any], group: dict[str, Any], before: Tensor, divisor: Tensor,
        c2: float,
    ) -> float:  # fmt: skip
        """How far the variance fell since it was frozen; takes in the reconstructed gradient."""
        beta1, beta2 = group["betas"]
        v = state["exp_avg_sq"]
        if state["exp_avg_sq_fresh"] is None:
            state["exp_avg_sq_fresh"] = v.clone()
        fresh = state["exp_avg_sq_fresh"]
        blend_squares_(fresh, state["exp_avg"].sub(before.mul(beta1)).mul_(1 / (1 - beta1)), beta2)
        ratio = divisor.div(root(fresh, c2, group["eps"])).masked_fill_(v == 0, 0)
        return float(ratio.max()) if ratio.numel() else 1.0

    def _factor(self, state: dict[str, Any], factor: float) -> float:
        """The factor within its limits."""
        limits, last = self._limits, state["factor"]
        threshold = limits["factor_threshold"]
        factor = min(max(factor, limits["factor_min"]), limits["factor_max"])
        factor = min(max(factor, last * (1 - threshold)), last * (1 + threshold))
        state["factor"] = factor
        return float(factor)

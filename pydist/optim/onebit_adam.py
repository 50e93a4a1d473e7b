"""1-bit Adam (arXiv 2102.02888): Adam at first, then momenta with 1 bit per parameter."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pydist.codecs import Codec, Sign
from pydist.optim.base import Algorithm
from pydist.optim.onebit import OneBitOptimizer, blend, blend_squares_, move_, root


class OneBitAdam(OneBitOptimizer):
    """1-bit Adam (arXiv 2102.02888, Algorithm 1) with decoupled weight decay.

    A parameter's first ``warmup_steps`` steps are Adam's, on averaged gradients g:

    1. ``m = beta1 * m + (1 - beta1) * g`` and ``v = beta2 * v + (1 - beta2) * g * g``;
    2. ``x = x * (1 - lr * weight_decay) - lr * c1 * (m / (sqrt(v) * c2 + eps))``, where
       ``c1 = 1 / (1 - beta1**t)`` and ``c2 = 1 / sqrt(1 - beta2**t)``.

    Then v is frozen, and in step t:

    1. worker i sends ``C(p_i)`` of ``p_i = beta1 * m + (1 - beta1) * g_i + e_i`` and keeps
       ``e_i = p_i - C(p_i)``;
    2. the owner of a share sends ``C(q)`` of ``q = mean_i C(p_i) + E`` and keeps ``E = q - C(q)``;
    3. all take ``m = C(q)`` and move x as before, with the c2 of the last warm-up step.

    Elements whose v is zero, because no gradient ever reached them, keep m = 0 and collect no
    residual: a sign cannot say zero.

    Where paper and authors' code (DeepSpeed) differ from this: both omit the bias corrections c1
    and c2 (``bias_correction=False``); the paper has the root of ``v + eps``, their code and this
    have ``sqrt(v) + eps``; their code applies weight decay after the division, as here. They
    compress with one scale for all, here a block has a scale of its own.

    It needs local gradients: use a bare model, or run backward under ``ddp.no_sync()``. A NaN or an
    infinity in any rank's gradient skips the step on all ranks and leaves all state as it was. A
    parameter that no rank has a gradient for is left alone; the warm-up counts each parameter's own
    steps. Construction, ``add_param_group`` and ``step`` are collective.

    Args:
        params: ``model.named_parameters()``, parameters, or parameter groups; float32, float16 or
            bfloat16, all on one device.
        lr: Learning rate, Adam's.
        betas: Weights of the old momentum and of the old variance.
        eps: Added to the root of the variance; positive.
        weight_decay: Decoupled weight decay.
        warmup_steps: Uncompressed steps; the paper takes 15 to 25 % of all.
        codec: How momenta travel: ``pydist.Sign("l2")`` (the paper's scale; in our trials it lost
            less than ``Sign("l1")``), ``pydist.BlockInt(4)``, or any other whose error feedback
            converges; ``None`` sends float32.
        bias_correction: Correct the bias of m and v as Adam does; the paper does not.
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

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        warmup_steps: int,
        codec: Codec | None = Sign("l2"),  # noqa: B008, a frozen value
        bias_correction: bool = True,
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
        algorithm: Algorithm = "auto",
        residual_dtype: torch.dtype = torch.float32,
        replica_check_every: int = 0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            codec=codec, bias_correction=bias_correction, group=group, seed=seed,
            algorithm=algorithm, residual_dtype=residual_dtype,
            replica_check_every=replica_check_every,
            positive={"warmup_steps": warmup_steps},
        )  # fmt: skip

    def _compressed(self) -> np.ndarray:
        warmup = self._numbers["warmup_steps"]
        steps = [self.state[p]["step"] for _, p, _ in self._with_groups()]
        return np.array([step >= warmup for step in steps], dtype=bool)

    def _fill(self, i: int, p: Tensor, group: dict[str, Any], grad: Tensor, squeeze: bool) -> None:
        view = self.exchange.views[i]
        if not squeeze:
            view.copy_(grad)
            return
        state = self.state[p]
        mask = state["exp_avg_sq"] != 0
        view.copy_(blend(state["exp_avg"], grad, group["betas"][0]).mul_(mask))

    def _moments(self, i: int, p: Tensor, group: dict[str, Any], squeeze: bool) -> dict[str, Any]:
        """Takes the mean into m, and in the warm-up into v; one step more is counted."""
        state, mean = self.state[p], self.exchange.views[i]
        state["step"] += 1
        if squeeze:
            never = state["exp_avg_sq"] == 0
            state["exp_avg"].copy_(mean).masked_fill_(never, 0)
            self.exchange.forget(i, never)
        else:
            beta1, beta2 = group["betas"]
            state["exp_avg"].copy_(blend(state["exp_avg"], mean, beta1))
            blend_squares_(state["exp_avg_sq"], mean, beta2)
        return state

    def _factors(self, state: dict[str, Any], group: dict[str, Any]) -> tuple[float, float]:
        """c1 and c2 of a parameter's present step."""
        updates = min(state["step"], self._numbers["warmup_steps"])
        return self._corrections(group, state["step"], updates)

    def _update(self, i: int, p: Tensor, group: dict[str, Any], squeeze: bool) -> None:
        state = self._moments(i, p, group, squeeze)
        c1, c2 = self._factors(state, group)
        lr = float(group["lr"])
        direction = state["exp_avg"] / root(state["exp_avg_sq"], c2, group["eps"])
        move_(p, p, 1 - lr * float(group["weight_decay"]), direction.mul_(lr * c1))

"""0/1 Adam (arXiv 2202.06009): the variance at growing intervals, then local steps."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pydist.codecs import Codec, Sign
from pydist.optim.base import Algorithm
from pydist.optim.checkpoint import Loaded
from pydist.optim.layout import check_count, check_finite
from pydist.optim.onebit import OneBitOptimizer, blend, blend_squares_, move_, root
from pydist.optim.state import Kept


def updates_variance(step: int, scaler: int) -> bool:
    """Whether a step is in T_v: ``k_0 = 0``, ``k_(j+1) = k_j + 2**floor(j / scaler)``."""
    block = (step // scaler + 1).bit_length() - 1  # `scaler` intervals of 2**block each
    return (step - scaler * (2**block - 1)) % 2**block == 0


class ZeroOneAdam(OneBitOptimizer):
    """0/1 Adam (arXiv 2202.06009, Algorithm 1) with decoupled weight decay.

    Steps are counted from 0. With ``a = lr / (1 - beta1**t)`` in the group's t-th step, a step is:

    - in T_v, or a parameter's first one (T_v is ``k_0 = 0``,
      ``k_(j+1) = k_j + 2**floor(j / var_update_scaler)``, below ``var_freeze_step``): gradients are
      averaged uncompressed, m and v take their mean, and x moves as Adam's;
    - else ``m_i = beta1 * m_i + (1 - beta1) * g_i`` and ``u_i = u_i + a * m_i`` on each worker, and
      where an interval ends, the 1-bit sync: ``u = mean of u_i``, compressed with error feedback
      on both sides; ``m = u / sum(a)``; ``x = x' * d - u / (sqrt(v) * c2 + eps)``; ``u_i = 0``.
      Here x' is x at the last sync and d the product of ``1 - lr * weight_decay`` since then;
    - a local step where it does not end: ``x_i = x' * d - u_i / (sqrt(v) * c2 + eps)``, and nothing
      is sent, so that the workers' parameters differ until the next sync.

    The interval is 1 until ``var_freeze_step``; from there it doubles every ``local_step_scaler``
    steps, up to ``local_step_clipper``. ``c2 = 1 / sqrt(1 - beta2**k)`` after k updates of v;
    ``bias_correction=False`` takes 1 for it and lr for a, as the paper does.

    Where paper and authors' code (DeepSpeed) differ: u takes the new momentum (code), and is
    compressed without the variance (paper), also before ``var_freeze_step`` (paper; the code then
    compresses gradients), so that residuals keep their unit. In a step of T_v there is no 1-bit
    sync (code). x at a sync starts from x' (paper), which is kept, so that replicas are equal to
    the bit after it.

    Local gradients, missing gradients, elements without variance and checkpoints: as
    :class:`pydist.optim.OneBitAdam`. In local steps no rank knows of the others: a parameter
    without a gradient counts as one with a zero gradient, and a NaN or an infinity lets this rank
    alone leave out the step (counted in its ``skipped_steps``); in all other steps it is left out
    on all ranks. A group whose
    learning rate is 0 is left alone, and its gradients are not looked at.

    Args:
        params: ``model.named_parameters()``, parameters, or parameter groups; float32, float16 or
            bfloat16, all on one device.
        lr: Learning rate, Adam's.
        betas: Weights of the old momentum and of the old variance.
        eps: Added to the root of the variance; positive.
        weight_decay: Decoupled weight decay.
        var_freeze_step: From this step on the variance is frozen; usually the end of the learning
            rate's warm-up. The authors' default is 100,000.
        var_update_scaler: Updates of the variance after which their interval doubles.
        local_step_scaler: Steps after which the interval of syncs doubles.
        local_step_clipper: The longest interval of syncs.
        codec: As of :class:`pydist.optim.OneBitAdam`.
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

    _agreed_options = ("lr", "betas", "eps", "weight_decay", "made", "rate_sum", "kept", "local")

    _copied = (*OneBitOptimizer._copied, "_late_problem")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        var_freeze_step: int,
        var_update_scaler: int = 16,
        local_step_scaler: int = 32768,
        local_step_clipper: int = 16,
        codec: Codec | None = Sign("l2"),  # noqa: B008, a frozen value
        bias_correction: bool = True,
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
        algorithm: Algorithm = "auto",
        residual_dtype: torch.dtype = torch.float32,
        replica_check_every: int = 0,
    ) -> None:
        # Of each group: its steps, and since the last sync the sum of rates a, the product of
        # decays d, and local steps.
        counters = {"made": 0, "rate_sum": 0.0, "kept": 1.0, "local": 0}
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(
            params, options | counters,
            codec=codec, bias_correction=bias_correction, group=group, seed=seed,
            algorithm=algorithm, residual_dtype=residual_dtype,
            replica_check_every=replica_check_every,
            positive={
                "var_freeze_step": var_freeze_step, "var_update_scaler": var_update_scaler,
                "local_step_scaler": local_step_scaler, "local_step_clipper": local_step_clipper,
            },
        )  # fmt: skip

    def _begin(self) -> None:
        super()._begin()
        self._late_problem: str | None = None
        self._late_names: set[str] = set()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters; only while the variance is not frozen.

        Raises:
            TypeError: A parameter has an unsupported dtype or layout.
            ValueError: A hyperparameter is out of range, or the variance is frozen.
            MismatchError: The ranks' parameters differ.
        """
        super().add_param_group(param_group)

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        for name in ("made", "local"):
            check_count(name, group[name])
        for name in ("rate_sum", "kept"):
            check_finite(name, group[name])
        never = group["made"] == 0 and group["lr"] > 0
        if never and group["step"] >= self._numbers["var_freeze_step"]:
            raise ValueError(
                f"param_group: the variance is frozen since step "
                f"{self._numbers['var_freeze_step']}; a new group would never move"
            )

    # ----------------------------------------------------------------- when

    def _in_variance_step(self) -> bool:
        n = self._numbers
        return self._step < n["var_freeze_step"] and updates_variance(
            self._step, n["var_update_scaler"]
        )

    @property
    def interval(self) -> int:
        """Steps from one 1-bit sync to the next, as of now."""
        n = self._numbers
        doublings = max(0, self._step - n["var_freeze_step"]) // n["local_step_scaler"]
        return int(min(2 ** min(doublings, 30), n["local_step_clipper"]))

    def _pending(self) -> int:
        """Local steps since the last sync."""
        return max(int(group["local"]) for group in self.param_groups)

    def _rate(self, group: dict[str, Any]) -> float:
        """The rate a of a group in this step."""
        c1, _ = self._corrections(group, int(group["made"]) + 1, 1)
        return float(group["lr"]) * c1

    # ----------------------------------------------------------------- a step

    def _compressed(self) -> np.ndarray:
        n = len(self.layout.active)
        if self._in_variance_step():
            return np.zeros(n, dtype=bool)
        # What has no variance yet takes its first step as if it were in T_v.
        known = np.array([self.state[p]["step"] > 0 for _, p, _ in self._with_groups()], dtype=bool)
        if self._step < self._numbers["var_freeze_step"]:
            return known
        self._warn_of_late(known)
        return np.ones(n, dtype=bool)

    def _warn_of_late(self, known: np.ndarray) -> None:
        """Names parameters that got their first gradient when the variance was frozen, once."""
        late = {
            self.name_of(i)
            for (i, p, _), yes in zip(self._with_groups(), known, strict=True)
            if not yes and p.grad is not None
        }
        if late - self._late_names:
            warnings.warn(
                f"{self._name}: the variance is frozen since step "
                f"{self._numbers['var_freeze_step']}, and {', '.join(sorted(late)[:5])} had no "
                "gradient before, so that they never move",
                stacklevel=6,
            )
            self._late_names |= late

    def _advance(self) -> None:
        self.look()
        grads, problem = self._gradients()
        pending = self._pending()
        if not self._in_variance_step() and pending + 1 < self.interval:
            self._advance_locally(grads, problem)
            return
        # Where local steps went before, all ranks have something to send.
        has = np.array(
            [
                (grad is not None or group["local"] > 0) and self._moves(group)
                for (_, _, group), grad in zip(self._with_groups(), grads, strict=False)
            ],
            dtype=bool,
        )
        late, self._late_problem = self._late_problem, None
        if self._average(grads, problem or late, has):
            for group in self.param_groups:
                group["made"] += int(group["lr"] > 0)
                group["rate_sum"], group["kept"], group["local"] = 0.0, 1.0, 0

    @staticmethod
    def _moves(group: dict[str, Any]) -> bool:
        """Whether anything moves in a sync now: there was a rate, or there is one."""
        return bool(group["lr"] > 0 or group["rate_sum"] > 0)

    def _sums(self, group: dict[str, Any]) -> tuple[float, float]:
        """Sum of rates and product of decays since the last sync, this step's included."""
        rate_sum, kept = float(group["rate_sum"]), float(group["kept"])
        if group["lr"] > 0:
            rate_sum += self._rate(group)
            kept *= 1 - float(group["lr"]) * float(group["weight_decay"])
        return rate_sum, kept

    def _next(self, p: Tensor, group: dict[str, Any], grad: Tensor) -> tuple[Tensor, Tensor]:
        """This worker's new momentum and u."""
        state = self.state[p]
        m, u = state["exp_avg"], state["u"]
        if group["lr"] > 0:
            m = blend(m, grad, group["betas"][0]).mul_(state["exp_avg_sq"] != 0)
            way = m.mul(self._rate(group))
            u = way if u is None else u + way
        return m, torch.zeros_like(m) if u is None else u

    def _fill(self, i: int, p: Tensor, group: dict[str, Any], grad: Tensor, squeeze: bool) -> None:
        view = self.exchange.views[i]
        if squeeze:
            view.copy_(self._next(p, group, grad)[1])
        elif group["lr"] > 0:
            view.copy_(grad)
        else:
            view.zero_()

    def _update(self, i: int, p: Tensor, group: dict[str, Any], squeeze: bool) -> None:
        state, mean = self.state[p], self.exchange.views[i]
        m, v = state["exp_avg"], state["exp_avg_sq"]
        rate_sum, kept = self._sums(group)
        if squeeze:
            never = v == 0
            mean.masked_fill_(never, 0)
            self.exchange.forget(i, never)
            m.copy_(mean.mul(1 / rate_sum))
        else:
            beta1, beta2 = group["betas"]
            m.copy_(blend(m, mean, beta1))
            blend_squares_(v, mean, beta2)
            state["step"] += 1  # counts what the variance has seen
            mean.copy_(m.mul(rate_sum))
        self._place(p, group, mean, kept)
        state.update(moved=0, u=None, anchor=None)

    def _place(self, p: Tensor, group: dict[str, Any], u: Tensor, kept: float) -> None:
        """Where x is, by u and where it was at the last sync."""
        state = self.state[p]
        _, c2 = self._corrections(group, 1, max(1, state["step"]))
        way = u / root(state["exp_avg_sq"], c2, group["eps"])
        move_(p, p if state["anchor"] is None else state["anchor"], kept, way)

    def _advance_locally(self, grads: list[Tensor | None], problem: str | None) -> None:
        # The other ranks take no part in this: all raise at the next sync.
        self._late_problem = self._late_problem or self._call({}, problem).problem
        trained = list(self._with_groups())
        if self._late_problem is not None:  # state may not fit the parameters: nothing moves
            grads, trained = [], []
        finite = [
            grad.isfinite().all()
            for (_, _, group), grad in zip(trained, grads, strict=True)
            if grad is not None and group["lr"] > 0
        ]
        skip = bool(finite) and not bool(torch.stack(finite).all())
        self._skipped.add(skip)
        for (_, p, group), grad in zip(trained, grads, strict=True):
            if not skip and group["lr"] > 0:
                self._move_locally(p, group, torch.zeros_like(p) if grad is None else grad)
        for group in self.param_groups:
            group["rate_sum"], group["kept"] = self._sums(group)
            group["made"] += int(group["lr"] > 0)
            group["local"] += 1
        self._counters.sent_nothing(self.exchange.raw_bytes, self.communicator.world_size)

    def _move_locally(self, p: Tensor, group: dict[str, Any], grad: Tensor) -> None:
        state = self.state[p]
        state["exp_avg"], state["u"] = self._next(p, group, grad)
        if state["anchor"] is None:
            state["anchor"] = p.detach().to(torch.float32, copy=True)
        state["moved"] += 1
        self._place(p, group, state["u"], self._sums(group)[1])

    # ----------------------------------------------------------------- state

    def _replica(self, p: Tensor) -> Tensor:
        anchor = self.state[p]["anchor"] if p in self.state else None
        return p if anchor is None else cast(Tensor, anchor)

    @cached_property
    def kept(self) -> Mapping[str, Kept]:
        """Also local steps since the last sync, their sum u, and where x was then."""
        return {
            **super().kept,
            "exp_avg": Kept(torch.float32, by_rank=True),
            "moved": Kept(int, by_rank=True),
            "u": Kept(torch.float32, by_rank=True, later=True),
            "anchor": Kept(torch.float32, later=True),
        }

    def is_common(self, key: str, options: Sequence[Mapping[str, Any]]) -> bool:
        """Whether an entry must be equal on all ranks, with these options of all groups."""
        if key == "exp_avg":
            return all(group["local"] == 0 for group in options)
        return super().is_common(key, options)

    def saved_value(self, ordinal: int, p: Tensor, key: str) -> Any:
        """What a checkpoint holds of an entry of a parameter's state."""
        if key == "anchor" and self.state[p].get(key) is None:
            return p.detach().to(torch.float32, copy=True)  # it has not moved since
        return super().saved_value(ordinal, p, key)

    def _take_entry(
        self, ordinal: int, p: Tensor, entry: dict[str, Any], options: Mapping[str, Any]
    ) -> None:
        if not entry["moved"]:
            entry["u"] = entry["anchor"] = None
        super()._take_entry(ordinal, p, entry, options)

    def _take(self, loaded: Loaded) -> None:
        """Also puts the parameters where this rank's state says they are between two syncs."""
        super()._take(loaded)
        for _, p, group in self._with_groups():
            state = self.state[p]
            if state["moved"]:
                self._place(p, group, state["u"], float(group["kept"]))

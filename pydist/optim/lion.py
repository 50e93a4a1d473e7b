"""Distributed Lion (arXiv 2404.00438): workers send one bit per parameter, their update's sign."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pydist.collectives.grid import Levels
from pydist.optim.base import Algorithm
from pydist.optim.layout import check_betas, check_rates
from pydist.optim.voting import Aggregate, Ties, VoteLevels, VotingOptimizer


class DistributedLion(VotingOptimizer):
    """Lion whose workers vote (arXiv 2404.00438, Algorithm 1).

    Worker i sends ``sign(beta1 * m_i + (1 - beta1) * g_i)``, one bit per parameter, and updates its
    own momentum ``m_i = beta2 * m_i + (1 - beta2) * g_i``. All workers then apply
    ``x -= lr * (delta + weight_decay * x)``, where delta is the majority or the mean of the votes.

    It needs local gradients. On the plain path ``step()`` votes: use a bare model, or run backward
    under ``ddp.no_sync()``. After ``attach(ddp)`` DDP's buckets vote during backward; the result is
    bit-identical. All ranks start from rank 0's parameters and stay bit-identical.

    A NaN or an infinity in any rank's gradient skips the step on all ranks (``skipped_steps``). A
    parameter that no rank has a gradient for is left alone.

    Of a sharded model (DTensors of FSDP2 or tensor parallelism) the replicas of a shard vote:
    ``group`` is then the group of the ranks that hold the same shard. A step that a NaN or an error
    spoils for one shard is made for none; on CUDA the step waits for the device to know.

    Construction, ``add_param_group`` and ``step`` are collective: every rank calls them.

    Args:
        params: ``model.named_parameters()``, parameters, or parameter groups, as for any
            ``torch.optim.Optimizer``; float32, float16 or bfloat16, all on one device. DTensors
            vote by shard.
        lr: Learning rate; about a third to a half of AdamW's.
        betas: Weights of the old momentum in the vote and in the new momentum.
        weight_decay: Decoupled weight decay; about ten times AdamW's.
        aggregate: ``"majority"`` (one bit comes back) or ``"average"`` (ceil(log2(n + 1)) bits).
        ties: ``"hash"``: a fair bit; ``"zero"``: no update, one more bit comes back;
            ``"positive"``: +1. For majorities.
        group: Process group of the voters; ``None`` is the world.
        seed: Seed of the tie hash and of stochastic votes.
        momentum_dtype: float32 or bfloat16.
        binarization_range: ``None`` votes the sign; r votes +1 with probability
            ``(1 + c / r) / 2``, an unbiased vote where |c| stays below r.
        exact_skip: A skipped step also leaves every momentum as it was, at the price of a second
            momentum buffer (and, on CUDA, of a wait for the device in each step).
        algorithm: ``"auto"``, ``"two_phase"`` or ``"all_gather"`` (:func:`pydist.all_reduce`).
        replica_check_every: Steps from one comparison of parameters over the ranks to the next
            (:func:`pydist.check_replicas`); 0: none.
        mesh: Two levels: a 2-D ``DeviceMesh`` of the dimensions (across nodes, inside a node), or
            this rank's groups in that order, of the ranks of ``group``.
        levels: ``"votes"``: votes are counted inside a node, and the counts added across, which
            gives the bits of one level; without ``mesh`` of the nodes that ranks are on
            (:func:`pydist.ddp.compress`). ``None``: one level, unless there is a ``mesh``.

    Raises:
        TypeError: A parameter has an unsupported dtype or layout.
        ValueError: An argument is out of range, or there is no process group.
        MismatchError: The ranks' models or settings differ; raised on every rank.
    """

    _agreed_options = ("lr", "betas", "weight_decay")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        aggregate: Aggregate = "majority",
        ties: Ties = "hash",
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
        momentum_dtype: torch.dtype = torch.float32,
        binarization_range: float | None = None,
        exact_skip: bool = False,
        algorithm: Algorithm = "auto",
        replica_check_every: int = 0,
        mesh: Levels | None = None,
        levels: VoteLevels | None = None,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "weight_decay": weight_decay},
            aggregate=aggregate, ties=ties, group=group, seed=seed, momentum_dtype=momentum_dtype,
            binarization_range=binarization_range, exact_skip=exact_skip, algorithm=algorithm,
            replica_check_every=replica_check_every, mesh=mesh, levels=levels,
        )  # fmt: skip

    def _check_options(self, group: dict[str, Any]) -> None:
        check_rates(group)
        check_betas(group["betas"])

    def _weights(self, group: dict[str, Any]) -> tuple[float, float]:
        beta1, beta2 = group["betas"]
        return float(beta1), float(beta2)

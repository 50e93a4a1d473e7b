"""signSGD with majority vote, and with momentum: Signum (arXiv 1802.04434 and 1810.05291)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pydist.collectives.grid import Levels
from pydist.optim.base import Algorithm
from pydist.optim.layout import check_number, check_rates
from pydist.optim.voting import Aggregate, Ties, VoteLevels, VotingOptimizer


class Signum(VotingOptimizer):
    """Signum whose workers vote (arXiv 1810.05291, Algorithm 1).

    Worker i updates its momentum ``v_i = momentum * v_i + (1 - momentum) * g_i`` and sends
    ``sign(v_i)``, one bit per parameter. All workers then apply
    ``x -= lr * (delta + weight_decay * x)``, where delta is the majority of the signs, or with
    ``aggregate="average"`` their mean. The sign is that of the new momentum before it is rounded to
    ``momentum_dtype``.

    Paths, ties, missing and non-finite gradients and checkpoints are those of
    :class:`pydist.optim.DistributedLion`, whose kernels do the work: it is Distributed Lion with
    two equal betas.

    Args:
        params: ``model.named_parameters()``, parameters, or parameter groups; float32, float16 or
            bfloat16, all on one device.
        lr: Learning rate.
        momentum: Weight of the old momentum, in [0, 1).
        weight_decay: Decoupled weight decay.
        aggregate: ``"majority"`` or ``"average"``.
        ties: ``"hash"``, ``"zero"`` or ``"positive"``; for majorities.
        group: Process group of the voters; ``None`` is the world.
        seed: Seed of the tie hash.
        momentum_dtype: float32 or bfloat16.
        exact_skip: A skipped step also leaves every momentum as it was.
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

    _agreed_options = ("lr", "momentum", "weight_decay")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        aggregate: Aggregate = "majority",
        ties: Ties = "hash",
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
        momentum_dtype: torch.dtype = torch.float32,
        exact_skip: bool = False,
        algorithm: Algorithm = "auto",
        replica_check_every: int = 0,
        mesh: Levels | None = None,
        levels: VoteLevels | None = None,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay},
            aggregate=aggregate, ties=ties, group=group, seed=seed, momentum_dtype=momentum_dtype,
            binarization_range=None, exact_skip=exact_skip, algorithm=algorithm,
            replica_check_every=replica_check_every, mesh=mesh, levels=levels,
        )  # fmt: skip

    def _check_options(self, group: dict[str, Any]) -> None:
        check_rates(group)
        if not 0 <= check_number("momentum", group["momentum"]) < 1:
            raise ValueError(f"momentum must be in [0, 1), got {group['momentum']}")

    def _weights(self, group: dict[str, Any]) -> tuple[float, float]:
        momentum = float(group["momentum"])
        return momentum, momentum


class SignSGD(VotingOptimizer):
    """signSGD with majority vote (arXiv 1810.05291, Algorithm 1 without momentum).

    Worker i sends ``sign(g_i)``, one bit per parameter; all apply
    ``x -= lr * (delta + weight_decay * x)``, where delta is the majority of the signs, or with
    ``aggregate="average"`` their mean. It keeps no state a parameter.

    Args:
        params: As for :class:`Signum`.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        aggregate: ``"majority"`` or ``"average"``.
        ties: ``"hash"``, ``"zero"`` or ``"positive"``; for majorities.
        group: Process group of the voters; ``None`` is the world.
        seed: Seed of the tie hash.
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

    _has_momentum = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        weight_decay: float = 0.0,
        *,
        aggregate: Aggregate = "majority",
        ties: Ties = "hash",
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
        algorithm: Algorithm = "auto",
        replica_check_every: int = 0,
        mesh: Levels | None = None,
        levels: VoteLevels | None = None,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay},
            aggregate=aggregate, ties=ties, group=group, seed=seed, momentum_dtype=torch.float32,
            binarization_range=None, exact_skip=False, algorithm=algorithm,
            replica_check_every=replica_check_every, mesh=mesh, levels=levels,
        )  # fmt: skip

    def _check_options(self, group: dict[str, Any]) -> None:
        check_rates(group)

    def _weights(self, group: dict[str, Any]) -> tuple[float, float]:
        return 0.0, 0.0

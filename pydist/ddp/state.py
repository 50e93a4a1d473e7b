"""The state of the DDP hook: what users see of it."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.utils.hooks import RemovableHandle

from pydist.codecs import Codec
from pydist.collectives.grid import Levels, grid
from pydist.collectives.nodes import Groups, check_levels, check_mesh, groups_of
from pydist.ddp import local
from pydist.ddp.carriers import Carrier, OneLevel, TwoLevels, place_in
from pydist.ddp.optimizers import OptimizerWatch, suffer, warn_of_momentum, warn_of_variance
from pydist.ddp.parameters import Named, Parameters
from pydist.ddp.stats import Stats
from pydist.ddp.steps import Steps
from pydist.training import checkpoint
from pydist.training.advice import Advice
from pydist.training.kept import InNodes, Kept
from pydist.training.momentum import Momenta
from pydist.training.options import Algorithm, ErrorFeedback, Exclude, Op, Options
from pydist.training.reducer import in_backward
from pydist.training.residuals import Residuals
from pydist.training.schedule import Schedule
from pydist.training.sharded import Sharded
from pydist.training.together import compare, of_all_ranks, tell
from pydist.transport.communicator import Communicator, communicator

logger = logging.getLogger("pydist.ddp")


class CompressionState:
    """What :func:`compression_hook` keeps: options, residuals, counters.

    Construction is collective: all ranks of ``group`` make a state, with equal arguments, in the
    same order as other collective calls of the group. Before there is a process group it is not:
    options and names are then compared at the first bucket.

    A copy (``copy.deepcopy``, ``pickle``, also as a part of a copied model) has options, residuals,
    momenta and counters, and neither group nor threads nor scaler; it belongs to no model until
    :func:`pydist.ddp.compress` gives it one, or, without names, DDP's first bucket.

    Everything that only tells something can be called at any time, from any thread.

    Args:
        codec: A codec such as ``pydist.QSGD(bits=4)`` for all parameters, or a dict from patterns
            (``fnmatch``, on the parameter's name) to codecs: the first that matches counts,
            ``None`` and no match travel raw; or a :class:`pydist.ddp.Schedule` of either.
        error_feedback: ``"auto"``: residuals where they help
            (:func:`pydist.training.residuals.contracts`); ``True`` or ``False``: for all codecs, or
            for none; ``"worker"``: as ``True``, but without the residuals of what is encoded again
            after the reduction. With ``"auto"`` an optimizer is warned of that was measured to do
            worse with them (``docs/ddp.md``).
        warmup_steps: Steps at first in which everything travels raw.
        min_numel: Parameters with fewer elements travel raw.
        exclude: Patterns of names, or a predicate ``(name, parameter) -> bool``, of parameters that
            travel raw.
        group: The process group of the DDP model; default the world.
        seed: Seed of stochastic rounding, 0 … 2**32 - 1.
        scaler: The ``torch.amp.GradScaler`` that scales the loss: residuals then follow its scale.
            Otherwise call :meth:`rescale` when the scale changes.
        exact_skip: A step with a NaN or an infinity on any rank leaves no trace: residuals and step
            number stay as they were, in all buckets. Takes a second buffer of residuals.
        op: ``"mean"`` (as DDP without a hook) or ``"sum"`` over the ranks.
        algorithm: As of :func:`pydist.all_reduce`.
        residual_dtype: float32, or bfloat16 for half the memory.
        named_parameters: ``model.named_parameters()``, with or without ``"module."`` in front, or
            the model itself. Needed for patterns and for checkpoints by name. Without it parameters
            are numbered in the order in which the first backward hands them out, which is the same
            on all ranks and in every run of the same model with the same bucket sizes.
        momentum: Momentum correction (DGC, arXiv 1712.01887): workers apply this momentum, 0 <= m <
            1, before they compress, with momentum factor masking for ``TopK``
            (:mod:`pydist.training.momentum`). The optimizer must then have none.
        clip_norm: Local gradient clipping (DGC): before momentum and residuals are added, each
            parameter's gradient is scaled down where it is longer than
            :func:`pydist.ddp.prepare.clip_limit` of this; without loss scale. ``None``: never.
        local_after: Post-local SGD: from this step on gradients are not compressed, but stay on the
            rank, or in ``subgroup``; average parameters then. ``None``: never.
        subgroup: Ranks whose mean, uncompressed, gradients are after ``local_after`` steps.
        error_every: Steps from one measurement of ``stats()["compression_error"]`` to the next;
            0: none.
        replica_check_every: Steps from one comparison of parameters over the ranks to the next
            (:func:`pydist.check_replicas`); 0: none.
        mesh: Two levels: a 2-D ``DeviceMesh`` of the dimensions (across nodes, inside a node), or
            this rank's groups in that order, which together hold all ranks of ``group``. Gradients
            are summed inside a node; what a codec encodes, and what residuals and momenta belong
            to, is a rank's share of its node's sum.
        levels: ``"auto"``: two levels of the nodes that ranks are on, by torchrun's ``GROUP_RANK``,
            ``LOCAL_WORLD_SIZE`` or the host's name; one level where that gives less than two nodes,
            one rank per node, or nodes with different numbers of ranks.
        inner: The codec inside a node; ``None``: gradients as they are, in the bucket's dtype.

    Raises:
        TypeError: An argument is of another type, or there is none of its name.
        ValueError: An argument is out of range, error feedback was forced where it diverges, or
            parameters are chosen by name and there are no names.
        MismatchError: Ranks gave different arguments; raised on every rank.
        PydistError: Another rank has a problem.
    """

    @of_all_ranks("CompressionState")
    def __init__(
        self,
        codec: Codec | Mapping[str, Codec | None] | Schedule,
        *,
        error_feedback: ErrorFeedback = "auto",
        warmup_steps: int = 0,
        min_numel: int = 1024,
        exclude: Exclude | None = None,
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
        scaler: torch.amp.GradScaler | None = None,
        exact_skip: bool = False,
        op: Op = "mean",
        algorithm: Algorithm = "auto",
        residual_dtype: torch.dtype = torch.float32,
        named_parameters: Named | None = None,
        momentum: float = 0.0,
        clip_norm: float | None = None,
        local_after: int | None = None,
        subgroup: dist.ProcessGroup | None = None,
        error_every: int = 100,
        replica_check_every: int = 0,
        mesh: Levels | None = None,
        levels: Literal["auto"] | None = None,
        inner: Codec | None = None,
    ) -> None:
        self.group, self.scaler, self.subgroup, self.mesh = group, scaler, subgroup, mesh
        try:
            local.check_subgroup(subgroup)
            if scaler is not None and not callable(getattr(scaler, "get_scale", None)):
                raise TypeError(f"scaler must be a GradScaler, got {type(scaler).__name__}")
            self.options = Options(
                codec, error_feedback, warmup_steps, min_numel, exclude, seed, op, algorithm,
                residual_dtype, exact_skip, momentum, clip_norm, local_after, subgroup is not None,
                error_every, replica_check_every, check_levels(mesh, levels), inner,
            )  # fmt: skip
            self.parameters = Parameters(named_parameters)
            self._check_names()
        except Exception as error:
            # The other ranks are about to wait for this one.
            tell("CompressionState", group, error)
            raise
        self.kept = Kept(self.options, self.parameters)
        self._make_anew()
        if dist.is_available() and dist.is_initialized():
            self._bind(self.parameters.device)

    def _check_names(self) -> None:
        if self.options.needs_names and not self.parameters.named:
            raise ValueError(
                "named_parameters must be given where parameters are chosen by name "
                "(codec={pattern: codec}, exclude); or use pydist.ddp.compress(model, codec)"
            )
        unmatched = self.options.unmatched(self.parameters.names)
        if self.parameters.named and unmatched:
            warnings.warn(f"patterns that match no parameter: {unmatched}", stacklevel=4)

    def _make_anew(self) -> None:
        """What a copy does not have of its original."""
        self.stats_of = Stats()
        self._steps: Steps | None = None
        self._levels: Groups | None = None  # known when it is bound
        self._watch: OptimizerWatch | None = None
        self._before_forward: RemovableHandle | None = None
        self._lacks: list[str] = []
        self._lock = threading.RLock()

    # ----------------------------------------------------------------- the group

    def _bind(self, device: torch.device) -> Steps:
        """The steps of this state in its group, for gradients on a device; collective."""
        with self._lock:
            if not self.bound:
                self._compare()
            carrier = self._carrier(device)
            if self._steps is None or self._steps.carrier.key is not carrier.key:
                self._steps = Steps(
                    carrier, self.kept, self.parameters, self.stats_of, self.scaler, self.subgroup,
                    None if self._watch is None else self._watch.count,
                )  # fmt: skip
            return self._steps

    def _carrier(self, device: torch.device) -> Carrier:
        """How buckets on a device travel."""
        if self._levels is None:
            return OneLevel(communicator(self.group, device))
        return TwoLevels(grid(self._levels, device), self.options.inner, self.options.seed)

    def _compare(self) -> None:
        """Compares options and names over the ranks."""
        comm = communicator(self.group)
        rank, ranks = comm.rank, comm.world_size
        fields = {"world_size": ranks, **self.options.described(), **self.parameters.described()}
        compare("CompressionState", self.group, fields, self._problem(rank, ranks))
        self._levels = groups_of(self.group, self.mesh, self.options.levels)
        place = None if self._levels is None else place_in(self._levels)
        if self.options.levels is not None:
            compare("CompressionState", self.group, {}, self._moved(place))
        self.kept.join(rank, ranks, place)
        suffering = suffer(self.options.codecs())
        if self.options.momentum or (suffering and self.options.error_feedback == "auto"):
            self._watch = OptimizerWatch(self._owns, self._look_at)

    def _problem(self, rank: int, ranks: int) -> str | None:
        """Why what is kept, or a mesh, cannot go on in a group."""
        try:
            if self.mesh is not None:
                check_mesh(self.group, self.mesh)
        except (TypeError, ValueError) as error:
            return str(error)
        if self._lacks:
            return f"a copied state needs its {self._lacks} again: set it, or give it to compress"
        kept = self.kept
        if not kept.empty and (kept.rank, kept.ranks) != (rank, ranks):
            return (
                f"the state is that of rank {kept.rank} of {kept.ranks}, here of rank {rank} of "
                f"{ranks}: load the states of all {kept.ranks} ranks"
            )
        return self._moved(None) if self.options.levels is None else None

    def _moved(self, place: InNodes | None) -> str | None:
        """Why what is kept cannot go on at a place among nodes."""
        kept = self.kept
        if kept.empty or kept.levels == place:
            return None
        return (
            f"the state is that of levels {kept.levels}, here {place}: load the states of all "
            f"{kept.ranks} ranks"
        )

    @property
    def bound(self) -> bool:
        """Whether it knows its group, and has been compared over the ranks."""
        return self._steps is not None

    @property
    def communicator(self) -> Communicator:
        """The group's communicator, with its traffic counters; on two levels buckets have others.

        Raises:
            RuntimeError: The state is not bound to a group yet.
        """
        if self._steps is None:
            raise RuntimeError("the state is not bound to a process group before its first bucket")
        return communicator(self.group, self._steps.device_type or "cpu")

    def adopt(
        self,
        model: torch.nn.Module,
        group: dist.ProcessGroup | None,
        scaler: torch.amp.GradScaler | None = None,
        subgroup: dist.ProcessGroup | None = None,
        mesh: Levels | None = None,
    ) -> None:
        """Takes a model, and a group; :func:`pydist.ddp.compress` calls it. Collective.

        Raises:
            ValueError: It has another one, or the model has other parameters.
            MismatchError: Ranks disagree; raised on every rank.
        """
        try:
            if self._steps is not None:
                raise ValueError("the state belongs to a model already; take a copy of it")
            check_levels(mesh, None)
            self.parameters.attach(model)
            self._check_names()
        except Exception as error:
            tell("CompressionState", group, error)
            raise
        self.group = group
        self.scaler = self.scaler if scaler is None else scaler
        self.subgroup = self.subgroup if subgroup is None else subgroup
        if mesh is not None:
            self.mesh = mesh
            self.options = self.kept.options = replace(self.options, levels="mesh")
        self._lacks = [name for name in self._lacks if getattr(self, name) is None]
        if dist.is_available() and dist.is_initialized():
            self._bind(self.parameters.device)

    def watch_forward(self, ddp: torch.nn.Module) -> None:
        """Copies the loss scale before each forward, where residuals follow one."""
        if self.scaler is not None:
            self._before_forward = ddp.register_forward_pre_hook(self._copy_scale)

    def _copy_scale(self, module: torch.nn.Module, args: Any) -> None:
        if self._steps is not None and self._steps.scale is not None:
            self._steps.scale.copy_ahead()

    def close(self) -> None:
        """Watches gradients and optimizers no more; :func:`pydist.ddp.restore` calls it."""
        if self._before_forward is not None:
            self._before_forward.remove()
        if self._watch is not None:
            self._watch.close()
        if self._steps is not None and self._steps.accumulation is not None:
            self._steps.accumulation.close()

    def reduce_bucket(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Sends a bucket on its way; :func:`compression_hook` calls it.

        Returns:
            A future of the bucket's buffer, which then holds the result. It is also completed when
            something went wrong: the buffer is then NaN, and backward raises at its end.
        """
        if not isinstance(bucket, GradBucket):
            raise TypeError(
                f"bucket must be a GradBucket, got {type(bucket).__name__}: the Python reducer of "
                "compiled autograd is not supported; compile the model, not its backward"
            )
        steps, device = self._steps, bucket.buffer().device
        if steps is None or steps.device_type != device.type:
            steps = self._bind(device)
            steps.device_type = device.type
        return steps.reduce_bucket(bucket)

    # ----------------------------------------------------------------- optimizers

    def _owns(self, param: Tensor) -> bool:
        return self.parameters.knows(param)

    def _look_at(self, optimizer: torch.optim.Optimizer) -> None:
        """Says once what was measured to go badly together."""
        codecs = suffer(self.options.codecs())
        if codecs and self.options.error_feedback == "auto":
            warn_of_variance(optimizer, codecs)
        if self.options.momentum:
            warn_of_momentum(optimizer, self.options.momentum)

    # ----------------------------------------------------------------- what is known

    @property
    def residuals(self) -> Residuals:
        """The rank's residuals."""
        return self.kept.residuals

    @property
    def momenta(self) -> Momenta:
        """The rank's momenta."""
        return self.kept.momenta

    @property
    def step(self) -> int:
        """Number of the next step: of backwards that synchronised, but for those taken back."""
        return self.kept.step

    def stats(self) -> dict[str, Any]:
        """What was sent so far and what it cost; see ``docs/ddp.md`` for the entries."""
        return self.stats_of.summary(self.kept)

    def scalars(self) -> dict[str, float]:
        """:meth:`stats` as flat numbers, for loggers."""
        return self.stats_of.scalars(self.stats())

    def advice(self) -> Advice:
        """Whether DDP's ``bucket_cap_mb`` suits the messages of the last step, and what would."""
        return self.stats_of.advice()

    def log(self, writer: Any, step: int | None = None, prefix: str = "pydist") -> None:
        """Writes scalars to a TensorBoard ``SummaryWriter``, or to what has its ``add_scalar``."""
        for name, value in self.scalars().items():
            writer.add_scalar(f"{prefix}/{name}", value, self.step if step is None else step)

    def log_summary(self) -> None:
        """Writes one line to the logger ``pydist.ddp``, level INFO."""
        line, advice = self.stats_of.line(self.stats()), self.advice()
        logger.info(line + (f"; {advice}" if advice.verdict in ("larger", "smaller") else ""))

    # ----------------------------------------------------------------- loss scales

    @property
    def scale(self) -> float | None:
        """The loss scale that the residuals follow, where there is a scaler."""
        return self.kept.scale

    @property
    def rescaled(self) -> float:
        """What :meth:`rescale` has multiplied the loss scale by so far."""
        return self.kept.rescaled

    def rescale(self, ratio: float) -> None:
        """Follows a loss scale that was multiplied by ``ratio``, where there is no ``scaler``.

        Raises:
            ValueError: ``ratio`` is not a positive number.
        """
        if not 0 < ratio < float("inf"):
            raise ValueError(f"ratio must be positive and finite, got {ratio}")
        with self._still():
            self.kept.multiply(ratio)
            self.kept.rescaled *= ratio

    # ----------------------------------------------------------------- checkpoints and copies

    @contextlib.contextmanager
    def _still(self) -> Iterator[None]:
        """Nothing moves meanwhile."""
        with self._lock if self._steps is None else self._steps.still():
            yield

    def sharded(self, saved_world_size: int | None = None) -> Sharded:
        """The state as torch.distributed.checkpoint takes it.

        Args:
            saved_world_size: Ranks that saved what is to be loaded, where it was another number
                (:func:`pydist.ddp.saved_world_size`).
        """
        return Sharded(self, self._place_in_world, saved_world_size)

    def _place_in_world(self) -> tuple[int, int]:
        """This rank as the world counts it, and how many ranks the group has."""
        if self._steps is None:
            return self._place()
        comm = communicator(self.group)
        return comm.ranks[comm.rank], comm.world_size

    def _place(self) -> tuple[int, int]:
        """This rank in its group, and of how many."""
        if self._steps is None and dist.is_available() and dist.is_initialized():
            return dist.get_rank(self.group), dist.get_world_size(self.group)
        return self.kept.rank, self.kept.ranks

    def state_dict(self) -> dict[str, Any]:
        """This rank's residuals by parameter name, for ``torch.save``; ranks differ.

        Save one file per rank (``weights_only=True`` reads it), or see :meth:`sharded`.
        """
        with self._still():
            return checkpoint.state_dict(self.kept)

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Restores what :meth:`state_dict` gave; all of it, or nothing where it raises.

        What ranks must hold alike is compared with the next step.

        Args:
            state: This rank's own state, saved by the same rank of as many; or the states of all
                ranks of a world of any size, in rank order.

        Raises:
            TypeError: It is no such state.
            ValueError: The state is of another world size or rank, of other parameters, of
                different steps, or damaged (values that are not finite, or beyond 1.8e19).
            RuntimeError: Called in the middle of backward.
        """
        if in_backward():
            raise RuntimeError("load_state_dict: not in the middle of backward")
        with self._still():
            place: Any = self._place()
            alone = self._steps is None and not (dist.is_available() and dist.is_initialized())
            if alone and isinstance(state, Mapping):  # compared when it is bound
                place = state.get("rank"), state.get("world_size")
            levels = self.kept.levels
            if self._steps is None:  # compared when it is bound
                levels = checkpoint.levels_of(state)
            memory = checkpoint.read(self.kept, state, place[0], place[1], levels)
            self.kept.load(memory)
            if self._steps is None:
                self.kept.join(place[0], place[1], levels)
            else:
                self._steps.replaced()

    def __getstate__(self) -> dict[str, Any]:
        with self._still():
            kept = self.kept.__getstate__()
        return {"kept": kept, "options": self.options, "parameters": self.parameters,
                "stats": self.stats_of, "lacks": self._lacking()}  # fmt: skip

    def _lacking(self) -> list[str]:
        """What a copy has to be given again."""
        own = ("scaler", "subgroup", "mesh")
        return [x for x in own if getattr(self, x) is not None or x in self._lacks]

    def __setstate__(self, held: dict[str, Any]) -> None:
        self.options, self.parameters = held["options"], held["parameters"]
        self.group = self.scaler = self.subgroup = self.mesh = None
        self._make_anew()
        self.stats_of, self._lacks = held["stats"], held["lacks"]
        self.kept = Kept.__new__(Kept)
        self.kept.__setstate__(held["kept"])

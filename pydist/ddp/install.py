"""Puts the hook into a model, whatever wraps it, and takes it out again."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pydist.codecs import Codec
from pydist.collectives.grid import Levels
from pydist.collectives.nodes import check_levels
from pydist.ddp.hook import compression_hook
from pydist.ddp.state import CompressionState
from pydist.training import reducer
from pydist.training.options import Algorithm, ErrorFeedback, Exclude, Op, Options
from pydist.training.schedule import Schedule
from pydist.training.together import alone, compare, of_all_ranks, tell

# A copied model has its hooks' states in a list, and a reducer that knows none of them.
_installed: weakref.WeakKeyDictionary[nn.Module, CompressionState] = weakref.WeakKeyDictionary()


@of_all_ranks("pydist.ddp.compress")
def compress(
    model: nn.Module,
    codec: Codec | Mapping[str, Codec | None] | Schedule | CompressionState,
    *,
    error_feedback: ErrorFeedback = "auto",
    warmup_steps: int = 0,
    min_numel: int = 1024,
    exclude: Exclude | None = None,
    seed: int = 0,
    scaler: torch.amp.GradScaler | None = None,
    exact_skip: bool = False,
    op: Op = "mean",
    algorithm: Algorithm = "auto",
    residual_dtype: torch.dtype = torch.float32,
    momentum: float = 0.0,
    clip_norm: float | None = None,
    local_after: int | None = None,
    subgroup: dist.ProcessGroup | None = None,
    error_every: int = 100,
    replica_check_every: int = 0,
    mesh: Levels | None = None,
    levels: Literal["auto"] | None = None,
    inner: Codec | None = None,
) -> CompressionState:
    """Compresses the gradients of a DDP model: makes a state and registers the hook.

    Collective: every rank calls it. Names, shapes and dtypes of all parameters are compared over
    the ranks at once. Called again with equal arguments it returns the state that there is.

    Args:
        model: A DistributedDataParallel without a communication hook, or what wraps one
            (``torch.compile``, Lightning Fabric, Accelerate). In a single process any module: the
            state then has nothing to do and says so.
        codec: As of :class:`CompressionState`; or such a state, made before there was a process
            group, or a copy. Of the other arguments it then takes ``scaler``, ``subgroup`` and
            ``mesh``.
        error_feedback: As of :class:`CompressionState`, like all that follow.
        warmup_steps: Steps at first in which everything travels raw.
        min_numel: Parameters with fewer elements travel raw.
        exclude: Patterns of names, or a predicate, of parameters that travel raw.
        seed: Seed of stochastic rounding, 0 … 2**32 - 1.
        scaler: The ``torch.amp.GradScaler`` that scales the loss.
        exact_skip: A step with a NaN or an infinity on any rank leaves no trace.
        op: ``"mean"`` or ``"sum"`` over the ranks.
        algorithm: As of :func:`pydist.all_reduce`.
        residual_dtype: float32, or bfloat16 for half the memory.
        momentum: Momentum correction, 0 <= m < 1.
        clip_norm: Local gradient clipping.
        local_after: Post-local SGD from this step on.
        subgroup: Ranks whose mean gradients are in local steps.
        error_every: Steps between measurements of the compression error.
        replica_check_every: Steps between comparisons of the parameters over the ranks.
        mesh: Two levels: a 2-D mesh (across nodes, inside a node), or two groups.
        levels: ``"auto"``: two levels of the nodes that ranks are on.
        inner: The codec inside a node; ``None``: gradients as they are.

    Returns:
        The state: ``stats()``, ``state_dict()``.

    Raises:
        TypeError: ``model`` holds no DistributedDataParallel and there are several processes, or an
            argument is of another type, or there is none of its name.
        ValueError: An argument is out of range, the model holds several DistributedDataParallels,
            or it is compressed already with other arguments.
        MismatchError: Ranks disagree; raised on every rank.
        RuntimeError: The model has another hook.
    """
    options: dict[str, Any] = {
        "error_feedback": error_feedback, "warmup_steps": warmup_steps, "min_numel": min_numel,
        "exclude": exclude, "seed": seed, "scaler": scaler, "exact_skip": exact_skip, "op": op,
        "algorithm": algorithm, "residual_dtype": residual_dtype, "momentum": momentum,
        "clip_norm": clip_norm, "local_after": local_after, "subgroup": subgroup,
        "error_every": error_every, "replica_check_every": replica_check_every,
        "mesh": mesh, "levels": levels, "inner": inner,
    }  # fmt: skip
    try:
        ddp = find_ddp(model)
    except Exception as error:
        tell("pydist.ddp.compress", getattr(model, "process_group", None), error)
        raise
    target, group = (model, None) if ddp is None else (ddp, ddp.process_group)
    if (known := _known(target)) is not None:
        return _same(known, codec, group, options)
    if isinstance(codec, CompressionState):
        state = codec
        state.adopt(target, group, scaler, subgroup, mesh)
    else:
        state = CompressionState(codec, group=group, named_parameters=target, **options)
    if ddp is not None:
        reducer.register(ddp, state, compression_hook)
        state.watch_forward(ddp)
    _installed[target] = state
    return state


def _known(model: nn.Module) -> CompressionState | None:
    """The state that reduces a model's gradients; not one that a copied model has beside it."""
    if model in _installed or not isinstance(model, DistributedDataParallel):
        return _installed.get(model)
    ours = [state for hook, state in reducer.hooks_of(model) if hook is compression_hook]
    return next((state for state in ours if state.bound), None)


def _same(
    known: CompressionState,
    codec: Any,
    group: dist.ProcessGroup | None,
    options: dict[str, Any],
) -> CompressionState:
    """The state that a model has, if it is the one that is asked for; collective."""
    name, problem = "pydist.ddp.compress, again", None
    if codec is not known:
        own = ("scaler", "subgroup", "mesh", "levels")
        chosen = {k: v for k, v in options.items() if k not in own}
        try:
            asked = Options(
                codec, in_subgroup=options["subgroup"] is not None,
                levels=check_levels(options["mesh"], options["levels"]), **chosen,
            )  # fmt: skip
        except Exception as error:
            tell(name, group, error)
            raise
        others = all(
            getattr(known, name) is options[name] for name in ("scaler", "subgroup")
        ) and bool(known.mesh == options["mesh"])
        if asked != known.options or not others:
            problem = (
                "the model is compressed already with other arguments; call "
                "pydist.ddp.restore(model) first"
            )
    if problem is not None:
        tell(name, group, ValueError(problem))
        raise ValueError(f"model: {problem}")
    if dist.is_available() and dist.is_initialized():
        compare(name, group, known.options.described())
    return known


def restore(model: nn.Module) -> None:
    """Undoes :func:`compress`: DDP reduces gradients itself again, bit for bit as without pydist.

    Collective: every rank calls it, between two steps. What the hook had not sent is dropped; save
    ``state.state_dict()`` before to go on with it later. Residuals and momenta stay in the state.

    Args:
        model: What was given to :func:`compress`.

    Raises:
        ValueError: It was not.
        RuntimeError: Called in the middle of backward.
    """
    if reducer.in_backward():
        raise RuntimeError("restore: not in the middle of backward")
    ddp = find_ddp(model)
    state = _known(model if ddp is None else ddp)
    if state is None:
        raise ValueError("model: pydist.ddp.compress was not called on it")
    _installed.pop(model if ddp is None else ddp, None)
    if ddp is not None:
        reducer.forget_hook(ddp, compression_hook)
        reducer.build_reducer(ddp)
    state.close()


def find_ddp(model: nn.Module) -> DistributedDataParallel | None:
    """The DistributedDataParallel that a model is or holds; ``None`` in a single process.

    Raises:
        TypeError: There is none, and there are several processes.
        ValueError: There are several.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a DistributedDataParallel, got {type(model).__name__}")
    found = {
        id(module): (name, module)
        for name, module in model.named_modules()
        if isinstance(module, DistributedDataParallel)
    }
    if len(found) > 1:
        names = [name for name, _ in found.values()]
        raise ValueError(f"model holds several DistributedDataParallels: {names}; give one of them")
    for _, module in found.values():
        return module
    if not alone():
        raise TypeError(
            f"model must be a DistributedDataParallel, got {type(model).__name__}, which holds none"
        )
    return None

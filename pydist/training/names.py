"""Names of parameters and modules without the prefixes of what wraps a model.

A model says by the types of its modules which of them are wrappers. A list of names alone does not;
there a prefix is taken away only where it cannot be a module of the model's own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

# Where a wrapper's class lives, its name, and the attribute of what it wraps. A class whose module
# was never imported has no instances, so nothing is imported here.
_WRAPPERS = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
    (
        "torch.distributed.fsdp.fully_sharded_data_parallel",
        "FullyShardedDataParallel",
        "_fsdp_wrapped_module",
    ),
    ("lightning.fabric.wrappers", "_FabricModule", "_forward_module"),
    ("lightning_fabric.wrappers", "_FabricModule", "_forward_module"),
)
# Attributes that only wrappers have; "module" may be a child of the model's own.
_PRIVATE = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module"}


def wrapped_attribute(module: nn.Module) -> str | None:
    """Under which name a wrapper holds what it wraps; ``None``: the module is no wrapper."""
    for path, name, attribute in _WRAPPERS:
        kind = getattr(sys.modules.get(path), name, None)
        if isinstance(kind, type) and isinstance(module, kind):
            return attribute
    return None


def module_names(root: nn.Module) -> dict[nn.Module, str]:
    """Every module of a tree with its name there, wrappers left out; the root is ``""``.

    A wrapper and what it wraps have one name. A module that is there twice has its first.
    """
    found: dict[nn.Module, str] = {}
    pending = [(root, "")]
    while pending:
        module, path = pending.pop()
        if module in found:
            continue
        found[module] = path
        inner = wrapped_attribute(module)
        children = [
            (child, path if name == inner else _join(path, name))
            for name, child in module._modules.items()
            if child is not None
        ]
        pending += children[::-1]
    return found


def named_parameters(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """``root.named_parameters()``, in the same order, wrappers left out of the names."""
    seen: set[Tensor] = set()
    for module, path in module_names(root).items():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                yield _join(path, name), parameter


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def without_wrappers(name: str) -> str:
    """A name without the parts that only wrappers have (``_orig_mod``, say)."""
    return ".".join(part for part in name.split(".") if part not in _PRIVATE)


def plain_names(names: Sequence[str]) -> list[str]:
    """Names as ``named_parameters()`` of a model gave them, wrapped or not.

    Parts that only wrappers have go. A leading ``module`` goes where all names have it, as those of
    a DistributedDataParallel do. Where two would then be the same, nothing goes.
    """
    plain = [without_wrappers(name) for name in names]
    if all(name.startswith("module.") for name in plain):
        plain = [name.removeprefix("module.") for name in plain]
    return plain if len(set(plain)) == len(set(names)) else list(names)

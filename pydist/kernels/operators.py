"""The kernels as torch operators, ``torch.ops.pydist.*``: for ``torch.compile``, modes, profilers.

Schema, implementation and fake of an operator follow from the declaration of its kernel
(:mod:`pydist.kernels.register`). An operator may not return what it was given, so a kernel with a
result has a twin that writes it into ``out``; a codec is the fields of its format, and a step that
lies in memory an argument of its own.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, is_grad_enabled
from torch._C import (
    _get_tracing_state,
    _is_torch_function_mode_enabled,
    _len_torch_dispatch_stack,
)
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

from pydist import _C
from pydist.kernels import (
    blocks,
    elias,
    lion,
    raw,
    register,
    signs,
    ternary,
    topk,
    torch_tensors,
)
from pydist.kernels.register import KERNELS, Kernel, Rule

_FAMILIES = (signs, lion, blocks, elias, ternary, topk, raw)

_C.current_isa()  # a wrong PYDIST_ISA is an error here, not in the first kernel call

_LIBRARY = torch.library.Library("pydist", "DEF")
_PLAIN = (Tensor, torch.nn.Parameter)


def watched(first: Any) -> bool:
    """Whether a call on this array must go through the dispatcher.

    An operator in Python costs as much as all checks together, so calls that nothing looks at go
    straight to the kernel.
    """
    if is_compiling() or type(first) not in _PLAIN:  # fake, functional, distributed
        return isinstance(first, Tensor)
    return (
        not (first.is_cpu or first.is_cuda)
        or _len_torch_dispatch_stack() > 0
        or _is_torch_function_mode_enabled()
        or _profiler_enabled()
        or peek_interpreter_stack() is not None
        or _get_tracing_state() is not None
        or (first.requires_grad and is_grad_enabled())
    )


def call(kernel: Kernel, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Calls a kernel as the operator that it is."""
    # torch 2.9 compiles no zip of several lengths.
    given = dict(zip(_POSITIONAL[kernel.name][: len(args)], args, strict=True))
    given.update(options)
    given.pop("threads", None)
    out = given.pop("out", None)
    if kernel.codec is not None:
        form = kernel.codec.of(given.pop("codec"))
        for name in _FIELDS[kernel.name]:
            given[name] = getattr(form, name)
    if isinstance(given.get("step"), Tensor):
        given["step_tensor"] = given.pop("step")
    if isinstance(given.get("segments"), np.ndarray):
        given["segments"] = torch.from_numpy(given["segments"])
    if out is None:
        result = _OPERATORS[kernel.name](**given)
        return given[kernel.returns] if kernel.returns is not None else result
    dtype = given.pop("dtype", None)
    if dtype not in (None, out.dtype):
        raise TypeError(f"out must be {dtype}, got {out.dtype}")
    _OPERATORS[_twin(kernel.name)](**given, out=out)
    return out


# --------------------------------------------------------------------------- schemas

_TYPES = {
    "A": "Tensor", "A | Sequence[A]": "Tensor", "A | None": "Tensor?",
    "Segments": "Tensor?", "DType": "ScalarType?",
    "int": "int", "int | None": "int?", "float": "float", "float | None": "float?",
    "bool": "bool", "str": "str",
}  # fmt: skip
_SYMBOLIC = ("n", "ranks")
"""Arguments that may depend on the shapes of tensors."""


def _twin(name: str) -> str:
    """Name of the operator that writes its result into ``out``."""
    return f"{name[:-1]}_out_" if name.endswith("_") else f"{name}_out"


def _parameters(kernel: Kernel) -> list[inspect.Parameter]:
    return [
        parameter
        for parameter in inspect.signature(kernel.function).parameters.values()
        if parameter.name not in ("out", "threads")
    ]


def _schema_of(kernel: Kernel, *, twin: bool) -> str:
    """Schema of a kernel, or of its twin."""
    before: list[str] = []
    options: list[str] = []
    aliases = iter("abcdef")
    for parameter in _parameters(kernel):
        name, annotation = parameter.name, str(parameter.annotation)
        to = before if parameter.kind is parameter.POSITIONAL_OR_KEYWORD else options
        if name == "codec":
            assert kernel.codec is not None
            hints = inspect.get_annotations(kernel.codec.form)
            options += [f"{_TYPES[hints[field]]} {field}" for field in kernel.codec.names]
            continue
        if name == "step":
            options += ["int step=0", "Tensor? step_tensor=None"]
            continue
        if name == "dtype" and twin:
            continue
        kind = _TYPES[annotation]
        if name in _SYMBOLIC:
            kind = kind.replace("int", "SymInt")
        if name in kernel.writes:
            kind = kind.replace("Tensor", f"Tensor({next(aliases)}!)")
        default = "" if parameter.default is parameter.empty else f"={_literal(parameter.default)}"
        to.append(f"{kind} {name}{default}")
    if twin:
        options.append(f"Tensor({next(aliases)}!) out")
    listed = ", ".join([*before, *(["*"] if options else []), *options])
    name = _twin(kernel.name) if twin else kernel.name
    return f"{name}({listed}) -> {'Tensor' if kernel.result and not twin else '()'}"


def _literal(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


# --------------------------------------------------------------------------- implementations


def _arguments(kernel: Kernel, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """An operator's arguments as those of the kernel's function."""
    given = dict(zip(_POSITIONAL_SCHEMA[kernel.name], args, strict=False)) | options
    if kernel.codec is not None:
        given["codec"] = kernel.codec.form(*(given.pop(name) for name in kernel.codec.names))
    step = given.pop("step_tensor", None)
    return given if step is None else given | {"step": step}


def _implementation(kernel: Kernel) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        result = kernel.function(**_arguments(kernel, args, options))
        return result if kernel.result is not None else None

    return run


def _twin_implementation(kernel: Kernel) -> Callable[..., None]:
    def run(*args: Any, **options: Any) -> None:
        kernel.function(**_arguments(kernel, args, options))

    return run


def _fake(kernel: Kernel, rule: Rule | None) -> Callable[..., Any]:
    """What an operator does to tensors without memory: a result of the right shape and dtype."""
    signature = inspect.signature(kernel.function)

    def run(*args: Any, **options: Any) -> Any:
        bound = signature.bind_partial(**_arguments(kernel, args, options))
        bound.apply_defaults()
        given = bound.arguments
        _check_devices(given)
        if rule is None:
            return None
        shape, dtype = rule(given)
        first = next(iter(given.values()))
        sizes = [torch.library.get_ctx().new_dynamic_size() if n is None else n for n in shape]
        if "dtype" in given:
            return first.new_empty(sizes, dtype=given["dtype"] or torch.float32)
        return first.new_empty(sizes, dtype=getattr(torch, dtype))

    return run


def _check_devices(given: Mapping[str, Any]) -> None:
    """The dispatcher answers with a fake kernel as soon as one argument is a meta tensor."""
    devices = sorted(
        {str(x.device) for name, x in given.items() if isinstance(x, Tensor) and name != "segments"}
    )
    if len(devices) > 1:
        raise ValueError(f"tensors are on {', '.join(devices)}: all must be on one device")


def _register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"pydist::{name}", fake, lib=_LIBRARY)
    _OPERATORS[name] = getattr(torch.ops.pydist, name)


_OPERATORS: dict[str, Any] = {}
_POSITIONAL = {
    name: [p.name for p in _parameters(kernel) if p.kind is p.POSITIONAL_OR_KEYWORD]
    for name, kernel in KERNELS.items()
}
_POSITIONAL_SCHEMA = {
    name: [argument for argument in names if argument != "codec"]
    for name, names in _POSITIONAL.items()
}
_FIELDS = {name: kernel.codec.names for name, kernel in KERNELS.items() if kernel.codec is not None}
for _kernel in KERNELS.values():
    _register(
        _schema_of(_kernel, twin=False), _implementation(_kernel), _fake(_kernel, _kernel.result)
    )
    if "out" in inspect.signature(_kernel.function).parameters:
        _register(
            _schema_of(_kernel, twin=True), _twin_implementation(_kernel), _fake(_kernel, None)
        )
assert torch_tensors.TORCH.kind == "torch"  # its import makes tensors known
register._operators = sys.modules[__name__]  # torch.compile cannot trace the import
register._watched = watched

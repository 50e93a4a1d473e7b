"""The registration of ``torch.ops.pydist.*``: schemas, implementations, fake kernels.

Registered with ``torch.library.Library.define/impl`` (about 8 µs a call; the ``custom_op``
decorator costs about 14 µs). What the operators do is documented where people call them, in
:mod:`pydist.ops`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pydist import _C
from pydist.formats import wire
from pydist.kernels import checks
from pydist.kernels import signs as kernels
from pydist.kernels.checks import View
from pydist.kernels.signs import LionOptions, Target

_C.current_isa()  # a wrong PYDIST_ISA is an error here, not in the first kernel call

_LIBRARY = torch.library.Library("pydist", "DEF")

_SCHEMAS = """
pack_signs(Tensor x, *, int zero_bit=1, Tensor(a!)? flags=None, Tensor? segments=None) -> Tensor
pack_signs_out(Tensor x, *, int zero_bit=1, Tensor(a!)? flags=None, Tensor? segments=None, Tensor(b!) out) -> ()
unpack_votes(Tensor planes, SymInt n, *, int? ranks=None, bool mean=False, ScalarType? dtype=None) -> Tensor
unpack_votes_out(Tensor planes, SymInt n, *, int? ranks=None, bool mean=False, Tensor(a!) out) -> ()
count_votes(Tensor payloads) -> Tensor
count_votes_out(Tensor payloads, *, Tensor(a!) out) -> ()
majority_vote(Tensor payloads, *, str ties="hash", int seed=0, int step=0, Tensor? step_tensor=None, SymInt? n=None, Tensor? segments=None) -> Tensor
majority_vote_out(Tensor payloads, *, str ties="hash", int seed=0, int step=0, Tensor? step_tensor=None, SymInt? n=None, Tensor? segments=None, Tensor(a!) out) -> ()
lion_pack_(Tensor grad, Tensor(a!) momentum, *, float beta1, float beta2, int zero_bit=1, Tensor(b!)? momentum_out=None, Tensor(c!)? flags=None, float? binarization_range=None, int seed=0, int rank=0, int step=0, Tensor? step_tensor=None, Tensor? segments=None) -> Tensor
lion_pack_out_(Tensor grad, Tensor(a!) momentum, *, float beta1, float beta2, int zero_bit=1, Tensor(b!)? momentum_out=None, Tensor(c!)? flags=None, float? binarization_range=None, int seed=0, int rank=0, int step=0, Tensor? step_tensor=None, Tensor? segments=None, Tensor(d!) out) -> ()
lion_apply_(Tensor(a!) param, Tensor planes, *, float lr, float weight_decay=0.0, int? ranks=None, Tensor? skip=None, Tensor? segments=None) -> ()
"""  # noqa: E501  (a schema is one line)

for _schema in _SCHEMAS.strip().splitlines():
    _LIBRARY.define(_schema)


# --------------------------------------------------------------------------- tensors to views


def contiguous(x: Tensor) -> Tensor:
    """The tensor in contiguous memory; a copy where it is not, or is the negative of its memory."""
    return x.resolve_neg().contiguous()


def check_storage(name: str, x: Tensor) -> None:
    """Raises ValueError where a tensor's storage is smaller than the tensor."""
    held, reach = x.untyped_storage().nbytes(), x.numel()
    if reach and not x.is_contiguous():
        reach = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    if (x.storage_offset() + reach) * x.element_size() > held:
        raise ValueError(
            f"{name} has {x.numel()} elements, but its storage has {held} bytes: it was freed or "
            "resized"
        )


def view_of(name: str, x: Tensor) -> View:
    """Describes a contiguous tensor.

    Raises:
        ValueError: Its storage was freed or made smaller behind its back.
    """
    check_storage(name, x)
    return View(name, x.data_ptr(), tuple(x.shape), str(x.dtype)[6:], str(x.device))


def optional_view(name: str, x: Tensor | None) -> View | None:
    """Describes a tensor that need not be given."""
    return None if x is None else view_of(name, contiguous(x))


def target_of(x: Tensor) -> Target:
    """Where kernels on this tensor run: its device's current stream, or torch's CPU threads."""
    if x.is_cuda:
        return Target(
            stream=torch.cuda.current_stream(x.device).cuda_stream,
            upload=lambda rows: _upload(rows, x.device),
            scratch=lambda size: _scratch(size, x.device),
        )
    return Target(threads=torch.get_num_threads())


def _upload(rows: wire.IntArray, device: torch.device) -> tuple[int, Tensor]:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"segments has {len(rows)} rows: such a table is copied to the device in each call, "
            "which a CUDA graph can't repeat; capture one segment a call"
        )
    # Not waited for: both allocators are stream-ordered, so the copy may outlive the two tensors,
    # and so may the kernel once it is launched.
    table = torch.from_numpy(rows).pin_memory().to(device, non_blocking=True)
    return table.data_ptr(), table


def _scratch(size: int, device: torch.device) -> tuple[int, Tensor]:
    room = torch.empty(size, dtype=torch.uint8, device=device)
    return room.data_ptr(), room


def on_device_of(x: Tensor) -> torch.cuda.device | _Nothing:
    """Makes a tensor's CUDA device the current one, as launching on its streams needs."""
    return torch.cuda.device(x.device) if x.is_cuda else _Nothing()


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def dense_of(name: str, x: Tensor) -> Tensor:
    """A contiguous tensor with the values of one that is written in place."""
    if x.numel() and any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(
            f"{name} has strides {list(x.stride())}: several elements share one place in memory, "
            "so it cannot be written in place"
        )
    return normal(contiguous(x))


def normal(x: Tensor) -> Tensor:
    """A tensor of the same memory that may be changed outside of inference mode, by any thread.

    Modes of torch belong to threads, and a tensor made in inference mode can be changed in that
    mode alone. Threads of pydist's own are in none.
    """
    if not x.is_inference():
        return x
    with torch.inference_mode(False):
        same = torch.empty(0, dtype=x.dtype, device=x.device)
        return same.set_(x.untyped_storage(), x.storage_offset(), x.size(), x.stride())


def check_apart(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """Raises ValueError where strided tensors reach into each other's memory."""
    if a.is_contiguous() and b.is_contiguous():
        return  # checks.check_disjoint sees it
    spans = []
    for x in (a, b):
        reach = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        spans.append((x.data_ptr(), x.data_ptr() + (reach + 1) * x.element_size()))
    if a.numel() and b.numel() and spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]:
        raise ValueError(f"{name_a} and {name_b} overlap in memory")


def written(target: Tensor, dense: Tensor) -> None:
    """Ends a write behind autograd's back: copies ``dense`` back, or bumps the version.

    A tensor that backward has saved is then known to have changed, as after any in-place operation.
    """
    if (
        target.is_neg()
        or dense.data_ptr() != target.data_ptr()
        or dense.stride() != target.stride()
    ):
        with torch.inference_mode(target.is_inference()):
            target.copy_(dense.view_as(target))
    elif not target.is_inference():
        torch.autograd.graph.increment_version(target)


def table_of(segments: Tensor | None) -> wire.IntArray | None:
    """A segment table as NumPy has it."""
    return None if segments is None else kernels.as_table(segments.numpy(force=True))


def _payload(x: Tensor, name: str, segments: Tensor | None) -> Tensor:
    """New memory for the payload of ``x``."""
    size = wire.payload_bytes(x.numel())
    if segments is not None:
        table = checks.check_table(table_of(segments), x.numel(), name)
        size = wire.segments_words(table) * wire.WORD_BYTES
    return x.new_empty(size, dtype=torch.uint8)


def _checked(segments: Tensor | None, x: View) -> tuple[wire.IntArray | None, bool]:
    """A segment table of ``x``, and whether it leaves gaps in the payload."""
    if segments is None:
        return None, False
    table = checks.check_table(table_of(segments), x.size, x.name)
    return table, wire.has_gaps(table)


def result_view(out: Tensor, gaps: bool = False, *inputs: View) -> View:
    """Memory that a kernel writes; what lies in the gaps between segments is padding, so zero."""
    if not out.is_contiguous() or out.is_neg():
        raise ValueError(f"out must be contiguous, got strides {list(out.stride())}")
    view = view_of("out", out)
    if gaps:
        for other in inputs:
            checks.check_disjoint(view, other)
        out.zero_()
    return view


# --------------------------------------------------------------------------- implementations


# Each operator with a result has a twin that writes it into memory that is there. An operator may
# not return what it was given, so the twin returns nothing.


def _pack_signs(x: Tensor, *, segments: Tensor | None = None, **options: Any) -> Tensor:
    out = _payload(x, "x", segments)
    _pack_signs_out(x, segments=segments, out=out, **options)
    return out


def _pack_signs_out(
    x: Tensor,
    *,
    zero_bit: int = 1,
    flags: Tensor | None = None,
    segments: Tensor | None = None,
    out: Tensor,
) -> None:
    x = contiguous(x)
    view = view_of("x", x)
    table, gaps = _checked(segments, view)
    with on_device_of(x):
        kernels.pack_signs(
            target_of(x), view, result_view(out, gaps, view),
            zero_bit=zero_bit, flags=optional_view("flags", flags), segments=table,
        )  # fmt: skip
    written(out, out)


def _unpack_votes(
    planes: Tensor, n: int, *, dtype: torch.dtype | None = None, **options: Any
) -> Tensor:
    checks.check_n(n)
    dtype = dtype or torch.float32
    if str(dtype)[6:] not in checks.FLOATS:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    out = planes.new_empty(n, dtype=dtype)
    _unpack_votes_out(planes, n, out=out, **options)
    return out


def _unpack_votes_out(
    planes: Tensor, n: int, *, ranks: int | None = None, mean: bool = False, out: Tensor
) -> None:
    checks.check_n(n)
    planes = contiguous(planes)
    view = result_view(out)
    checks.check_size(view, n, "n")
    with on_device_of(planes):
        kernels.unpack_votes(
            target_of(planes), view_of("planes", planes), view, ranks=ranks, mean=mean
        )
    written(out, out)


def _count_votes(payloads: Tensor) -> Tensor:
    ranks, size = checks.check_payloads(view_of("payloads", payloads))
    out = payloads.new_empty((wire.planes_for(ranks), size))
    _count_votes_out(payloads, out=out)
    return out


def _count_votes_out(payloads: Tensor, *, out: Tensor) -> None:
    payloads = contiguous(payloads)
    with on_device_of(payloads):
        kernels.count_votes(target_of(payloads), view_of("payloads", payloads), result_view(out))
    written(out, out)


def _majority_vote(payloads: Tensor, *, ties: str = "hash", **options: Any) -> Tensor:
    _, size = checks.check_payloads(view_of("payloads", payloads))
    out = payloads.new_empty((2 if ties == "zero" else 1, size))
    _majority_vote_out(payloads, ties=ties, out=out, **options)
    return out


def _majority_vote_out(
    payloads: Tensor,
    *,
    ties: str = "hash",
    seed: int = 0,
    step: int = 0,
    step_tensor: Tensor | None = None,
    n: int | None = None,
    segments: Tensor | None = None,
    out: Tensor,
) -> None:
    payloads = contiguous(payloads)
    view = view_of("payloads", payloads)
    _, size = checks.check_payloads(view)
    table = table_of(segments)
    gaps = (n is not None or table is not None) and checks.vote_gaps(table, n, size)
    with on_device_of(payloads):
        kernels.majority_vote(
            target_of(payloads), view, result_view(out, gaps, view),
            ties=ties, seed=seed, n=n, segments=table,
            step=optional_view("step", step_tensor) or step,
        )  # fmt: skip
    written(out, out)


def _lion_pack(
    grad: Tensor, momentum: Tensor, *, segments: Tensor | None = None, **options: Any
) -> Tensor:
    out = _payload(grad, "grad", segments)
    _lion_pack_out(grad, momentum, segments=segments, out=out, **options)
    return out


def _lion_pack_out(
    grad: Tensor,
    momentum: Tensor,
    *,
    momentum_out: Tensor | None = None,
    flags: Tensor | None = None,
    step_tensor: Tensor | None = None,
    segments: Tensor | None = None,
    out: Tensor,
    **scalars: Any,
) -> None:
    target = momentum if momentum_out is None else momentum_out
    if momentum_out is not None:
        check_apart("momentum", momentum, "momentum_out", momentum_out)
    name = "momentum" if momentum_out is None else "momentum_out"
    check_apart("out", out, name, target)
    dense = dense_of(name, target)
    old = dense if target is momentum else contiguous(momentum)
    grad = contiguous(grad)
    g, m, new = view_of("grad", grad), view_of("momentum", old), view_of("momentum_out", dense)
    table, gaps = _checked(segments, g)
    with on_device_of(grad):
        kernels.lion_pack(
            target_of(grad), g, m, new, result_view(out, gaps, g, m, new),
            LionOptions(**scalars), flags=optional_view("flags", flags), segments=table,
            step=optional_view("step", step_tensor),
        )  # fmt: skip
    written(target, dense)
    written(out, out)


def _lion_apply(
    param: Tensor,
    planes: Tensor,
    *,
    lr: float,
    weight_decay: float = 0.0,
    ranks: int | None = None,
    skip: Tensor | None = None,
    segments: Tensor | None = None,
) -> None:
    dense = dense_of("param", param)
    planes = contiguous(planes)
    with on_device_of(param):
        kernels.lion_apply(
            target_of(param), view_of("param", dense), view_of("planes", planes),
            lr=lr, weight_decay=weight_decay, ranks=ranks, skip=optional_view("skip", skip),
            segments=table_of(segments),
        )  # fmt: skip
    written(param, dense)


# --------------------------------------------------------------------------- fake kernels


def _fake_payload(n: int | torch.SymInt, like: Tensor, segments: Tensor | None) -> Tensor:
    if segments is not None:  # the length depends on the table's values
        size = torch.library.get_ctx().new_dynamic_size()
        return like.new_empty(size, dtype=torch.uint8)
    return like.new_empty((n + 31) // 32 * 4, dtype=torch.uint8)


def _pack_signs_fake(x, *, zero_bit=1, flags=None, segments=None):  # type: ignore[no-untyped-def]
    return _fake_payload(x.numel(), x, segments)


def _unpack_votes_fake(planes, n, *, ranks=None, mean=False, dtype=None):  # type: ignore[no-untyped-def]
    return planes.new_empty(n, dtype=dtype or torch.float32)


def _count_votes_fake(payloads):  # type: ignore[no-untyped-def]
    return payloads.new_empty((wire.planes_for(payloads.shape[0]), payloads.shape[1]))


def _majority_vote_fake(payloads, *, ties="hash", **options):  # type: ignore[no-untyped-def]
    return payloads.new_empty((2 if ties == "zero" else 1, payloads.shape[1]))


def _lion_pack_fake(grad, momentum, *, segments=None, **options):  # type: ignore[no-untyped-def]
    return _fake_payload(grad.numel(), grad, segments)


def writes_only_fake(*args: Any, **options: Any) -> None:
    """The fake of an operator that returns nothing."""


def _on_one_device(fake: Callable[..., Any]) -> Callable[..., Any]:
    """The dispatcher answers with a fake kernel as soon as one argument is a meta tensor."""

    @functools.wraps(fake)
    def checked(*args: Any, **options: Any) -> Any:
        tensors = [x for x in args if isinstance(x, Tensor)]
        tensors += [
            x for name, x in options.items() if isinstance(x, Tensor) and name != "segments"
        ]
        devices = sorted({str(x.device) for x in tensors})
        if len(devices) > 1:
            raise ValueError(f"tensors are on {', '.join(devices)}: all must be on one device")
        return fake(*args, **options)

    return checked


_OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "pack_signs": (_pack_signs, _pack_signs_fake),
    "unpack_votes": (_unpack_votes, _unpack_votes_fake),
    "count_votes": (_count_votes, _count_votes_fake),
    "majority_vote": (_majority_vote, _majority_vote_fake),
    "lion_pack_": (_lion_pack, _lion_pack_fake),
    "lion_apply_": (_lion_apply, writes_only_fake),
    "pack_signs_out": (_pack_signs_out, writes_only_fake),
    "unpack_votes_out": (_unpack_votes_out, writes_only_fake),
    "count_votes_out": (_count_votes_out, writes_only_fake),
    "majority_vote_out": (_majority_vote_out, writes_only_fake),
    "lion_pack_out_": (_lion_pack_out, writes_only_fake),
}


def implement(name: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers what an operator that is defined does, on CPU, CUDA and fake tensors."""
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"pydist::{name}", _on_one_device(fake), lib=_LIBRARY)


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines an operator by its schema, and registers what it does."""
    _LIBRARY.define(schema)
    implement(schema.partition("(")[0], implementation, fake)


for _name, (_implementation, _fake) in _OPERATORS.items():
    implement(_name, _implementation, _fake)

"""A CUDA device on a machine without one: tensors that say they are on it, and what is counted.

What pydist does for a tensor on a device (streams, pinned copies, kernels by address) can so be run
and compared with the CPU, bit by bit, over real ranks. Its memory is the host's; kernels are the
emulated ones (:mod:`emulated`); streams and events are stand-ins, as everything runs at once.

Counted are operations that a device would run, and what makes the host wait for it:

* a kernel of pydist's: one for each launch; a dispatched operator of torch's that is neither a
  view nor an allocation: one, ``foreach`` operators too; a collective on the device: one
* waits: reading a number or a truth value, copies to or from memory that is not pinned or without
  ``non_blocking``, ``Event.synchronize``
"""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import emulated
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from pydist import _C
from pydist.collectives import flat
from pydist.kernels import torch_tensors
from pydist.kernels.launch import LaunchTarget
from pydist.transport import groups, message

DEVICE = torch.device("cuda:0")
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
READS = {"_local_scalar_dense", "is_nonzero", "equal"}


class Counts:
    """What was counted, by thread: the one that calls, or one of pydist's own."""

    def __init__(self) -> None:
        self.operations: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()
        self.on = False
        self.here = threading.local()

    def operation(self, name: str, times: int = 1) -> None:
        if self.on and times and not getattr(self.here, "quiet", False):
            self.operations[name] += times

    def wait(self, name: str) -> None:
        if not self.on:
            return
        own = threading.current_thread().name.startswith("pydist-")
        self.waits["worker" if own else "caller"] += 1
        where = [
            f"{frame.filename.rpartition('/pydist/')[2]}:{frame.lineno}"
            for frame in traceback.extract_stack()
            if "/pydist/" in frame.filename
        ]
        self.lines[f"{name} at {where[-1] if where else '?'}"] += 1

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        self.operations.clear(), self.waits.clear(), self.lines.clear()
        self.on = True
        try:
            yield
        finally:
            self.on = False


COUNTS = Counts()
_pinned: set[int] = set()  # addresses of storages


def is_pinned(x: Tensor) -> bool:
    return x.untyped_storage().data_ptr() in _pinned


class OnDevice(Tensor):
    """A tensor on the device; ``memory`` is its memory."""

    memory: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=DEVICE,
        )  # fmt: skip
        made.memory = inner
        return made

    def data_ptr(self) -> int:
        return self.memory.data_ptr()

    def untyped_storage(self) -> Any:
        return self.memory.untyped_storage()

    # torch's own ask for a guard of the device, which a build without CUDA does not have.
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, Tensor):
            COUNTS.operation("index")
            return OnDevice(self.memory[_inner(index)])
        return OnDevice(self.memory[index])

    def __setitem__(self, index: Any, value: Any) -> None:
        self[index].copy_(value if isinstance(value, Tensor) else torch.tensor(value))

    def __int__(self) -> int:
        COUNTS.wait("int")
        return int(self.memory)

    def __float__(self) -> float:
        COUNTS.wait("float")
        return float(self.memory)

    def __bool__(self) -> bool:
        COUNTS.wait("bool")
        return bool(self.memory)

    def tolist(self) -> Any:
        COUNTS.wait("tolist")
        return self.memory.tolist()

    def to(self, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        to_host = device is not None and device.type == "cpu"
        if not (to_host or copy) and dtype in (None, self.dtype):
            return self
        COUNTS.operation("_to_copy")
        if to_host:
            COUNTS.wait("to")
        moved = self.memory.to(dtype or self.dtype, copy=True)
        return moved if to_host else OnDevice(moved)

    def record_stream(self, stream: Any) -> None:
        pass

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.where, Tensor.contiguous):  # these ask for a guard too
            COUNTS.operation(func.__name__)
            return OnDevice(func(*(_inner(x) for x in args)))
        if func is Tensor.copy_:
            return torch.ops.aten.copy_.default(*args, **kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():  # what it makes is what dispatch says
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _inner(x: Any) -> Any:
    return x.memory if isinstance(x, OnDevice) else x


def _outer(x: Any) -> Any:
    return OnDevice(x) if isinstance(x, Tensor) and not isinstance(x, OnDevice) else x


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator of torch's, on the tensors' memory."""
    name = func.overloadpacket.__name__
    there = [False]

    def note(x: Any) -> Any:
        there[0] = there[0] or isinstance(x, OnDevice)
        return x

    tree_map(note, (args, kwargs))
    asked = kwargs.get("device")
    to_device = torch.device(asked).type == "cuda" if asked is not None else there[0]
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    pin = kwargs.pop("pin_memory", None)
    if there[0] or to_device:
        _count(func, name, args, kwargs, there[0], to_device)
    result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if name == "_to_copy" and there[0] != to_device and result is not None:
        result = result.clone() if result.data_ptr() == _inner(args[0]).data_ptr() else result
    if pin:
        _pinned.add(result.untyped_storage().data_ptr())
    if name == "copy_" and not isinstance(args[0], OnDevice):
        return args[0]
    return tree_map(_outer, result) if to_device else result


def _count(
    func: Any, name: str, args: Any, kwargs: dict[str, Any], there: bool, to_device: bool
) -> None:
    if name in READS:
        COUNTS.wait(name)
    returns = func._schema.returns
    view = (
        bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
    )
    if view or name in ALLOCATIONS or name in READS or name == "detach":
        return
    COUNTS.operation(name)
    host = None
    if name == "copy_":
        target, source = args[:2]
        if isinstance(target, OnDevice) != isinstance(source, OnDevice):
            host = source if isinstance(target, OnDevice) else target
        non_blocking = (args[2] if len(args) > 2 else False) or kwargs.get("non_blocking")
        if host is not None and host.numel() == 1 and host is source:
            return  # a number, as an argument of a kernel
    elif name == "_to_copy" and there != to_device:
        host, non_blocking = args[0] if to_device else None, kwargs.get("non_blocking")
        if host is None or not (non_blocking and is_pinned(host)):
            COUNTS.wait(name)
        return
    if host is not None and not (non_blocking and is_pinned(host)):
        COUNTS.wait(name)


class Mode(TorchDispatchMode):
    """Makes tensors on the device where they are asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


# --------------------------------------------------------------------------- torch.cuda


class Stream:
    """Order is that of the calls."""

    cuda_stream = 0
    device = DEVICE

    def __init__(self, *args: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass


class Event:
    def record(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        COUNTS.wait("synchronize")


@contextlib.contextmanager
def _on_stream(stream: Any) -> Iterator[None]:
    with Mode():  # of this thread
        yield


def _pin(x: Tensor, *args: Any) -> Tensor:
    copied = x.clone()
    _pinned.add(copied.untyped_storage().data_ptr())
    return copied


_tensor = torch.tensor


def _make_tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
    if device is None or torch.device(device).type == "cpu":
        return _tensor(data, device=device, **kwargs)
    COUNTS.operation("tensor")
    COUNTS.wait("tensor")  # from memory that is not pinned
    return OnDevice(_tensor(data, **kwargs))


_future_init = torch.futures.Future.__init__


def _init_future(future: Any, *, devices: Any = None) -> None:
    _future_init(future)


class _Kernels:
    """The emulated kernels, counted; of one thread at a time."""

    _lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        function = getattr(emulated.MODULE.cuda, name)

        def run(*args: Any) -> None:
            with self._lock:
                before = emulated.EMULATOR.counters()["launches"]  # type: ignore[union-attr]
                function(*args)
                after = emulated.EMULATOR.counters()["launches"]  # type: ignore[union-attr]
            COUNTS.operation(name, after - before)

        return run


def _collective(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(output: Tensor, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(tensor, OnDevice):
            COUNTS.operation(function.__name__)
        return function(_inner(output), _inner(tensor), *args, **kwargs)

    return run


def _message(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda tensor, *args: function(_inner(tensor), *args)


class _Tables(torch_tensors.DeviceTables):
    """Counts the tables that are copied under a name of their own."""

    def on_device(self, *args: Any) -> Any:
        known = len(self._known)
        COUNTS.here.quiet = True
        try:
            return super().on_device(*args)
        finally:
            COUNTS.here.quiet = False
            COUNTS.operation("table", len(self._known) - known)


@contextlib.contextmanager
def device() -> Iterator[Counts]:
    """Within it there is a device, of this thread and of pydist's own threads."""
    kernels = _Kernels()
    module = SimpleNamespace(cpu=_C.cpu, cuda=kernels)

    def target(**options: Any) -> LaunchTarget:
        return LaunchTarget(**options, module=module)

    assert emulated.EMULATOR is not None
    emulated.EMULATOR.configure(0, races=False)
    patches: list[tuple[Any, str, Any]] = [
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "Stream", Stream),
        (torch.cuda, "Event", Event),
        (torch.cuda, "stream", _on_stream),
        (torch.cuda, "device", lambda device: contextlib.nullcontext()),
        (torch.cuda, "current_stream", lambda device=None: Stream()),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (torch.futures.Future, "__init__", _init_future),
        (torch_tensors, "LaunchTarget", target),
        (torch_tensors, "TABLES", _Tables(most=100_000)),
        (torch_tensors, "_floats", {}),
        (message, "_C", module),
        (groups, "send", _message(groups.send)),
        (groups, "receive", _message(groups.receive)),
        (groups, "all_to_all", _collective(groups.all_to_all)),
        (groups, "all_gather", _collective(groups.all_gather)),
        (Tensor, "pin_memory", _pin),
        (torch, "tensor", _make_tensor),
        (flat, "check_tensor", lambda name, tensor: None),  # takes no class of tensors but torch's
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        with Mode():
            yield COUNTS

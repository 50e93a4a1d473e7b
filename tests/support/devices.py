"""What tests of a CUDA device share. They run on the CPU too, so that the tests are tested."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pydist import _C
from pydist.kernels import torch_tensors
from pydist.kernels.launch import LaunchTarget
from pydist.selfcheck import Bits

GUARD = 0x5A


def missing_device(count: int = 1) -> str:
    """Why there are not so many CUDA devices here; empty where there are."""
    if _C.CUDA_BUILD is None:
        return "pydist was built without CUDA"
    if _C.cuda.device_count() < count:
        return f"{_C.cuda.device_count()} CUDA device(s), this needs {count}"
    if torch.cuda.device_count() < count:
        return f"torch sees {torch.cuda.device_count()} CUDA device(s), this needs {count}"
    return ""


def cuda(device: str = "cuda:0") -> Any:
    """A parameter that is skipped, and says why, where the device is not there."""
    why = missing_device(int(device.split(":")[1]) + 1)
    return pytest.param(device, marks=[pytest.mark.gpu, pytest.mark.skipif(bool(why), reason=why)])


on_each_device = pytest.mark.parametrize("device", ["cpu", cuda()])
on_cuda = pytest.mark.parametrize("device", [cuda()])


def _messages(device: str, on_device: bool) -> Any:
    where = "device" if on_device else "host"
    return pytest.param(
        device, on_device, id=f"{device}-messages-on-{where}",
        marks=[] if device == "cpu" else cuda(device).marks,
    )  # fmt: skip


# Messages that stay on the device, and others; on the CPU the usual tests have the latter.
with_messages = pytest.mark.parametrize(
    ("device", "on_device"),
    [_messages("cpu", True), _messages("cuda:0", True), _messages("cuda:0", False)],
)


class OffsetMemory:
    """Tensors that begin ``offset`` elements behind an aligned address, between guard bytes."""

    def __init__(self, device: str, offset: int) -> None:
        self.name = f"{device} + {offset}"
        self._device, self._offset = torch.device(device), offset
        self._blocks: list[tuple[Any, int, int]] = []

    def put(self, array: Bits) -> Any:
        """Copies it."""
        begin, end = self._offset * array.itemsize, self._offset * array.itemsize + array.nbytes
        block = np.full(end + 64, GUARD, dtype=np.uint8)
        block[begin:end] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        there = torch.from_numpy(block).to(self._device)
        self._blocks.append((there, begin, end))
        kind = torch.from_numpy(np.empty(0, dtype=array.dtype)).dtype
        return there[begin:end].view(kind).view(array.shape)

    def get(self, array: Any) -> Bits:
        """Copies it back, and looks at the guard bytes of everything so far."""
        host: Bits = array.cpu().numpy().copy()
        for block, begin, end in self._blocks:
            bytes_there = block.cpu().numpy()
            around = np.concatenate([bytes_there[:begin], bytes_there[end:]])
            assert (around == GUARD).all(), f"written outside an array on {self.name}"
        self._blocks.clear()
        return host

    def address(self, array: Any) -> int:
        """Its first byte."""
        return int(array.data_ptr())

    def device(self) -> str:
        """Its name."""
        return str(self._device)

    def target(self) -> LaunchTarget:
        """Where kernels run."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        return torch_tensors.target_of(torch.empty(0, device=self._device))

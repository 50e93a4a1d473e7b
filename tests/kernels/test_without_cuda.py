"""A module that was built without CUDA says so when it is handed data on a CUDA device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pydist import _C, QSGD, BlockInt, Ternary, TopK, arrays, cli, ops, selfcheck
from pydist.kernels import libraries, torch_tensors
from pydist.kernels.checks import ArrayInfo
from pydist.kernels.launch import LaunchTarget
from pydist.selfcheck import cases

SAYS = "on a CUDA device, but pydist was built without CUDA"


def target() -> LaunchTarget:
    """A stream on a device, and a module that has the CPU's kernels alone."""

    def memory(size: int) -> tuple[int, Any]:
        room = np.empty(size, dtype=np.uint8)
        return room.__array_interface__["data"][0], room

    module = SimpleNamespace(cpu=_C.cpu)
    return LaunchTarget(stream=0, upload=lambda rows: (0, rows), scratch=memory, module=module)


class DeviceMemory(selfcheck.HostMemory):
    def device(self) -> str:
        return "cuda:0"

    def target(self) -> LaunchTarget:
        return target()


@pytest.mark.parametrize("kernel", selfcheck.KERNELS)
def test_every_kernel(kernel: str) -> None:
    run = selfcheck.KernelRunner(DeviceMemory("none"))
    with pytest.raises(RuntimeError, match=SAYS):
        cases.check_kernel(run, kernel)


N = 1024
CALLS: dict[str, Any] = {
    "pack_signs": lambda door, x, u8: door.pack_signs(x),
    "unpack_signs": lambda door, x, u8: door.unpack_signs(u8[:128], N),
    "count_votes": lambda door, x, u8: door.count_votes(u8[:256].reshape(2, 128)),
    "lion_pack_": lambda door, x, u8: door.lion_pack_(x, x + 1, beta1=0.9, beta2=0.99),
    "lion_apply_": lambda door, x, u8: door.lion_apply_(x, u8[:128].reshape(1, 128), lr=0.1),
    "quantize": lambda door, x, u8: door.quantize(x, BlockInt(4)),
    "quantize_feedback_": lambda door, x, u8: door.quantize_feedback_(x, x + 1, QSGD(4)),
    "elias_encode": lambda door, x, u8: door.quantize(x, QSGD(4, entropy="elias")),
    "ternary_scale": lambda door, x, u8: door.ternary_scale(x, Ternary()),
    "topk_select": lambda door, x, u8: door.topk_select(x, TopK(0.1)),
    "sum_values": lambda door, x, u8: door.sum_values(x.reshape(2, N // 2)),
}


@pytest.mark.parametrize("call", CALLS)
def test_both_front_ends(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice(libraries.NumPy):
        def info(self, name: str, x: Any, *, written: bool = False) -> ArrayInfo:
            return ArrayInfo(name, x.ctypes.data, x.shape, x.dtype.name, "cuda:0", x)

        def target(self, x: Any, threads: int | None) -> LaunchTarget:
            return target()

    monkeypatch.setattr(torch_tensors.Torch, "target", lambda self, x, threads: target())
    monkeypatch.setitem(libraries.LIBRARIES, np.ndarray, OnDevice())
    x, u8 = torch.ones(N), torch.zeros(1024, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=SAYS):
        CALLS[call](ops, x, u8)
    with pytest.raises(RuntimeError, match=SAYS):
        CALLS[call](arrays, x.numpy(), u8.numpy())


def test_a_check_of_cuda_alone_fails_without_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_C, "CUDA_BUILD", None)
    assert cli.main(["check", "--device", "cuda"]) == 1
    printed = capsys.readouterr().out
    assert "cuda: not checked: not built" in printed and "nothing was checked" in printed
    assert "cpu " not in printed


def test_a_check_of_the_cpu_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cases, "KERNELS", {"count_votes": cases.KERNELS["count_votes"]})
    assert cli.main(["check", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "cpu scalar" in printed and "cuda" not in printed

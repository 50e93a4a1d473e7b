"""Arrays of CuPy on several devices, with a stand-in for CuPy: which device is current when."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pydist.kernels import libraries

CURRENT = [0]
CAPTURING = {0: False}


class Device:
    """CuPy's: current within a ``with`` block."""

    def __init__(self, number: int) -> None:
        self.id = number

    def __enter__(self) -> None:
        CURRENT.append(self.id)

    def __exit__(self, *error: object) -> None:
        CURRENT.pop()


def array(device: int, contiguous: bool = True) -> Any:
    flags = SimpleNamespace(c_contiguous=contiguous)
    return SimpleNamespace(device=Device(device), flags=flags, size=4, strides=(4,), shape=(4,))


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> libraries.CuPy:
    def made(*args: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(device=Device(CURRENT[-1]), data=SimpleNamespace(ptr=64))

    def stream() -> Any:
        return SimpleNamespace(ptr=100 + CURRENT[-1], is_capturing=lambda: CAPTURING[0])

    module: Any = SimpleNamespace(
        empty=made, ascontiguousarray=made, asarray=made,
        cuda=SimpleNamespace(get_current_stream=stream),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "cupy", module)
    return libraries.CuPy()


def test_what_is_made_is_on_the_device_of_the_array(cupy: libraries.CuPy) -> None:
    assert cupy.empty(array(1), (4,), "uint8").device.id == 1
    assert cupy.contiguous(array(1, contiguous=False)).device.id == 1
    assert cupy.writable("x", array(1, contiguous=False)).device.id == 1
    assert CURRENT == [0]


def test_kernels_run_on_the_device_of_the_array(cupy: libraries.CuPy) -> None:
    assert cupy.target(array(1), None).stream == 101
    with cupy.on_device(array(1)):
        assert CURRENT[-1] == 1
    assert CURRENT == [0]


def test_a_table_is_not_captured(cupy: libraries.CuPy, monkeypatch: pytest.MonkeyPatch) -> None:
    target = cupy.target(array(1), None)
    assert target.upload is not None
    assert target.upload(np.zeros((2, 9), dtype=np.int64))[0] == 64
    monkeypatch.setitem(CAPTURING, 0, True)
    with pytest.raises(RuntimeError, match="segments has 2 rows.*CUDA graph"):
        target.upload(np.zeros((2, 9), dtype=np.int64))

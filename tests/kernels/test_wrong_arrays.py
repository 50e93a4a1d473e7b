"""Arrays that a kernel must refuse: overlap, devices, kinds, byte order, read-only, bad tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from wrong import BETAS, Arrays

from pydist import BlockInt, arrays, ops
from pydist.formats import wire
from pydist.kernels import checks, libraries
from pydist.kernels.checks import ArrayInfo

# --------------------------------------------------------------------------- overlap


def test_overlap(a: Arrays) -> None:
    memory = a.f(40)
    with pytest.raises(ValueError, match="grad and momentum overlap"):
        a.lion_pack_(memory[:32], memory[8:], **BETAS)
    with pytest.raises(ValueError, match="grad and momentum_out overlap"):
        a.lion_pack_(memory[:32], a.f(32), **BETAS, momentum_out=memory[8:])
    with pytest.raises(ValueError, match="momentum and momentum_out overlap"):
        a.lion_pack_(a.f(32), memory[:32], **BETAS, momentum_out=memory[8:])
    planes = memory[:1].view(torch.uint8 if a.kind == "torch" else np.uint8)
    with pytest.raises(ValueError, match="param and planes overlap"):
        a.lion_apply_(memory[:32], planes.reshape(1, 4), lr=0.1)


def test_the_same_memory_may_be_momentum_and_momentum_out(a: Arrays) -> None:
    momentum = a.f(4)
    a.lion_pack_(a.f(4), momentum, **BETAS, momentum_out=momentum)
    other = a.f(4)
    a.lion_pack_(a.f(4), other, **BETAS)
    assert momentum.tolist() == other.tolist()


def test_elements_that_share_memory_are_not_written(a: Arrays) -> None:
    one = a.f(1)
    shared = one.expand(32) if a.kind == "torch" else np.lib.stride_tricks.as_strided(
        one, (32,), (0,)
    )  # fmt: skip
    with pytest.raises(ValueError, match="param has strides.*0"):
        a.lion_apply_(shared, a.u(1, 4), lr=0.1)
    with pytest.raises(ValueError, match="momentum has strides.*0"):
        a.lion_pack_(a.f(32), shared, **BETAS)
    assert a.pack_signs(shared).tolist() == [255] * 4  # reading them is fine


def test_wrong_input_changes_nothing(a: Arrays) -> None:
    param, momentum = a.f(33), a.f(33)
    with pytest.raises(ValueError, match="planes"):
        a.lion_apply_(param, a.u(1, 4), lr=0.1)
    with pytest.raises(ValueError, match="beta1"):
        a.lion_pack_(a.f(33), momentum, beta1=2.0, beta2=0.5)
    assert param.tolist() == momentum.tolist() == [1.0] * 33


# --------------------------------------------------------------------------- devices


def test_devices_must_be_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of NumPy arrays some of which pretend, since this machine may have one device only."""
    there: list[Any] = []

    class TwoDevices(libraries.NumPy):
        def info(self, name: str, x: Any, *, written: bool = False) -> ArrayInfo:
            device = "cuda:1" if any(x is y for y in there) else "cpu"
            return ArrayInfo(name, x.ctypes.data, x.shape, x.dtype.name, device, x)

    def far(*shape: int, dtype: str = "float32") -> Any:
        there.append(np.zeros(shape, dtype=dtype))
        return there[-1]

    monkeypatch.setitem(libraries.LIBRARIES, np.ndarray, TwoDevices())
    x, momentum = np.ones(4, dtype=np.float32), np.ones(4, dtype=np.float32)
    with pytest.raises(ValueError, match="flags is on cuda:1, x on cpu"):
        arrays.pack_signs(x, flags=far(1, dtype="int32"))
    with pytest.raises(ValueError, match="out is on cuda:1, x on cpu"):
        arrays.pack_signs(x, out=far(4, dtype="uint8"))
    with pytest.raises(ValueError, match="momentum is on cuda:1, grad on cpu"):
        arrays.lion_pack_(x, far(4), **BETAS)
    with pytest.raises(ValueError, match="momentum is on cuda:1, grad on cpu"):
        arrays.lion_pack_(x, far(4), **BETAS, momentum_out=momentum)
    with pytest.raises(ValueError, match="planes is on cuda:1, param on cpu"):
        arrays.lion_apply_(x, far(1, 4, dtype="uint8"), lr=0.1)


META = {
    "flags": lambda: ops.pack_signs(
        torch.ones(4), flags=torch.zeros(1, dtype=torch.int32, device="meta")
    ),
    "momentum": lambda: ops.lion_pack_(torch.ones(4), torch.ones(4, device="meta"), **BETAS),
    "planes": lambda: ops.lion_apply_(
        torch.ones(4), torch.zeros(1, 4, dtype=torch.uint8, device="meta"), lr=0.1
    ),
}


@pytest.mark.parametrize("name", META)
def test_meta_tensors_among_real_ones(name: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match="meta"):
        META[name]()


def test_tensors_without_a_kernel() -> None:
    with pytest.raises(TypeError, match="x must be dense, got layout torch.sparse_coo"):
        ops.pack_signs(torch.ones(4).to_sparse())


# --------------------------------------------------------------------------- NumPy


def test_other_kinds_of_array() -> None:
    for wrong in ([1.0], "text", 1.0):
        with pytest.raises(TypeError, match=rf"x must be .* got {type(wrong).__name__}"):
            arrays.pack_signs(wrong)
    with pytest.raises(TypeError, match="flags must be .* got list"):
        arrays.pack_signs(np.ones(3, dtype=np.float32), flags=[0])


def test_arrays_of_two_libraries() -> None:
    x, a = torch.ones(8), np.ones(8, dtype=np.float32)
    payload = np.zeros(4, dtype=np.uint8)
    with pytest.raises(TypeError, match="out is a numpy array, x a torch array"):
        ops.pack_signs(x, out=payload)
    with pytest.raises(TypeError, match="momentum is a numpy array, grad a torch array"):
        ops.lion_pack_(x, a, **BETAS)
    with pytest.raises(TypeError, match="out is a numpy array, grad a torch array"):
        ops.lion_pack_(x, x.clone(), **BETAS, out=payload)
    with pytest.raises(TypeError, match="residual is a torch array, x a numpy array"):
        arrays.quantize_feedback_(a, x, BlockInt(4), out=payload)


def test_read_only_arrays_are_not_written() -> None:
    def frozen(array: Any) -> Any:
        array.flags.writeable = False
        return array

    x, planes = np.ones(32, dtype=np.float32), np.zeros((1, 4), dtype=np.uint8)
    with pytest.raises(ValueError, match="param is read-only"):
        arrays.lion_apply_(frozen(x.copy()), planes, lr=0.1)
    with pytest.raises(ValueError, match="momentum is read-only"):
        arrays.lion_pack_(x, frozen(x.copy()), **BETAS)
    with pytest.raises(ValueError, match="momentum_out is read-only"):
        arrays.lion_pack_(x, x.copy(), **BETAS, momentum_out=frozen(x.copy()))
    arrays.lion_pack_(frozen(x.copy()), x.copy(), **BETAS)  # reading is fine


def test_read_only_flags_are_not_written() -> None:
    flags = np.zeros(1, dtype=np.int32)
    flags.flags.writeable = False
    with pytest.raises(ValueError, match="flags is read-only"):
        arrays.pack_signs(np.array([np.nan], dtype=np.float32), flags=flags)


def test_arrays_of_the_other_byte_order() -> None:
    x = np.array([1, -1], dtype=">f4")
    with pytest.raises(TypeError, match="x"):
        arrays.pack_signs(x)


# --------------------------------------------------------------------------- tables


def test_segments_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="ordinals"):
        wire.segments([3, 4], ordinals=[7])


def test_segments_of_fractions() -> None:
    with pytest.raises((TypeError, ValueError), match="lengths"):
        wire.segments([3.7])  # type: ignore[list-item]


def test_segments_whose_sum_wraps_around() -> None:
    huge = 2**63 - 32
    rows = [[0, huge, 0, 0], [huge, huge, 0, 0], [0, 64 + 5, 0, 0]]  # 5 elements modulo 2**64
    with pytest.raises(ValueError, match="segments"):
        checks.check_table(np.array(rows, dtype=np.int64), 5, "x")

"""Arrays of other libraries in host memory: read by DLPack where they lie, results NumPy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pydist import QSGD, arrays, ops


class Foreign:
    """An array that has nothing but DLPack."""

    def __init__(self, data: np.ndarray, device: int = 1) -> None:
        self.data, self.device = data, device

    def __dlpack__(self, **options: Any) -> Any:
        return self.data.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0


X = np.random.default_rng(0).standard_normal(1001).astype(np.float32)


@pytest.mark.parametrize("x", [X, X.astype(np.float16), X[::2], X[:0]], ids=str)
def test_read(x: np.ndarray) -> None:
    for kernel in (arrays.pack_signs, lambda x: arrays.quantize(x, QSGD(4))):
        found = kernel(Foreign(x))
        assert type(found) is np.ndarray
        np.testing.assert_array_equal(found, kernel(x))


def test_written_where_it_may_be() -> None:
    """NumPy's own arrays beside it; a read-only one is refused."""
    momentum, expected = np.zeros_like(X), np.zeros_like(X)
    votes = arrays.lion_pack_(Foreign(X), momentum, beta1=0.9, beta2=0.99)
    np.testing.assert_array_equal(votes, arrays.lion_pack_(X, expected, beta1=0.9, beta2=0.99))
    np.testing.assert_array_equal(momentum, expected)
    frozen = X.copy()
    frozen.flags.writeable = False
    with pytest.raises((ValueError, BufferError), match="read-?only"):
        arrays.lion_pack_(Foreign(X), Foreign(frozen), beta1=0.9, beta2=0.99)


def test_not_from_another_device() -> None:
    with pytest.raises(TypeError, match="x must be a tensor or an array, got Foreign"):
        ops.pack_signs(Foreign(X, device=2))


def test_only_kernels_are_listed() -> None:
    for module in (ops, arrays):
        assert set(dir(module)) == set(module.__all__)
        assert all(callable(getattr(module, name)) for name in dir(module))

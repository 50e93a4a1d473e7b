"""Other libraries, as they are released, on two gloo ranks. ``make integrations`` installs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from libraries import found, needs

from pydist import arrays

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(300)]


@pytest.mark.parametrize("library", ["lightning", "transformers", "accelerate"])
def test_training(library: str, tmp_path: Path) -> None:
    """Bits equal to plain DDP without loss; resuming equals not stopping, votes too."""
    first, second = found(library, tmp_path)
    for one in (first, second):
        assert one["raw"] == one["plain"]
        assert one["resumed"] == one["through"] != one["plain"]
        assert one["lion_resumed"] == one["lion"] != one["plain"]
        assert one["ratio"] > 5 and one["logged"]
    for name in ("plain", "through", "lion"):
        assert first[name] == second[name], f"{name}: replicas differ"
    if library == "transformers":
        assert first["lion_ratio"] > 20 and first["adapters"] > 3


def test_torchft(tmp_path: Path) -> None:
    """Close to the exact sum, the same bits on both replicas, again after a new quorum."""
    first, second = found("torchft", tmp_path)
    assert first["bits"] == second["bits"] and first["bits"][:2] == first["bits"][2:]
    assert all(error < 0.02 for error, _ in first["bits"])
    assert first["ints"] == second["ints"] == [3]


def test_jax() -> None:
    """Arrays of JAX are read where they lie, bfloat16 too; nothing writes into them."""
    needs("jax")
    import jax
    import jax.numpy as jnp

    x = np.random.default_rng(0).standard_normal(10_001).astype(np.float32)
    array = jnp.asarray(x)
    assert np.asarray(array).ctypes.data == array.unsafe_buffer_pointer()  # what is read
    for given in (array, array.astype(jnp.bfloat16)):
        payload = arrays.pack_signs(given)
        assert type(payload) is np.ndarray
        np.testing.assert_array_equal(payload, arrays.pack_signs(x))
    momentum = np.zeros_like(x)
    arrays.lion_pack_(array, momentum, beta1=0.9, beta2=0.99)
    assert momentum.any()
    with pytest.raises(ValueError, match="momentum is read-only"):
        arrays.lion_pack_(array, array, beta1=0.9, beta2=0.99)
    print("jax", jax.__version__)

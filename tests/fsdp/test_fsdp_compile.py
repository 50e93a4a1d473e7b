"""FSDP2 models under torch.compile: as plain compiled ones, and as ones that are not compiled."""

from __future__ import annotations

import pytest
import ranks_fsdp_compile as cases
from ranks import Worlds

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(120)]


@pytest.mark.parametrize(
    ("how", "backend", "late"),
    [
        ("blocks, then sharded", "eager", False), ("sharded, then blocks", "aot_eager", True),
        ("wrapped blocks", "eager", True), ("sharded, wrapped blocks", "eager", False),
        ("whole", "eager", False), ("wrapped whole", "aot_eager", True),
    ],
)  # fmt: skip
def test_compiled_is_uncompiled(worlds: Worlds, how: str, backend: str, late: bool) -> None:
    worlds(2).run(cases.compiled, how, backend, True, late)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["blocks, then sharded", "wrapped whole"])
def test_inductor(worlds: Worlds, how: str) -> None:
    """Its kernels round otherwise than eager ones: equal to plain FSDP2 that is compiled alike."""
    worlds(2).run(cases.compiled, how, "inductor", False, True, timeout=500)

"""torch's modes belong to threads: none of a caller's changes a call, or outlives it."""

from __future__ import annotations

import pytest
import ranks_modes as cases
from ranks import Worlds

pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize("mode", cases.MODES)
def test_collectives_under_a_mode(worlds: Worlds, mode: str) -> None:
    worlds(2).run(cases.under_mode, mode)

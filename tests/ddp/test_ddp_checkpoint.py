"""The DDP hook's state in checkpoints: the same world bit for bit, other worlds without a loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import ranks_ddp_checkpoint as cases
from ranks import Worlds
from test_collectives import same_on_all_ranks

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(180)]


@pytest.mark.parametrize("how", ["file", "dcp"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_resume(worlds: Worlds, tmp_path: Path, ranks: int, how: str) -> None:
    same_on_all_ranks(worlds(ranks).run(cases.resumed, str(tmp_path), how))


@pytest.mark.parametrize("how", ["file", "dcp"])
@pytest.mark.parametrize("algorithm", ["two_phase", "all_gather"])
def test_other_world_size(worlds: Worlds, tmp_path: Path, how: str, algorithm: str) -> None:
    """4 ranks, then 2, then 3: what was not sent is what will be sent."""
    left = None
    for old, ranks in ((None, 4), (4, 2), (2, 3)):
        args = (str(tmp_path), old, how, algorithm)
        results = worlds(ranks).run(cases.resharded, *args)
        if left is not None:
            for name, wanted in left.items():
                found = results[0]["found"][name]
                assert wanted.any()
                # Each element was rounded a few times in float32, at the size of its parts.
                bound = 1e-6 * np.abs(wanted).max()
                assert np.abs(found - wanted).max() <= bound, name
        left = results[0]["left"]

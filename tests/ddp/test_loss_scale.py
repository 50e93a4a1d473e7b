"""The loss scale that residuals follow, read without waiting for a device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import emulated
import pytest
import stand_in
import torch

from pydist.ddp.loss_scale import LossScale

pytestmark = [*emulated.MARKS]


class Scaler:
    """A GradScaler whose scale is on a device."""

    def __init__(self, scale: float) -> None:
        self._scale = stand_in.OnDevice(torch.tensor(scale))

    def get_scale(self) -> float:
        return float(self._scale)


def test_a_scale_that_was_copied_is_not_waited_for() -> None:
    with stand_in.device() as counts:
        scaler: Any = Scaler(1024.0)
        scale = LossScale(scaler)
        with counts.counting():
            scale.copy_ahead()
            assert scale.value() == 1024.0
        assert not counts.waits, counts.lines
        with counts.counting():
            assert scale.value() == 1024.0  # nothing was copied
        assert counts.waits


def test_a_scale_that_has_changed_since_is_read() -> None:
    with stand_in.device():
        scaler: Any = Scaler(1024.0)
        scale = LossScale(scaler)
        scale.copy_ahead()
        scaler._scale = stand_in.OnDevice(torch.tensor(512.0))
        assert scale.value() == 512.0


@pytest.mark.parametrize("held", [{}, {"_scale": None}, {"_scale": torch.tensor(8.0)}])
def test_a_scale_on_the_host_is_read_as_it_is(held: dict[str, Any]) -> None:
    scaler: Any = SimpleNamespace(get_scale=lambda: 8.0, **held)
    scale = LossScale(scaler)
    scale.copy_ahead()
    assert scale.value() == 8.0

"""Process groups below a user's: what NCCL is told of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pydist.transport import groups


class Group:
    """A group with one backend, for CUDA, or none."""

    def __init__(self, options: Any) -> None:
        self._options = options

    def _get_backend(self, device: torch.device) -> Any:
        assert device.type == "cuda"
        if self._options is None:
            raise RuntimeError("no backend")
        return SimpleNamespace(options=self._options)


def test_subgroups_are_not_split_off() -> None:
    """A split takes all ranks of the world, and pydist's groups are made by their members alone."""
    options = SimpleNamespace(split_from="the default communicator")
    groups._forget_split(Group(options))  # type: ignore[arg-type]
    assert options.split_from is None


@pytest.mark.parametrize("options", [None, SimpleNamespace()])
def test_other_backends_are_left_alone(options: Any) -> None:
    groups._forget_split(Group(options))  # type: ignore[arg-type]

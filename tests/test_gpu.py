"""Kernels on a CUDA device; `make test-gpu`. Without a device they are reported as skipped."""

from __future__ import annotations

import pytest

from pydist import _C, cli

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        _C.CUDA_BUILD is None or _C.cuda.device_count() == 0, reason="no CUDA build or no device"
    ),
]


def test_every_kernel_equals_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check"]) == 0, capsys.readouterr().out
    assert "cuda" in capsys.readouterr().out

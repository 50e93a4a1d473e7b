"""The loss scale of a GradScaler, read without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LossScale:
    """Whose scale the residuals follow.

    ``GradScaler.get_scale()`` waits for the device. Before a forward the scale is what it is in the
    backward that follows, so it is copied then; the copy has arrived long before it is read.

    Args:
        scaler: The scaler.
    """

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self._scaler: Any = scaler
        self._copy: tuple[Tensor, int, Tensor, torch.cuda.Event] | None = None

    def copy_ahead(self) -> None:
        """Starts to copy the scale to the host; of a scale that is there already nothing."""
        scale = getattr(self._scaler, "_scale", None)
        if not isinstance(scale, Tensor) or not scale.is_cuda:
            return
        here = torch.empty((), dtype=scale.dtype, device="cpu", pin_memory=True)
        here.copy_(scale, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(scale.device))
        self._copy = scale, scale._version, here, arrived

    def value(self) -> float:
        """The scale; waits for the device only where it was changed since it was copied."""
        copy, self._copy = self._copy, None
        if copy is not None:
            scale, version, here, arrived = copy
            if scale is self._scaler._scale and scale._version == version:
                if not arrived.query():
                    arrived.synchronize()
                return float(here)
        return float(self._scaler.get_scale())

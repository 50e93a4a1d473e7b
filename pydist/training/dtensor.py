"""Parameters that may be DTensors, without importing what defines these."""

from __future__ import annotations

import sys
from typing import Any, cast

from torch import Tensor


def is_sharded(x: Tensor) -> bool:
    """Whether it is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local_of(x: Tensor) -> Tensor:
    """A DTensor's part on this rank; another tensor itself."""
    return cast(Any, x)._local_tensor if is_sharded(x) else x

"""What a benchmark's row is made of, and what the rows of one size share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from pydist.bench import rivals
from pydist.bench.rivals import Rival
from pydist.bench.timing import Buffers

BITS = "bits"  # in place of a dtype: the kernel sees payloads alone
COMPILED = "torch.compile"  # begins the name of a rival that is compiled first, for seconds


@dataclass(frozen=True)
class Case:
    """One kernel on one kind of input.

    Attributes:
        kernel: Its name in ``pydist.ops``.
        variant: What distinguishes cases of one kernel.
        dtype: dtype of the gradient, parameter or result; ``"bits"`` where there is none.
        numel: Elements.
        bytes: Least bytes a call must move (time is at least bytes over bandwidth).
        make: A fresh set of buffers.
        run: The kernel, on such a set.
        rivals: What stands beside it.
        reads_back: The call waits for a result of the device, so that a CUDA graph can't hold it.
    """

    kernel: str
    variant: str
    dtype: str
    numel: int
    bytes: float
    make: Callable[[], Buffers]
    run: Callable[[Buffers], Tensor | None]
    rivals: list[Rival] = field(default_factory=list)
    reads_back: bool = False

    @property
    def name(self) -> str:
        """Kernel and variant."""
        return f"{self.kernel} ({self.variant})" if self.variant else self.kernel

    @property
    def compiled(self) -> list[str]:
        """Names of the rivals under torch.compile."""
        return [rival.name for rival in self.rivals if rival.name.startswith(COMPILED)]


@dataclass(frozen=True)
class Maker:
    """Makes the buffers of one size.

    Attributes:
        numel: Elements, a multiple of 32.
        device: ``"cpu"`` or ``"cuda"``.
        dtypes: Names of the dtypes to cover.
        compiled: Whether torch.compile is a rival.
    """

    numel: int
    device: str
    dtypes: tuple[str, ...]
    compiled: bool = False

    def normal(self, dtype: torch.dtype) -> Tensor:
        """Normal numbers of the case's length."""
        return torch.randn(self.numel, device=self.device).to(dtype)

    def votes(self, ranks: int) -> Tensor:
        """Random votes, uint8 [ranks, bytes]."""
        shape = (ranks, self.numel // 8)
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)

    def room(self, size: int) -> Tensor:
        """Memory for a result, uint8 [size], written once so that its pages are there."""
        return torch.zeros(size, dtype=torch.uint8, device=self.device)

    def planes(self, count: int) -> Tensor:
        """Memory for bit planes, uint8 [count, bytes], likewise."""
        return self.room(count * self.numel // 8).view(count, -1)

    def values(self, dtype: torch.dtype) -> Tensor:
        """Memory for values of the case's length, likewise."""
        return torch.zeros(self.numel, dtype=dtype, device=self.device)

    def with_compiled(
        self,
        others: list[Rival],
        function: Callable[..., Tensor | None],
        arguments: Callable[[Buffers], tuple[Tensor, ...]],
        what: str = "",
    ) -> list[Rival]:
        """The rivals, and a function under torch.compile where it is asked for."""
        if not self.compiled:
            return others
        lazy = _Compiled(function)
        name = f"{COMPILED}{what}"
        return [*others, Rival(name, lambda s: lazy.function(*arguments(s)))]


class _Compiled:
    """Compiles at the first call."""

    def __init__(self, function: Callable[..., Tensor | None]) -> None:
        self._plain = function

    @cached_property
    def function(self) -> Callable[..., Tensor | None]:
        return rivals.compiled(self._plain)

"""Natural compression (Horváth et al., arXiv 1905.10988): values become powers of two.

A codec of pydist's own protocol, in Python alone: a sign and an exponent, one byte per element. A
value between two powers of two becomes one of them at random, so that its expectation stays;
the variance is at most 1/8 of the squared value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pydist

BIAS = 64
"""Added to exponents: codes 1 … 127 are 2**-63 … 2**63, and 0 is zero."""


@dataclass(frozen=True)
class Natural(pydist.Codec):
    """Signs and exponents of 8 bits in all.

    Attributes:
        stochastic: Round at random, without bias; otherwise to the nearer power of two.
    """

    stochastic: bool = True

    contracts = True  # |x - C(x)| <= |x| / 3 to nearest; variance 1/8 at random

    def payload_bytes(self, n: int) -> int:
        """One byte per element."""
        return n

    def encode(self, x: Tensor, draws: Any) -> Tensor:
        """Codes of float32 [n]: uint8 [n]."""
        # x = ± m * 2**e with m in [0.5, 1): between 2**(e - 1) and 2**e.
        mantissa, exponent = torch.frexp(x.abs())
        # P(up) = (|x| - 2**(e - 1)) / 2**(e - 1) = 2 m - 1
        threshold = draws.uniform() if self.stochastic else 0.5
        up = (2 * mantissa - 1 > threshold).int()
        code = (exponent - 1 + up + BIAS).clamp(0, 127)
        code[x == 0] = 0
        return (code | (x.signbit().int() << 7)).to(torch.uint8)

    def decode(self, payload: Tensor, n: int) -> Tensor:
        """float32 [n] of codes."""
        code = payload.int() & 127
        magnitude = torch.ldexp(torch.ones(n, device=payload.device), code - BIAS)
        magnitude[code == 0] = 0.0
        return torch.where(payload > 127, -magnitude, magnitude)


def main() -> None:
    """What eight workers make of their gradients, in one process."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(100_000, generator=generator) for _ in range(8)]
    exact = torch.stack(gradients).mean(0)
    for codec in (Natural(), Natural(stochastic=False), pydist.BlockInt(8), pydist.QSGD(8)):
        mean = pydist.simulate.all_reduce(gradients, codec)
        print(f"{codec}: relative error {float((mean - exact).norm() / exact.norm()):.4f}")


if __name__ == "__main__":
    main()

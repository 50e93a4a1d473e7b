"""A plain Triton kernel beside ``pack_signs``: what twenty lines give. Imported where it runs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BYTES = 256  # a program packs as many


@triton.jit
def _pack(x, out, n, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    byte = tl.program_id(0) * BYTES + tl.arange(0, BYTES)
    bit = tl.arange(0, 8)
    at = byte[:, None] * 8 + bit[None, :]
    votes = tl.load(x + at, mask=at < n, other=-1.0) >= 0
    packed = tl.sum(votes.to(tl.int32) << bit[None, :], axis=1)
    tl.store(out + byte, packed.to(tl.uint8), mask=byte * 8 < n)


def pack(x: Tensor) -> Tensor:
    """Bit i % 8 of byte i // 8 is whether element i is at least zero; uint8."""
    out = torch.empty(-(-x.numel() // 8), dtype=torch.uint8, device=x.device)
    _pack[(triton.cdiv(len(out), _BYTES),)](x, out, x.numel(), BYTES=_BYTES)
    return out

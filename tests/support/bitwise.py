"""Bit identity, for every test; a failure names element, byte and both values."""

from __future__ import annotations

from pydist.selfcheck import assert_same_bits

__all__ = ["assert_same_bits"]

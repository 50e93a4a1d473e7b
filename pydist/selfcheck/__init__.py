"""Kernels against the reference, bit by bit: ``pydist check``, and what the tests share with it.

A :class:`Runner` calls the kernels of one backend on NumPy arrays; a ``check_*`` function calls one
kernel and its reference on the same input and raises :class:`DifferenceError` where a bit differs;
:data:`KERNELS` says on which inputs ``pydist check`` does so.
"""

from __future__ import annotations

from pydist.selfcheck.backends import HostMemory, KernelRunner, Memory, runners
from pydist.selfcheck.bits import Bits, DifferenceError, assert_same_bits, storage_of, store, widen
from pydist.selfcheck.cases import KERNELS, check_all
from pydist.selfcheck.compare import (
    check_count_votes,
    check_lion_apply,
    check_lion_pack,
    check_majority_vote,
    check_pack_signs,
    check_unpack_votes,
)
from pydist.selfcheck.runner import Runner

__all__ = [
    "KERNELS",
    "Bits",
    "DifferenceError",
    "HostMemory",
    "KernelRunner",
    "Memory",
    "Runner",
    "assert_same_bits",
    "check_all",
    "check_count_votes",
    "check_lion_apply",
    "check_lion_pack",
    "check_majority_vote",
    "check_pack_signs",
    "check_unpack_votes",
    "runners",
    "storage_of",
    "store",
    "widen",
]

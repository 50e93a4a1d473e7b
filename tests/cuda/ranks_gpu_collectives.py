"""What ranks do in test_gpu_collectives.py: collectives of tensors on one device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import ranks_codecs
import ranks_hierarchy
import ranks_parts
import torch.distributed as dist

from pydist import QSGD, BlockInt, Raw, Sign, Ternary, TopK
from pydist.collectives import grid as hierarchy
from pydist.transport.communicator import Communicator, communicator, own_communicator

OF_EACH_KIND = [
    BlockInt(4), QSGD(4, entropy="elias"), Raw(), Ternary(), TopK(0.1, block=64), Sign(None),
]  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")


@contextmanager
def group_of(ranks: int, on_device: bool) -> Iterator[Any]:
    """A new group of all ranks, over gloo.

    Args:
        ranks: How many they are.
        on_device: Messages stay on the device and calls run in the calling thread, as with NCCL,
            which refuses two ranks on one device. Gloo carries such messages as well.
    """
    group = dist.new_group(list(range(ranks)), backend="gloo")
    comm = communicator(group)
    comm.device_side = on_device
    yield group
    assert comm.traffic.calls and bool(comm._threads) != on_device, "calls went another way"
    dist.destroy_process_group(group)


def every_codec(rank: int, ranks: int, device: str, on_device: bool) -> list[bytes]:
    """All collectives with every codec, in one chunk and in many, as one process simulates them."""
    results = []
    for number, dtype in enumerate(DTYPES):
        codecs = ranks_codecs.CODECS[number :: len(DTYPES)]
        for n, chunk in ((1001, None), (2003, 1000)):
            with group_of(ranks, on_device) as group:
                results += ranks_codecs.equals_simulation(
                    rank, ranks, codecs, n, chunk, dtype, device, group
                )
    return results


def votes(rank: int, ranks: int, device: str, on_device: bool) -> None:
    """Votes, means, shares and gathered signs."""
    with group_of(ranks, on_device) as group:
        ranks_codecs.votes(rank, ranks, [0, 33, 5003], 500, device, group)


def not_finite(rank: int, ranks: int, device: str, on_device: bool) -> None:
    """One NaN makes everything NaN on all ranks, and nothing of the next call."""
    with group_of(ranks, on_device) as group:
        ranks_codecs.not_finite(rank, ranks, OF_EACH_KIND, device, group)


def in_flight(rank: int, ranks: int, device: str, on_device: bool) -> None:
    """Calls of all kinds at once, waited for in reverse."""
    with group_of(ranks, on_device) as group:
        ranks_codecs.in_flight(rank, ranks, device, group)


def two_levels(rank: int, ranks: int, device: str, on_device: bool) -> list[bytes]:
    """Summed in a node, compressed across nodes, gathered in the node."""

    def own(group: Any, kind: str) -> Communicator:
        made = own_communicator(group, kind)
        made.device_side = on_device
        return made

    with mock.patch.object(hierarchy, "own_communicator", own):
        found = ranks_hierarchy.equals_simulation(rank, ranks, 2, [1003], ["float32"], None, device)
        few = ([1003], None, OF_EACH_KIND, device)
        ranks_parts.scatters_equal_simulation(rank, ranks, 2, *few)
        return found + ranks_parts.gathers_equal_one_level(rank, ranks, 2, *few)

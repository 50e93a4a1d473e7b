"""What ranks do in test_behind.py: calls that are agreed on behind their back, as with NCCL."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import pydist
from pydist.errors import MismatchError, PydistError
from pydist.transport.communicator import Call, Communicator, communicator


def on_device(ranks: int) -> Communicator:
    """A communicator whose messages stay on the device; gloo carries them."""
    comm = communicator(dist.new_group(list(range(ranks)), backend="gloo"))
    comm.device_side = True
    return comm


def known(step: int, **fields: object) -> Call:
    return Call("call", fields, step, known=True)


def equal_calls(rank: int, ranks: int) -> None:
    """Each call looks at the headers of the one before; the last ones are looked at when asked."""
    comm = on_device(ranks)
    for step in range(3):
        comm.agree(known(step, numel=7))
        assert comm._behind is not None and comm._behind.call.step == step
    comm.catch_up()
    assert comm._behind is None
    comm.agree(Call("another", {}, 3))  # not known: agreed on at once
    assert comm._behind is None


def a_difference(rank: int, ranks: int) -> str:
    """It is raised by the next call, on every rank, and ends the process group."""
    comm = on_device(ranks)
    comm.agree(known(0, numel=7))
    comm.agree(known(1, numel=7 + (rank == 1)))
    with pytest.raises(MismatchError) as caught:
        comm.agree(known(2, numel=7))
    with pytest.raises(
        PydistError, match="earlier call on this process group failed: call, step 1"
    ):
        comm.run(lambda: None)
    return str(caught.value)


def a_problem(rank: int, ranks: int) -> str:
    """A rank that can't take part says so at once; the others notice with their next call."""
    comm = on_device(ranks)
    problem = "no memory" if rank == 1 else None
    call = Call("call", {"numel": 7}, 0, problem, known=True)
    with pytest.raises(PydistError) as caught:
        comm.agree(call)
        comm.catch_up()
    return str(caught.value)


def one_behind(rank: int, ranks: int) -> None:
    """Collectives of the public interface are agreed on before data moves, as ever."""
    group = dist.new_group(list(range(ranks)), backend="gloo")
    communicator(group).device_side = True
    x = torch.ones(10)
    with pytest.raises(MismatchError, match="numel"):
        pydist.all_reduce(x if rank else x[:9], pydist.Raw(), group=group)
    pydist.all_reduce(x, pydist.Raw(), group=group)
    assert x.tolist() == [1.0] * 10

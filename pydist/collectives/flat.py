"""Compressed collectives over any process group, any backend, any length."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from pydist.codecs import Codec, Raw
from pydist.collectives.grid import Grid, HierarchicalCall, Levels, counter_of_grid, grid
from pydist.collectives.hierarchical import AllReduce, Plan
from pydist.encoding.choose import (
    all_gather_coder,
    all_reduce_coder,
    check_codec,
    reduce_scatter_coder,
)
from pydist.errors import PydistError
from pydist.formats import wire
from pydist.kernels import checks
from pydist.kernels.torch_tensors import check_storage, dense_of, written
from pydist.transport.coder import Coder, Worker
from pydist.transport.communicator import Call, Communicator, communicator, counter_of
from pydist.transport.exchange import ALL_GATHER, REDUCE_SCATTER, Exchange, Route, choose_algorithm


class Work:
    """A collective under way, as ``torch.distributed`` hands it out with ``async_op=True``."""

    def __init__(
        self, exchange: Exchange | HierarchicalCall, tensor: Tensor, dense: Tensor
    ) -> None:
        self._exchange, self._tensor = exchange, tensor
        self._dense: Tensor | None = dense

    def is_completed(self) -> bool:
        """Whether the result is there."""
        return self._exchange.future.done()

    def wait(self, timeout: float | None = None) -> Tensor:
        """Waits for the result (on CUDA: makes the current stream wait).

        Args:
            timeout: Seconds; ``None`` waits as long as the process group does.

        Returns:
            The tensor that was given, now holding the result.

        Raises:
            PydistError: The call failed; on every rank where ranks disagree.
            TimeoutError: It took longer than ``timeout``.
        """
        self._exchange.wait(timeout)
        if self._dense is not None:
            written(self._tensor.detach(), self._dense)
            self._dense = None
        return self._tensor


def _step_of(step: int | Tensor) -> int:
    value: Any = step.item() if isinstance(step, Tensor) else step
    number = wire.as_int("step", value)
    checks.check_step(number)
    return number


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raises unless a tensor is one that codecs take."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):  # a DTensor's memory is elsewhere
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got layout {tensor.layout}")
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} must be on cpu or cuda, got {tensor.device}")
    check_storage(name, tensor)


def _check_pair(output: Tensor, data: Tensor, whole: str, ranks: int) -> None:
    """Raises unless ``whole``, of output and input, has the other's elements for every rank."""
    check_tensor("output", output)
    check_tensor("input", data)
    if output.device != data.device:
        raise ValueError(
            f"output is on {output.device}, input on {data.device}: must be one device"
        )
    sizes = {"output": output.numel(), "input": data.numel()}
    part = "input" if whole == "output" else "output"
    if sizes[whole] != ranks * sizes[part]:
        raise ValueError(
            f"{whole} must have {ranks} x {sizes[part]} elements ({part} for each rank), "
            f"got {sizes[whole]}"
        )


def _check_apart(large: Tensor, small: Tensor, rank: int) -> None:
    """Raises where tensors overlap, but for ``small`` as this rank's place in ``large``."""
    begin, at = large.data_ptr(), small.data_ptr()
    size = small.numel() * small.element_size()
    end = begin + large.numel() * large.element_size()
    in_place = small.dtype == large.dtype and at == begin + rank * size
    if size and at < end and begin < at + size and not in_place:
        raise ValueError("output and input overlap in memory")


@torch.inference_mode(False)  # what a call makes outlives the caller's modes
def _start(
    name: str,
    comm: Communicator,
    step: int | Tensor | None,
    fields: dict[str, Any],
    prepare: Callable[[Worker], tuple[Coder, Tensor, Tensor]],
    route: Route | str,
    async_op: bool,
) -> Tensor | Work:
    """Submits a collective.

    Args:
        name: What the user called.
        comm: The group's communicator.
        step: As the user gave it.
        fields: What must be equal on all ranks; ``prepare`` may add to it.
        prepare: Checks the arguments; returns the coder, the tensor that the user gave for the
            result, and the dense one that the coder writes.
        route: See :class:`pydist.transport.exchange.Exchange`.
        async_op: Return at once.
    """
    number, comm.step = comm.step, comm.step + 1  # counted on all ranks, whatever comes of it
    try:
        number = number if step is None else _step_of(step)
        coder, result, dense = prepare(
            Worker(comm.rank, comm.world_size, number, torch.get_num_threads())
        )
        exchange = Exchange(comm, coder, Call(name, fields, number), route, dense.device)
    except Exception as error:
        # The other ranks are about to wait for this one: they are told, then this one raises.
        refuse(comm, Call(name, {}, number, problem=str(error)))
        raise
    comm.submit(exchange)
    work = Work(exchange, result, dense)
    return work if async_op else work.wait()


@torch.inference_mode(False)
def _start_hierarchical(
    name: str,
    where: Grid,
    step: int | Tensor | None,
    fields: dict[str, Any],
    prepare: Callable[[], tuple[Plan, Tensor]],
    async_op: bool,
) -> Tensor | Work:
    """Submits an all-reduce on two levels; ``prepare`` returns the plan and the user's tensor."""
    number, where.step = where.step, where.step + 1
    try:
        number = number if step is None else _step_of(step)
        plan, result = prepare()
        call = HierarchicalCall(where, name, fields, number, AllReduce(where, plan))
    except Exception as error:
        where.start(HierarchicalCall(where, name, {}, number, None, str(error)))
        raise
    where.start(call)
    work = Work(call, result, plan.tensor)
    return work if async_op else work.wait()


def all_reduce(
    tensor: Tensor,
    codec: Codec,
    *,
    op: str = "mean",
    group: dist.ProcessGroup | Levels | None = None,
    inner: Codec | None = None,
    algorithm: str = "auto",
    seed: int = 0,
    step: int | Tensor | None = None,
    ties: str = "hash",
    async_op: bool = False,
) -> Tensor | Work:
    """Reduces a tensor over all ranks, in place, in compressed form.

    1. Each rank encodes its tensor; all ranks agree on what they are about to do.
    2. Shard i of every rank's bytes goes to rank i.
    3. Rank i decodes them, sums in float32 in rank order, divides once for a mean, and encodes the
       result again (votes: counts or the majority; ``Ternary``: integer sums, without loss).
    4. The reduced shards go to everyone and are decoded; all ranks decode the same bytes, so all
       hold the same bits.

    The result does not depend on the algorithm. A NaN or an infinity on any rank, or a sum beyond
    float32, makes the whole result NaN on every rank.

    **On two levels**, for nodes with fast links inside and slow ones between them, ``group`` is a
    2-D ``DeviceMesh`` with the dimensions (across nodes, inside a node), as FSDP's hybrid sharding
    has it, or a tuple of this rank's two groups in that order. The ranks of a node sum their
    tensors with ``inner``, each a share of it, in float32; the shares are reduced across nodes with
    ``codec``; the node's ranks put them together, bit for bit. The result is what the nodes' sums
    give as ranks of a flat call: a mean divides once, by the number of all ranks; in a vote each
    node has one voice, the sign of its sum, and sums and means of ``Sign(scale=None)`` are those of
    the nodes' voices. Each rank sends 1 / (ranks of a node) of the compressed bytes between nodes.

    Args:
        tensor: float32, float16 or bfloat16, any shape and length, CPU or CUDA; overwritten.
        codec: Such as ``pydist.QSGD(bits=4)`` or ``pydist.Sign(scale=None)``.
        op: ``"mean"`` or ``"sum"`` of what the ranks encoded; ``"vote"``, with
            ``Sign(scale=None)``: ±1, the sign most ranks have.
        group: Process group, or two levels of them; default the world. The first call on a group
            makes groups of pydist's own, so all its ranks must make it.
        inner: The codec inside a node, with two levels; default ``Raw()``: the tensor's own dtype.
        algorithm: ``"two_phase"``; ``"all_gather"``: everyone gets all bytes and does step 3
            itself; or the faster one, by sizes and by the round trip and the rate that were
            measured when the group's connections were made: ``"auto"``. On two levels: that
            across nodes.
        seed: Seed of stochastic rounding and the tie hash, 0 … 2**32 - 1.
        step: Step of the random draws, the tie hash and the zero rule, an int or a tensor of one;
            ``None`` takes the number of the group's calls so far.
        ties: ``"hash"``, ``"zero"`` (result 0, one more bit comes back) or ``"positive"``; for
            votes.
        async_op: Return at once, with a :class:`Work`.

    Returns:
        The tensor, or a :class:`Work` whose ``wait()`` returns it.

    Raises:
        TypeError: Tensor or codec is of another type; the other ranks raise PydistError.
        ValueError: Another argument is out of range, ``op`` does not go with the codec, there is no
            process group, or the two levels do not form a grid (on every rank).
        MismatchError: Ranks disagree (length, dtype, options, step); raised on every rank.
        PydistError: Another rank has a problem, or the exchange failed.
    """
    fields: dict[str, Any] = {
        "codec": repr(codec), "op": op, "ties": ties, "seed": seed, "algorithm": algorithm,
    }  # fmt: skip
    options: dict[str, Any] = {"op": op, "ties": ties, "seed": seed}

    def plan() -> tuple[Plan, Tensor]:
        check_tensor("tensor", tensor)
        dense = dense_of("tensor", tensor.detach())
        check_codec(inside)
        coder = all_reduce_coder(dense.view(-1)[:0], codec, Worker(0, 1, 0), **options)
        choose_algorithm(algorithm, coder, 1)
        fields.update(inner=repr(inside), numel=tensor.numel(), dtype=str(tensor.dtype))
        return Plan(dense, codec, inside, options, algorithm, torch.get_num_threads()), tensor

    if isinstance(group, DeviceMesh | tuple):
        inside = Raw() if inner is None else inner
        where = grid(group, _device_of(tensor))
        return _start_hierarchical("all_reduce", where, step, fields, plan, async_op)

    def prepare(worker: Worker) -> tuple[Coder, Tensor, Tensor]:
        if inner is not None:
            raise ValueError(f"inner={inner} needs a group of two levels: a 2-D mesh or a tuple")
        check_tensor("tensor", tensor)
        dense = dense_of("tensor", tensor.detach())
        coder = all_reduce_coder(dense, codec, worker, op=op, ties=ties, seed=seed)
        fields.update(numel=tensor.numel(), dtype=str(tensor.dtype))
        return coder, tensor, dense

    comm = communicator(group, _device_of(tensor))
    return _start("all_reduce", comm, step, fields, prepare, algorithm, async_op)


def reduce_scatter(
    output: Tensor,
    input: Tensor,
    codec: Codec,
    *,
    op: str = "mean",
    group: dist.ProcessGroup | None = None,
    seed: int = 0,
    step: int | Tensor | None = None,
    async_op: bool = False,
) -> Tensor | Work:
    """Reduces over all ranks, each rank getting its share of the result.

    Every rank encodes its input and sends share i to rank i, which decodes, sums in float32 in rank
    order and divides once for a mean. Nothing is encoded again. Every share has blocks of its own,
    whatever its length. A NaN or an infinity on any rank makes all shares NaN.

    Args:
        output: float32, float16 or bfloat16, any shape; overwritten with this rank's share.
        input: The same number of elements for every rank, one behind the other; may be of
            another of these dtypes. ``output`` may be this rank's share of it.
        codec: Such as ``pydist.QSGD(bits=4)``.
        op: ``"mean"`` or ``"sum"`` of what the ranks encoded; ``"vote"``, with
            ``Sign(scale=None)``: ±1, the sign most ranks have.
        group: Process group; default the world.
        seed: Seed of stochastic rounding and the tie hash, 0 … 2**32 - 1.
        step: As in :func:`all_reduce`.
        async_op: Return at once, with a :class:`Work`.

    Returns:
        The output, or a :class:`Work` whose ``wait()`` returns it.

    Raises:
        TypeError: A tensor or the codec is of another type; the other ranks raise PydistError.
        ValueError: Another argument is out of range, the lengths do not fit, or the tensors
            overlap otherwise.
        MismatchError: Ranks disagree; raised on every rank.
        PydistError: Another rank has a problem, or the exchange failed.
    """
    comm = communicator(group, _device_of(output))
    fields: dict[str, Any] = {"codec": repr(codec), "op": op, "seed": seed}

    def prepare(worker: Worker) -> tuple[Coder, Tensor, Tensor]:
        _check_pair(output, input, "input", comm.world_size)
        dense, data = dense_of("output", output.detach()), input.detach().contiguous()
        _check_apart(data, dense, comm.rank)
        coder = reduce_scatter_coder(dense, data, codec, worker, op=op, ties="hash", seed=seed)
        fields.update(numel=input.numel(), dtype=str(input.dtype), output_dtype=str(output.dtype))
        return coder, output, dense

    return _start("reduce_scatter", comm, step, fields, prepare, REDUCE_SCATTER, async_op)


def all_gather(
    output: Tensor,
    input: Tensor,
    codec: Codec,
    *,
    group: dist.ProcessGroup | None = None,
    seed: int = 0,
    step: int | Tensor | None = None,
    async_op: bool = False,
) -> Tensor | Work:
    """Gathers all ranks' tensors in compressed form.

    Every rank encodes its tensor and decodes what all have sent, its own bytes too, so that all
    ranks hold the same bits. A NaN or an infinity on any rank makes everything NaN.

    Args:
        output: float32, float16 or bfloat16, any shape, with room for every rank's tensor, one
            behind the other; overwritten.
        input: The same number of elements on every rank; may be of another of these dtypes, or
            this rank's place in ``output``.
        codec: Such as ``pydist.BlockInt(bits=8)``; ``Sign(scale=None)`` gives ±1.
        group: Process group; default the world.
        seed: Seed of stochastic rounding, 0 … 2**32 - 1.
        step: As in :func:`all_reduce`.
        async_op: Return at once, with a :class:`Work`.

    Returns:
        The output, or a :class:`Work` whose ``wait()`` returns it.

    Raises:
        TypeError: A tensor or the codec is of another type; the other ranks raise PydistError.
        ValueError: Another argument is out of range, the lengths do not fit, or the tensors
            overlap otherwise.
        MismatchError: Ranks disagree; raised on every rank.
        PydistError: Another rank has a problem, or the exchange failed.
    """
    comm = communicator(group, _device_of(output))
    fields: dict[str, Any] = {"codec": repr(codec), "seed": seed}

    def prepare(worker: Worker) -> tuple[Coder, Tensor, Tensor]:
        _check_pair(output, input, "output", comm.world_size)
        dense, data = dense_of("output", output.detach()), input.detach().contiguous()
        _check_apart(dense, data, comm.rank)
        coder = all_gather_coder(dense, data, codec, worker, seed=seed)
        fields.update(numel=input.numel(), dtype=str(input.dtype), output_dtype=str(output.dtype))
        return coder, output, dense

    return _start("all_gather", comm, step, fields, prepare, ALL_GATHER, async_op)


def refuse(comm: Communicator, call: Call) -> None:
    """Takes part in a call's agreement with a problem, so that all ranks raise."""
    with contextlib.suppress(PydistError):
        comm.refuse(call).result()


def _device_of(tensor: Tensor) -> torch.device:
    """Where a tensor is; what is none is refused later, on all ranks."""
    return tensor.device if isinstance(tensor, Tensor) else torch.device("cpu")


def state_dict(group: dist.ProcessGroup | Levels | None = None) -> dict[str, int]:
    """The group's counter of calls, for a checkpoint. Not collective."""
    return {"step": _counter(group)[0]}


def load_state_dict(state: dict[str, int], group: dist.ProcessGroup | Levels | None = None) -> None:
    """Restores the counter that :func:`state_dict` saved; call it on every rank.

    Raises:
        ValueError: ``state`` holds no counter.
    """
    step = state.get("step") if isinstance(state, dict) else None
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"state: expected {{'step': calls so far}}, got {state!r}")
    _counter(group)[0] = step


def _counter(group: dist.ProcessGroup | Levels | None) -> list[int]:
    return counter_of_grid(group) if isinstance(group, DeviceMesh | tuple) else counter_of(group)

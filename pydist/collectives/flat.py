"""Compressed collectives over any process group, any backend, any length."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from pydist.codecs import Codec, Raw
from pydist.collectives.grid import Levels, counter_of_grid, grid
from pydist.collectives.hierarchical import AllReduce, Plan, ReduceScatter
from pydist.collectives.relay import AllGather
from pydist.collectives.work import Work, start, start_on_levels
from pydist.encoding.choose import (
    all_gather_coder,
    all_reduce_coder,
    check_codec,
    reduce_scatter_coder,
)
from pydist.encoding.coders import GatherCoder
from pydist.kernels.torch_tensors import check_storage, dense_of
from pydist.transport.coder import Coder, Worker
from pydist.transport.communicator import communicator, counter_of
from pydist.transport.exchange import ALL_GATHER, REDUCE_SCATTER, choose_algorithm


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


def _dense_pair(output: Tensor, data: Tensor, whole: str, worker: Worker) -> tuple[Tensor, Tensor]:
    """Output and input of a scatter or a gather, checked and contiguous.

    Args:
        output: The output.
        data: The input.
        whole: Which of them, ``"output"`` or ``"input"``, has the other's elements for every rank.
        worker: This rank.
    """
    check_tensor("output", output)
    check_tensor("input", data)
    if output.device != data.device:
        raise ValueError(
            f"output is on {output.device}, input on {data.device}: must be one device"
        )
    sizes = {"output": output.numel(), "input": data.numel()}
    part = "input" if whole == "output" else "output"
    if sizes[whole] != worker.ranks * sizes[part]:
        raise ValueError(
            f"{whole} must have {worker.ranks} x {sizes[part]} elements ({part} for each rank), "
            f"got {sizes[whole]}"
        )
    dense, data = dense_of("output", output.detach()), data.detach().contiguous()
    large, small = (dense, data) if whole == "output" else (data, dense)
    _check_apart(large, small, worker.rank)
    return dense, data


def _check_apart(large: Tensor, small: Tensor, rank: int) -> None:
    """Raises where tensors overlap, but for ``small`` as this rank's place in ``large``."""
    begin, at = large.data_ptr(), small.data_ptr()
    size = small.numel() * small.element_size()
    end = begin + large.numel() * large.element_size()
    in_place = small.dtype == large.dtype and at == begin + rank * size
    if size and at < end and begin < at + size and not in_place:
        raise ValueError("output and input overlap in memory")


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

    def checked() -> Tensor:
        check_tensor("tensor", tensor)
        fields.update(numel=tensor.numel(), dtype=str(tensor.dtype))
        return dense_of("tensor", tensor.detach())

    if isinstance(group, DeviceMesh | tuple):
        where = grid(group, _device_of(tensor))

        def stages(worker: Worker) -> tuple[AllReduce, Tensor, Tensor]:
            dense, inside = checked(), _inner_of(inner, fields)
            coder = all_reduce_coder(dense.view(-1)[:0], codec, Worker(0, 1, 0), **options)
            choose_algorithm(algorithm, coder, 1)
            plan = Plan(dense, codec, inside, options, worker.threads)
            return AllReduce(where, plan, algorithm), tensor, dense

        return start_on_levels("all_reduce", where, step, fields, stages, async_op)

    def prepare(worker: Worker) -> tuple[Coder, Tensor, Tensor]:
        _check_one_level(inner)
        dense = checked()
        return all_reduce_coder(dense, codec, worker, **options), tensor, dense

    comm = communicator(group, _device_of(tensor))
    return start("all_reduce", comm, step, fields, prepare, algorithm, async_op)


def _inner_of(inner: Codec | None, fields: dict[str, Any]) -> Codec:
    """The codec inside a node, checked, and noted among what must be equal on all ranks."""
    inside = Raw() if inner is None else inner
    check_codec(inside)
    fields["inner"] = repr(inside)
    return inside


def _check_one_level(inner: Codec | None) -> None:
    """Raises ValueError where a codec inside nodes was given, and no nodes."""
    if inner is not None:
        raise ValueError(f"inner={inner} needs a group of two levels: a 2-D mesh or a tuple")


def reduce_scatter(
    output: Tensor,
    input: Tensor,
    codec: Codec,
    *,
    op: str = "mean",
    group: dist.ProcessGroup | Levels | None = None,
    inner: Codec | None = None,
    seed: int = 0,
    step: int | Tensor | None = None,
    async_op: bool = False,
) -> Tensor | Work:
    """Reduces over all ranks, each rank getting its share of the result.

    Every rank encodes its input and sends share i to rank i, which decodes, sums in float32 in rank
    order and divides once for a mean. Nothing is encoded again. Every share has blocks of its own,
    whatever its length. A NaN or an infinity on any rank makes all shares NaN.

    **On two levels**, with ``group`` as for :func:`all_reduce`, ranks count node by node: share i
    is for rank i % L of node i // L, with L ranks per node. The ranks of a node first sum with
    ``inner``, in float32: each the shares of all ranks that have its place in their nodes. These
    ranks then reduce-scatter the nodes' sums with ``codec``. A mean divides once, by the number of
    all ranks; in a vote each node has one voice, and sums and means of ``Sign(scale=None)`` are
    those of the nodes' voices. Each rank sends 1 / L of the compressed bytes between nodes. A
    node's sum beyond float32 makes all shares NaN, too.

    Args:
        output: float32, float16 or bfloat16, any shape; overwritten with this rank's share.
        input: The same number of elements for every rank, one behind the other; may be of
            another of these dtypes. ``output`` may be this rank's share of it.
        codec: Such as ``pydist.QSGD(bits=4)``.
        op: ``"mean"`` or ``"sum"`` of what the ranks encoded; ``"vote"``, with
            ``Sign(scale=None)``: ±1, the sign most ranks have.
        group: Process group, or two levels of them; default the world.
        inner: The codec inside a node, with two levels; default ``Raw()``: the input's own dtype.
        seed: Seed of stochastic rounding and the tie hash, 0 … 2**32 - 1.
        step: As in :func:`all_reduce`.
        async_op: Return at once, with a :class:`Work`.

    Returns:
        The output, or a :class:`Work` whose ``wait()`` returns it.

    Raises:
        TypeError: A tensor or the codec is of another type; the other ranks raise PydistError.
        ValueError: Another argument is out of range, the lengths do not fit, the tensors
            overlap otherwise, or the two levels do not form a grid.
        MismatchError: Ranks disagree; raised on every rank.
        PydistError: Another rank has a problem, or the exchange failed.
    """
    fields: dict[str, Any] = {"codec": repr(codec), "op": op, "seed": seed}
    options: dict[str, Any] = {"op": op, "ties": "hash", "seed": seed}

    def checked(worker: Worker) -> tuple[Tensor, Tensor]:
        dense, data = _dense_pair(output, input, "input", worker)
        fields.update(numel=input.numel(), dtype=str(input.dtype), output_dtype=str(output.dtype))
        return dense, data

    if isinstance(group, DeviceMesh | tuple):
        where = grid(group, _device_of(output))

        def stages(worker: Worker) -> tuple[ReduceScatter, Tensor, Tensor]:
            (dense, data), inside = checked(worker), _inner_of(inner, fields)
            empty = dense.view(-1)[:0], data.view(-1)[:0]
            reduce_scatter_coder(*empty, codec, Worker(0, 1, 0), **options)  # checks the arguments
            plan = Plan(dense, codec, inside, options, worker.threads)
            return ReduceScatter(where, plan, data), output, dense

        return start_on_levels("reduce_scatter", where, step, fields, stages, async_op)

    def prepare(worker: Worker) -> tuple[Coder, Tensor, Tensor]:
        _check_one_level(inner)
        dense, data = checked(worker)
        return reduce_scatter_coder(dense, data, codec, worker, **options), output, dense

    comm = communicator(group, _device_of(output))
    return start("reduce_scatter", comm, step, fields, prepare, REDUCE_SCATTER, async_op)


def all_gather(
    output: Tensor,
    input: Tensor,
    codec: Codec,
    *,
    group: dist.ProcessGroup | Levels | None = None,
    seed: int = 0,
    step: int | Tensor | None = None,
    async_op: bool = False,
) -> Tensor | Work:
    """Gathers all ranks' tensors in compressed form.

    Every rank encodes its tensor and decodes what all have sent, its own bytes too, so that all
    ranks hold the same bits. A NaN or an infinity on any rank makes everything NaN.

    **On two levels**, with ``group`` as for :func:`all_reduce`, ranks count node by node, and the
    result is, bit for bit, that of one level. The ranks that have one place in all nodes gather
    their bytes; the ranks of a node then hand each other what has arrived, encoded as it is. Each
    rank receives 1 / L of the bytes from other nodes, with L ranks per node.

    Args:
        output: float32, float16 or bfloat16, any shape, with room for every rank's tensor, one
            behind the other; overwritten.
        input: The same number of elements on every rank; may be of another of these dtypes, or
            this rank's place in ``output``.
        codec: Such as ``pydist.BlockInt(bits=8)``; ``Sign(scale=None)`` gives ±1.
        group: Process group, or two levels of them; default the world.
        seed: Seed of stochastic rounding, 0 … 2**32 - 1.
        step: As in :func:`all_reduce`.
        async_op: Return at once, with a :class:`Work`.

    Returns:
        The output, or a :class:`Work` whose ``wait()`` returns it.

    Raises:
        TypeError: A tensor or the codec is of another type; the other ranks raise PydistError.
        ValueError: Another argument is out of range, the lengths do not fit, the tensors
            overlap otherwise, or the two levels do not form a grid.
        MismatchError: Ranks disagree; raised on every rank.
        PydistError: Another rank has a problem, or the exchange failed.
    """
    fields: dict[str, Any] = {"codec": repr(codec), "seed": seed}

    def prepare(worker: Worker) -> tuple[GatherCoder, Tensor, Tensor]:
        dense, data = _dense_pair(output, input, "output", worker)
        coder = all_gather_coder(dense, data, codec, worker, seed=seed)
        fields.update(numel=input.numel(), dtype=str(input.dtype), output_dtype=str(output.dtype))
        return coder, output, dense

    if isinstance(group, DeviceMesh | tuple):
        where = grid(group, _device_of(output))

        def stages(worker: Worker) -> tuple[AllGather, Tensor, Tensor]:
            coder, result, dense = prepare(worker)
            return AllGather(where, coder), result, dense

        return start_on_levels("all_gather", where, step, fields, stages, async_op)

    comm = communicator(group, _device_of(output))
    return start("all_gather", comm, step, fields, prepare, ALL_GATHER, async_op)


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

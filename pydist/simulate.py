"""Many workers in one process: the collectives' results, bit for bit, without a process group.

For researchers: what would 32 or 64 workers get from this codec? The tensors pass through the same
codecs and kernels as in :mod:`pydist.collectives`, so the result equals that of as many real ranks,
whatever algorithm they choose::

    gradients = [torch.randn(1_000_000) for _ in range(32)]
    exact = torch.stack(gradients).mean(0)
    for bits in (2, 4, 8):
        mean = pydist.simulate.all_reduce(gradients, pydist.QSGD(bits), step=7)
        print(bits, float((mean - exact).norm() / exact.norm()))

The tensors stay as they are; the result is made once, as all ranks hold the same bits. Beside
inputs and result only a chunk of each worker's bytes is in memory. NumPy arrays of float32 or
float16 may stand in the tensors' place; the result then is one, too.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pydist.codecs import Codec, Raw
from pydist.collectives.flat import check_tensor
from pydist.collectives.hierarchical import (
    Shares,
    across_worker,
    by_place,
    inside_worker,
    part_first,
)
from pydist.encoding.choose import (
    all_gather_coder,
    all_reduce_coder,
    check_codec,
    reduce_scatter_coder,
    unit_of,
)
from pydist.formats import wire
from pydist.kernels import checks
from pydist.kernels.torch_tensors import on_device_of
from pydist.transport.coder import Coder, Worker
from pydist.transport.exchange import chunk_units

Function = TypeVar("Function", bound=Callable[..., Any])


def _or_arrays(function: Function) -> Function:
    """Lets a function of the workers' tensors take their NumPy arrays."""
    signature = inspect.signature(function)
    (name, *_) = signature.parameters

    @functools.wraps(function)
    def called(*args: Any, **options: Any) -> Any:
        given = signature.bind(*args, **options).arguments
        if not any(isinstance(x, np.ndarray) for x in given[name]):
            return function(*args, **options)
        given[name] = [
            torch.from_numpy(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x
            for x in given[name]
        ]
        result = function(**given)
        return [x.numpy() for x in result] if isinstance(result, list) else result.numpy()

    return called  # type: ignore[return-value]


@_or_arrays
def all_reduce(
    tensors: Sequence[Tensor],
    codec: Codec,
    *,
    op: str = "mean",
    seed: int = 0,
    step: int = 0,
    ties: str = "hash",
    nodes: int | None = None,
    inner: Codec | None = None,
) -> Tensor:
    """What :func:`pydist.all_reduce` leaves on every rank.

    Args:
        tensors: One per worker, in rank order: same shape, dtype and device. With ``nodes``,
            those of the first node come first.
        codec: Such as ``pydist.QSGD(bits=4)``.
        op: ``"mean"``, ``"sum"`` or, with ``Sign(scale=None)``, ``"vote"``.
        seed: Seed of stochastic rounding and the tie hash.
        step: Step of the random draws, the tie hash and the zero rule.
        ties: ``"hash"``, ``"zero"`` or ``"positive"``; for votes.
        nodes: All-reduce on two levels, of so many nodes with equally many workers.
        inner: The codec inside a node; default ``Raw()``.

    Returns:
        The result, of the tensors' shape and dtype.

    Raises:
        TypeError: A tensor or the codec is of another type.
        ValueError: There are no tensors, they differ, or an argument is out of range.
    """
    dense, workers = _dense("tensors", tensors), _workers(len(tensors), step)
    if nodes is not None:
        local = _ranks_of_a_node("tensors", dense, nodes)
        dtype = dense[0].dtype
        dense = _node_sums(dense, codec, Raw() if inner is None else inner, nodes, workers, seed)
        shares, parts = Shares(dense[0].numel(), local, unit_of(codec)), []
        for i in range(local):
            first = i * shares.share
            peers = [across_worker(j, nodes, local, first, workers[0]) for j in range(nodes)]
            share = [x[first : first + shares.length(i)] for x in dense]
            parts.append(_all_reduce(share, codec, peers, op=op, ties=ties, seed=seed))
        result = torch.cat(parts)
        exact = all_gather([result], Raw(str(dtype)[6:]), seed=seed, step=step)
        return exact.to(dtype).view(tensors[0].shape)
    _check_one_level(inner)
    result = _all_reduce(dense, codec, workers, op=op, ties=ties, seed=seed)
    return result.view(tensors[0].shape)


def _ranks_of_a_node(name: str, dense: list[Tensor], nodes: int) -> int:
    local, rest = divmod(len(dense), wire.as_int("nodes", nodes)) if nodes > 0 else (0, 1)
    if rest or not local:
        raise ValueError(f"nodes={nodes} cannot share {len(dense)} {name} evenly")
    return local


def _check_one_level(inner: Codec | None) -> None:
    if inner is not None:
        raise ValueError(f"inner={inner} needs nodes")


def _node_sums(
    dense: list[Tensor],
    codec: Codec,
    inner: Codec,
    nodes: int,
    workers: list[Worker],
    seed: int,
) -> list[Tensor]:
    """The float32 sum of each node's tensors, flat, as its ranks make it share by share."""
    local, n = len(dense) // nodes, dense[0].numel()
    check_codec(codec)
    shares = Shares(n, local, unit_of(codec))
    sums = []
    for node in range(nodes):
        padded = [x.new_zeros(shares.padded) for x in dense[:local]]
        for x, room in zip(dense[node * local :], padded, strict=False):
            room[:n] = x.view(-1)
        sums.append(torch.cat(_inside_sums(padded, inner, node, nodes, workers[0], seed))[:n])
    return sums


def _inside_sums(
    data: Sequence[Tensor], inner: Codec, node: int, nodes: int, worker: Worker, seed: int
) -> list[Tensor]:
    """The float32 share of the sum of one node's data that each of its ranks gets."""
    local = len(data)
    outputs = [x.new_empty(x.numel() // local, dtype=torch.float32) for x in data]
    coders = [
        reduce_scatter_coder(
            out, x, inner, inside_worker(node, i, nodes, local, worker),
            op="sum", ties="hash", seed=seed,
        )
        for i, (out, x) in enumerate(zip(outputs, data, strict=True))
    ]  # fmt: skip
    _reduce_scatter(coders)
    return outputs


def _all_reduce(
    dense: list[Tensor], codec: Codec, workers: list[Worker], *, op: str, ties: str, seed: int
) -> Tensor:
    result = torch.empty_like(dense[0])
    senders = [
        all_reduce_coder(x, codec, worker, op=op, ties=ties, seed=seed)
        for x, worker in zip(dense, workers, strict=True)
    ]
    receiver = all_reduce_coder(result, codec, workers[0], op=op, ties=ties, seed=seed)
    with on_device_of(result):
        flags = torch.zeros(1, dtype=torch.int32, device=result.device)
        _share_scales(senders, receiver)
        for begin, end, messages in _encoded(senders, rows=1):
            units = end - begin
            reduced = messages.new_empty((1, receiver.reduced_bytes(units)))
            receiver.reduce(messages[:, 0], reduced[0], units, begin, end, flags)
            receiver.decode(reduced, units, begin, end)
        receiver.finish(flags | _flags(senders))
    return result


@_or_arrays
def reduce_scatter(
    inputs: Sequence[Tensor],
    codec: Codec,
    *,
    op: str = "mean",
    seed: int = 0,
    step: int = 0,
    nodes: int | None = None,
    inner: Codec | None = None,
) -> list[Tensor]:
    """What :func:`pydist.reduce_scatter` leaves in each rank's output.

    Args:
        inputs: One per worker, in rank order: same shape, dtype and device, with as many elements
            for every worker. With ``nodes``, those of the first node come first.
        codec: Such as ``pydist.QSGD(bits=4)``.
        op: ``"mean"``, ``"sum"`` or, with ``Sign(scale=None)``, ``"vote"``.
        seed: Seed of stochastic rounding and the tie hash.
        step: Step of the random draws.
        nodes: Reduce-scatter on two levels, of so many nodes with equally many workers.
        inner: The codec inside a node; default ``Raw()``.

    Returns:
        One flat tensor a worker, of the inputs' dtype.

    Raises:
        TypeError: A tensor or the codec is of another type.
        ValueError: There are no tensors, they differ, their length is no multiple of their number,
            or an argument is out of range.
    """
    dense, workers = _dense("inputs", inputs), _workers(len(inputs), step)
    share, rest = divmod(dense[0].numel(), len(inputs))
    if rest:
        raise ValueError(
            f"inputs must have a multiple of {len(inputs)} elements, got {dense[0].numel()}"
        )
    outputs = [x.new_empty(share) for x in dense]
    options: dict[str, Any] = {"op": op, "ties": "hash", "seed": seed}
    if nodes is not None:
        inside = Raw() if inner is None else inner
        _reduce_scatter(*_places(outputs, dense, codec, inside, nodes, workers[0], options))
        return outputs
    _check_one_level(inner)
    coders = [
        reduce_scatter_coder(out, x, codec, worker, **options)
        for out, x, worker in zip(outputs, dense, workers, strict=True)
    ]
    _reduce_scatter(coders)
    return outputs


def _places(
    outputs: list[Tensor],
    dense: list[Tensor],
    codec: Codec,
    inner: Codec,
    nodes: int,
    worker: Worker,
    options: dict[str, Any],
) -> Iterator[list[Coder]]:
    """The coders across nodes, place by place, of what the nodes have summed."""
    local, numel = _ranks_of_a_node("inputs", dense, nodes), outputs[0].numel()
    check_codec(codec)
    data, sums = [by_place(x, nodes, local) for x in dense], []
    for j in range(nodes):
        mine = data[j * local : (j + 1) * local]
        sums.append(_inside_sums(mine, inner, j, nodes, worker, options["seed"]))
    for i in range(local):
        first = part_first(i, numel, codec)
        peers = [across_worker(j, nodes, local, first, worker) for j in range(nodes)]
        yield [
            reduce_scatter_coder(outputs[j * local + i], sums[j][i], codec, peer, **options)
            for j, peer in enumerate(peers)
        ]


def _reduce_scatter(*groups: Sequence[Coder]) -> None:
    """Runs the coders of each group against each other; what is not finite, all groups tell."""
    everyone = [coder for coders in groups for coder in coders]
    with on_device_of(everyone[0].flags):
        for coders in groups:
            _share_scales(coders)
            for begin, end, messages in _encoded(coders, rows=len(coders)):
                for rank, coder in enumerate(coders):
                    coder.decode(messages[:, rank], end - begin, begin, end)
        flags = _flags(everyone)
        for coder in everyone:
            coder.finish(flags)


@_or_arrays
def all_gather(inputs: Sequence[Tensor], codec: Codec, *, seed: int = 0, step: int = 0) -> Tensor:
    """What :func:`pydist.all_gather` leaves in every rank's output.

    On two levels it is the same.

    Args:
        inputs: One per worker, in rank order: same shape, dtype and device.
        codec: Such as ``pydist.BlockInt(bits=8)``.
        seed: Seed of stochastic rounding.
        step: Step of the random draws.

    Returns:
        [workers, elements], of the inputs' dtype.

    Raises:
        TypeError: A tensor or the codec is of another type.
        ValueError: There are no tensors, they differ, or an argument is out of range.
    """
    dense, workers = _dense("inputs", inputs), _workers(len(inputs), step)
    output = dense[0].new_empty((len(dense), dense[0].numel()))
    coders = [
        all_gather_coder(output, x, codec, worker, seed=seed)
        for x, worker in zip(dense, workers, strict=True)
    ]
    with on_device_of(output):
        for begin, end, messages in _encoded(coders, rows=1):
            coders[0].decode(messages[:, 0], end - begin, begin, end)
        coders[0].finish(_flags(coders))
    return output


def _workers(ranks: int, step: int) -> list[Worker]:
    checks.check_step(step)
    threads = torch.get_num_threads()
    return [Worker(rank, ranks, step, threads) for rank in range(ranks)]


def _dense(name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The workers' tensors, checked, detached and contiguous."""
    if not 0 < len(tensors) < wire.MAX_RANKS:
        raise ValueError(f"{name} must be 1 … {wire.MAX_RANKS - 1} tensors, got {len(tensors)}")
    for i, x in enumerate(tensors):
        check_tensor(f"{name}[{i}]", x)
        for what in ("shape", "dtype", "device"):
            value, first = getattr(x, what), getattr(tensors[0], what)
            if value != first:
                raise ValueError(f"{name}[{i}] has {what} {value}, {name}[0] has {first}")
    return [x.detach().contiguous() for x in tensors]


def _share_scales(senders: Sequence[Coder], *receivers: Coder) -> None:
    """Gives all coders what the senders must know of each other before they encode."""
    own = [coder.scales() for coder in senders]
    known = [scales for scales in own if scales is not None]
    if known:
        everyone = torch.stack(known)
        for coder in (*senders, *receivers):
            coder.merge_scales(everyone)


def _encoded(coders: Sequence[Coder], rows: int) -> Iterator[tuple[int, int, Tensor]]:
    """Chunk after chunk: begin, end, and all workers' messages, uint8 [workers, rows, bytes]."""
    size = chunk_units(coders[0])
    for begin in range(0, coders[0].units, size):
        end = min(begin + size, coders[0].units)
        shape = (len(coders), rows, coders[0].message_bytes(end - begin))
        device = coders[0].flags.device
        messages = torch.empty(shape, dtype=torch.uint8, device=device)
        for coder, message in zip(coders, messages, strict=True):
            coder.encode(message, end - begin, begin, end)
        yield begin, end, messages


def _flags(coders: Sequence[Coder]) -> Tensor:
    return torch.stack([coder.flags for coder in coders]).amax(0)

"""What ranks do in test_fsdp.py: FSDP2 with compressed gradients and weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ranks_codecs import first_difference
from ranks_collectives import bits
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from pydist import Raw, Ternary, TopK, fsdp
from pydist.formats import wire
from pydist.formats.ternary import UNIT
from pydist.fsdp import private
from pydist.reference import blocks as rb
from pydist.reference import raw as reference_raw
from pydist.reference import ternary as rt
from pydist.reference import topk as rk
from pydist.reference.signs import round_to
from pydist.transport import exchange

Options = dict[str, Any]


class Net(nn.Module):
    """Odd shapes, norms, a branch, a frozen and a never used parameter."""

    def __init__(self, *, whole: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Linear(12, 45)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(45), nn.Linear(45, 45), nn.Tanh()) for _ in range(2)
        )
        self.head = nn.Linear(45, 8, bias=False)
        self.side = nn.Linear(45, 8)
        self.never = nn.Parameter(torch.ones(5, 40))
        self.frozen = nn.Parameter(torch.ones(45), requires_grad=False)
        if whole:  # small whole numbers, so that sums are exact in any order
            self.blocks = nn.ModuleList(nn.Linear(45, 45) for _ in range(2))
            generator = torch.Generator().manual_seed(5)
            for parameter in self.parameters():
                parameter.data.copy_(torch.randint(-1, 2, parameter.shape, generator=generator))

    def forward(self, x: Tensor, side: bool = False) -> Tensor:
        x = self.stem(x.to(self.stem.weight.dtype)) * self.frozen
        for block in self.blocks:
            x = block(x)
        return self.side(x) if side else self.head(x)


def columns(parameter: nn.Parameter) -> Shard | None:
    """Shards the stem by columns."""
    return Shard(1) if parameter.shape == (45, 12) else None


def sharded(net: Net, **options: Any) -> Net:
    """Every block a unit, and the rest."""
    for block in net.blocks:
        fully_shard(block, **options)
    fully_shard(net, **options)
    return net


def loss_of(net: nn.Module, rank: int, step: int, *, side: bool = False, **kind: Any) -> Tensor:
    """A rank's loss in a step; whole numbers in, whole numbers out, with ``whole=True``."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    if kind.get("whole"):
        x = torch.randint(-1, 2, (3, 12), generator=generator).float()
        weight = torch.randint(-1, 2, (3, 8), generator=generator).float()
        return (net(x, side) * weight).sum()
    x = torch.randn(3, 12, generator=generator)
    return (net(x, side).float() - x[:, :1]).square().sum()


@contextmanager
def chunks_of(size: int) -> Iterator[None]:
    """Cuts what is sent into chunks of so many bytes, so that even small models have several."""
    usual, exchange.CHUNK_BYTES = exchange.CHUNK_BYTES, size
    try:
        yield
    finally:
        exchange.CHUNK_BYTES = usual


def local(parameter: Any) -> Tensor:
    """A rank's shard."""
    shard: Tensor = parameter.to_local()
    return shard


# --------------------------------------------------------------------------- like plain FSDP


def _plain_options(kind: str, ranks: int) -> Options:
    return {
        "kept": {"reshard_after_forward": False},
        "smaller_mesh": {"reshard_after_forward": 2},
        "bfloat16": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
        "bfloat16_reduce": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16)},
        "float16": {"mp_policy": MixedPrecisionPolicy(torch.float16, torch.float16)},
        "columns": {"shard_placement_fn": columns},
        "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        "hybrid": {"mesh": _hybrid(ranks)} if kind == "hybrid" else {},
    }.get(kind, {})


def _hybrid(ranks: int) -> Any:
    return init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("across", "inside"))


def _prepared(kind: str, net: Net) -> Net:
    if kind == "sum":
        net.set_gradient_divide_factor(4.0)
        net.set_force_sum_reduction_for_comms(True)
        for block in net.blocks:
            block.set_gradient_divide_factor(4.0)
            block.set_force_sum_reduction_for_comms(True)
    elif kind == "prefetch":
        for module in (net, *net.blocks):
            module._set_unshard_async_op(True)
        net.set_modules_to_forward_prefetch([net.blocks[0]])
        net.blocks[0].set_modules_to_forward_prefetch([net.blocks[1]])
    elif kind == "unused" and hasattr(net, "set_reduce_scatter_unused_params"):
        net.set_reduce_scatter_unused_params(True)
    return net


def equals_plain(rank: int, ranks: int, kind: str, whole: bool) -> list[bytes]:
    """With a codec that loses nothing, training is that of plain FSDP2, bit for bit."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
    )

    nets, options = [], _plain_options(kind, ranks)
    for _ in range(2):
        net = Net(whole=whole)
        if kind == "checkpointed":
            apply_activation_checkpointing(net, check_fn=lambda m: isinstance(m, nn.Linear))
        if kind == "double":
            net.double()
        if kind == "grouped":
            fully_shard(list(net.blocks))
            fully_shard(net)
        else:
            sharded(net, **options)
        nets.append(_prepared(kind, net))
    plain, ours = nets
    state = fsdp.compress(ours, Raw(), Raw(), min_numel=0)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.5) for net in nets]
    for step in range(3):
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            for turn in range(3 if kind == "accumulate" else 1):
                net.set_requires_gradient_sync(turn == 2 or kind != "accumulate")
                side = kind == "sides" and step % 2 == 0
                loss_of(net, rank, 10 * step + turn, side=side, whole=whole).backward()
            if not whole:  # steps would leave the whole numbers
                optimizer.step()
        for (name, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
            where = f"{kind}, step {step}, {name}"
            first_difference(local(q), local(p), where)
            assert (p.grad is None) == (q.grad is None), where
            if p.grad is not None:
                first_difference(local(q.grad), local(p.grad), where)
    if kind not in ("double", "smaller_mesh"):
        stats = state.stats()
        for direction in ("gradients", "parameters"):
            assert stats[direction]["calls"] and not stats[direction]["uncompressed"], stats
    fsdp.restore(ours)
    calls = state.stats()["gradients"]["calls"]
    loss_of(ours, rank, 0, whole=whole).backward()
    assert state.stats()["gradients"]["calls"] == calls, "restored, and still compressed"
    return [bits(p.full_tensor()) for p in ours.parameters()]


# --------------------------------------------------------------------------- like the reference


class Recorder:
    """Stands before pydist's communication objects and keeps what goes in and comes out."""

    def __init__(self, inner: Any, log: list[tuple[Any, ...]]) -> None:
        self.inner, self.log = inner, log

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *, output_tensor: Tensor, input_tensor: Tensor, **rest: Any) -> Any:
        given, step = input_tensor.clone(), self.inner.unit.state.step
        work = self.inner(output_tensor=output_tensor, input_tensor=input_tensor, **rest)
        assert work is None
        self.log.append((self.inner.unit, given, output_tensor.clone(), step, rest.get("op")))
        return None


def recorded(net: Net) -> tuple[list[Any], list[Any]]:
    """Keeps a compressed model's reductions and gatherings from now on."""
    reduced: list[Any] = []
    gathered: list[Any] = []
    for module in (net, *net.blocks):
        for group in private.groups_of(module):
            group._reduce_scatter_comm = Recorder(group._reduce_scatter_comm, reduced)
            group._all_gather_comm = Recorder(group._all_gather_comm, gathered)
    return reduced, gathered


def shard_sizes(shape: torch.Size, dim: int, ranks: int) -> tuple[int, list[int]]:
    """Elements of a slot, and of each rank's shard in it."""
    rest = shape.numel() // shape[0]
    if dim:
        return shape.numel() // ranks, [shape.numel() // ranks] * ranks
    rows = -(-shape[0] // ranks)
    return rows * rest, [max(0, min(rows, shape[0] - rank * rows)) * rest for rank in range(ranks)]


class Oracle:
    """What the specification says that a unit's buffers become.

    Args:
        ranks: Ranks.
        ordinals: By name, a parameter's place in the model.
        codec: A codec with blocks; of gradients also ``TopK`` and ``Ternary``.
        seed: Seed of the draws.
        feedback: Keep residuals.
    """

    def __init__(
        self, ranks: int, ordinals: dict[str, int], codec: Any, seed: int, feedback: bool = False
    ) -> None:
        self.ranks, self.ordinals, self.codec, self.seed = ranks, ordinals, codec, seed
        self.residuals: dict[Any, Any] | None = {} if feedback else None
        self.scalers: dict[str, tuple[Any, Any]] = {}

    @property
    def block(self) -> int:
        """Elements that stay together."""
        if isinstance(self.codec, Ternary):
            return UNIT
        return int(self.codec.block)

    def payload(self, x: Any, rank: int, where: tuple[str, int], step: int, phase: int) -> Any:
        """What ``rank`` sends of a shard, and the table of its blocks."""
        form, (name, first) = self.codec.block_format, where
        table = wire.segments([x.size], [self.ordinals[name]], [first], block=self.block)
        key = (name, first, rank)
        if isinstance(self.codec, Ternary):
            own, shared = self.scalers[name]
            draws = rb.Draws(self.seed, rank, phase, step)
            sent = rt.pack(x, own[rank], shared=shared, draws=draws, segments=table)
            return sent[0], table
        if isinstance(self.codec, TopK):
            assert self.residuals is not None
            old = self.residuals.get(key, np.zeros(x.size, dtype=np.float32))
            sent, self.residuals[key], _ = rk.feedback(
                x, old, self.codec.topk_format, seed=self.seed, step=step, segments=table
            )
            return sent, table
        options = {
            "zero_bit": (rank + step) % 2, "draws": rb.Draws(self.seed, rank, phase, step),
            "segments": table,
        }  # fmt: skip
        if phase or self.residuals is None:
            return rb.quantize(x, form, **options)[0], table
        old = self.residuals.get(key, np.zeros(x.size, dtype=np.float32))
        sent, self.residuals[key], _ = rb.quantize_feedback(x, old, form, **options)
        return sent, table

    def first(self, slot: int, rank: int) -> int:
        """The element from which the draws of a rank's shard count."""
        return rank * -(-slot // self.block) * self.block

    def share_scalers(self, name: str, shards: list[list[Any]]) -> None:
        """Every rank's scaler of a parameter, of its shards one behind the other, and the shared.

        Args:
            name: The parameter.
            shards: By shard, what each rank has of it.
        """
        if isinstance(self.codec, Ternary):
            whole = [np.concatenate(parts) for parts in zip(*shards, strict=True)]
            own = np.stack([rt.scale(x, self.codec.clip)[0] for x in whole])
            self.scalers[name] = own, rt.shared_scalers(own)

    def reduced(
        self, held: list[tuple[str, torch.Size, int]], inputs: list[Tensor], mine: int, **rest: Any
    ) -> Any:
        """Row ``mine`` of the sum of all ranks' buffers, float32."""
        at, result = 0, []
        for name, shape, dim in held:
            slot, sizes = shard_sizes(shape, dim, self.ranks)
            rows = [x.view(self.ranks, -1)[:, at : at + slot].float().numpy() for x in inputs]
            shards = [[x[row, : sizes[row]] for x in rows] for row in range(self.ranks)]
            self.share_scalers(name, shards)
            for row, parts in enumerate(shards):
                total = self._sum(name, parts, self.first(slot, row), shape.numel(), **rest)
                if row == mine:
                    result.append(np.pad(total, (0, slot - sizes[row])))
            at += slot
        return np.concatenate(result)

    def _sum(
        self, name: str, parts: list[Any], first: int, numel: int, *, step: int, mean: bool,
        small: int, dtype: str,
    ) -> Any:  # fmt: skip
        if numel < small:
            total, _ = reference_raw.sum_values(np.stack(parts), dtype, mean=mean)
            return total
        if not parts[0].size:
            return parts[0]
        sent = [self.payload(x, rank, (name, first), step, 0) for rank, x in enumerate(parts)]
        payloads, table = np.stack([one for one, _ in sent]), sent[0][1]
        n, form = parts[0].size, self.codec.block_format
        if isinstance(self.codec, Ternary):
            return rt.unpack(payloads, self.scalers[name][1], n, mean=mean, segments=table)[0]
        if isinstance(self.codec, TopK):
            topk = self.codec.topk_format
            return rk.scatter(payloads, topk, n, mean=mean, segments=table)
        return rb.sum_quantized(payloads, form, n, mean=mean, segments=table)

    def gathered(
        self, held: list[tuple[str, torch.Size, int]], inputs: list[Tensor], step: int, small: int
    ) -> Any:
        """All ranks' rows as they are decoded, float32."""
        rows = []
        for rank, x in enumerate(inputs):
            at, row = 0, x.float().numpy().copy()
            for name, shape, dim in held:
                slot, sizes = shard_sizes(shape, dim, self.ranks)
                part = row[at : at + sizes[rank]]
                if shape.numel() >= small and part.size:
                    where = (name, self.first(slot, rank))
                    sent, table = self.payload(part, rank, where, step, phase=2)
                    form = self.codec.block_format
                    part[:] = rb.dequantize(sent, form, part.size, segments=table)
                at += slot
            rows.append(row)
        return np.concatenate(rows)


def held_by(unit: Any, net: Net, given: set[str] | None = None) -> list[tuple[str, Any, int]]:
    """Names, shapes and sharded dimensions of a unit's parameters, or of the given ones of them."""
    dims = {name: p.placements[0].dim for name, p in net.named_parameters()}
    names = [parameter.name for parameter in unit.parameters]
    shapes = {name: p.shape for name, p in Net().named_parameters()}
    return [(name, shapes[name], dims[name]) for name in names if given is None or name in given]


SMALL = 100


@chunks_of(300)
def equals_reference(
    rank: int, ranks: int, gradients: Any, parameters: Any, feedback: bool, kind: str
) -> list[bytes]:
    """Every buffer, of gradients and of weights, is what the specification says, bit for bit."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    if kind == "bfloat16":
        policy = MixedPrecisionPolicy(torch.bfloat16)
    net = sharded(
        Net(), mp_policy=policy if kind.startswith("bfloat16") else MixedPrecisionPolicy(),
        shard_placement_fn=columns, **(_plain_options(kind, ranks) if kind == "offload" else {}),
    )  # fmt: skip
    ordinals = {name: i for i, (name, _) in enumerate(net.named_parameters())}
    state = fsdp.compress(
        net, gradients, parameters, seed=11, min_numel=SMALL, error_feedback=feedback
    )
    if kind == "sum":
        for module in (net, *net.blocks):
            module.set_gradient_divide_factor(3.0)
    reduced, gathered = recorded(net)
    of_gradients = Oracle(ranks, ordinals, gradients, 11, feedback)
    of_weights = Oracle(ranks, ordinals, parameters, 11)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        side = step == 1
        loss_of(net, rank, step, side=side).backward()
        bare = Net()
        loss_of(bare, rank, step, side=side).backward()
        given = {name for name, p in bare.named_parameters() if p.grad is not None}
        weight_step = len(reduced) - 3  # reductions before this step
        assert len(reduced) == 3 * (step + 1)
        for unit, x, out, number, op in reduced[-3:]:
            inputs: list[Any] = [None] * ranks
            dist.all_gather_object(inputs, x)
            wanted = of_gradients.reduced(
                held_by(unit, net, given), inputs, rank, step=number, mean=kind != "sum",
                small=SMALL, dtype=str(x.dtype)[6:],
            )  # fmt: skip
            wanted = torch.from_numpy(round_to(wanted, str(x.dtype)[6:])).to(x.dtype)
            if kind == "sum":
                assert op == dist.ReduceOp.PREMUL_SUM
                wanted = wanted * (1 / 3)
            first_difference(out, wanted, f"{gradients}, step {step}, gradients of {unit.name!r}")
        for unit, x, out, _, _ in gathered:
            inputs = [None] * ranks
            dist.all_gather_object(inputs, x)
            wanted = of_weights.gathered(held_by(unit, net), inputs, weight_step, SMALL)
            wanted = torch.from_numpy(round_to(wanted, str(x.dtype)[6:])).to(x.dtype)
            first_difference(out, wanted, f"{parameters}, step {step}, weights of {unit.name!r}")
        gathered.clear()
        optimizer.step()
    stats = state.stats()
    assert not stats["gradients"]["uncompressed"] and not stats["parameters"]["uncompressed"]
    for name, flat in state.state_dict()["parameters"].items():
        assert of_gradients.residuals is not None, name
        check_residual(net, name, flat["residual"], of_gradients, rank, ranks)
    return [bits(p.full_tensor()) for p in net.parameters()]


def check_residual(net: Net, name: str, got: Tensor, oracle: Oracle, rank: int, ranks: int) -> None:
    """A rank's residual of a parameter, in the parameter's shape, is the oracle's."""
    assert oracle.residuals is not None
    dim = dict(net.named_parameters())[name].placements[0].dim
    slot, sizes = shard_sizes(got.shape, dim, ranks)
    shards = torch.chunk(got, ranks, dim)
    for row, shard in enumerate(shards):
        wanted = oracle.residuals.get((name, oracle.first(slot, row), rank))
        assert wanted is not None and wanted.size == sizes[row]
        first_difference(shard.reshape(-1), torch.from_numpy(wanted), f"residual of {name}")


# --------------------------------------------------------------------------- replicas of a model


def across_equals_plain(rank: int, ranks: int) -> list[bytes]:
    """Shards averaged over replicas by pydist, and by FSDP2 itself."""
    mesh = _hybrid(ranks)
    plain, ours = sharded(Net(), mesh=mesh), sharded(Net(), mesh=mesh["inside"])
    state = fsdp.compress(
        ours, Raw(), Raw(), across=Raw(), across_group=mesh["across"].get_group(), min_numel=0
    )
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01) for net in (plain, ours)]
    for step in range(2):
        for net, optimizer in zip((plain, ours), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(net, rank, step, side=step == 1).backward()
            optimizer.step()
        for (name, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
            first_difference(local(q), local(p), f"step {step}, {name}")
    assert state.stats()["across"]["calls"] == 6 and not state.stats()["across"]["uncompressed"]
    fsdp.restore(ours)
    calls = state.stats()["across"]["calls"]
    loss_of(ours, rank, 0).backward()
    assert state.stats()["across"]["calls"] == calls
    return [bits(p.full_tensor()) for p in ours.parameters()]


@chunks_of(700)
def across_equals_reference(rank: int, ranks: int, codec: Any, inside: Any) -> list[bytes]:
    """Every average over replicas is what the specification says, parameter by parameter."""
    mesh = _hybrid(ranks)
    group, inner = mesh["across"].get_group(), mesh["inside"]
    replica, row = dist.get_rank(group), inner.get_local_rank()
    net = sharded(Net(), mesh=inner)
    ordinals = {name: i for i, (name, _) in enumerate(net.named_parameters())}
    fsdp.compress(net, inside, across=codec, across_group=group, min_numel=SMALL, seed=7)
    log: list[Any] = []
    for module in (net, *net.blocks):
        unit_group = private.groups_of(module)[0]

        def recorded(x: Tensor, hook: Any = unit_group._all_reduce_hook) -> None:
            given = x.clone()
            hook(x)
            log.append((hook.unit, given, x.clone(), hook.unit.reduced[0]))

        unit_group._all_reduce_hook = recorded
    oracle, form = Oracle(inner.size(), ordinals, codec, 7), codec.block_format
    for step in range(2):
        loss_of(net, rank, step).backward()
    given_names = {name for name, p in net.named_parameters() if p.grad is not None}
    assert len(log) == 6
    for unit, x, out, step in log:
        inputs: list[Any] = [None] * group.size()
        dist.all_gather_object(inputs, x, group=group)
        wanted, at = np.zeros(x.numel(), dtype=np.float32), 0
        for name, shape, dim in held_by(unit, net, given_names):
            slot, sizes = shard_sizes(shape, dim, inner.size())
            parts = [one[at : at + sizes[row]].numpy() for one in inputs]
            if shape.numel() < SMALL:
                total, _ = reference_raw.sum_values(np.stack(parts), "float32", mean=True)
            elif parts[0].size:
                sent = [
                    oracle.payload(part, i, (name, oracle.first(slot, row)), step, 0)
                    for i, part in enumerate(parts)
                ]
                reduced, _ = rb.reduce_quantized(
                    np.stack([one for one, _ in sent]), form, parts[0].size, mean=True,
                    zero_bit=step % 2, draws=rb.Draws(7, 0, 1, step), segments=sent[0][1],
                )  # fmt: skip
                total = rb.dequantize(reduced, form, parts[0].size, segments=sent[0][1])
            wanted[at : at + sizes[row]] = total[: sizes[row]]
            at += slot
        first_difference(out, torch.from_numpy(wanted), f"{codec}, {unit.name!r}, {replica}")
    return [bits(p.grad.full_tensor()) for p in net.parameters() if p.grad is not None]

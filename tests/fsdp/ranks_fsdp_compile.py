"""What ranks do in test_fsdp_compile.py: FSDP2 models under torch.compile."""

from __future__ import annotations

import functools
from typing import Any

import torch
from ranks_codecs import first_difference
from ranks_fsdp import SMALL, Net, local, loss_of
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from pydist import QSGD, BlockInt, Raw, fsdp
from pydist.fsdp import private

HOWS = ("blocks, then sharded", "sharded, then blocks", "wrapped blocks", "sharded, wrapped blocks",
        "whole", "wrapped whole")  # fmt: skip


CODECS = QSGD(4, block=64), BlockInt(8, block=32)


class Block(nn.Module):
    """A block whose forward is not torch's own; torch.compile leaves those out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(45), nn.Linear(45, 45)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class Compilable(Net):
    """:class:`Net` without a loop in its forward, on which torch.compile gives up."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, side: bool = False) -> Tensor:
        x = self.stem(x) * self.frozen
        x = self.blocks[1](self.blocks[0](x))
        return self.side(x) if side else self.head(x)


class Counted:
    """A backend that runs what it is given through another, and counts the graphs."""

    def __init__(self, name: str) -> None:
        self.inner, self.graphs = torch._dynamo.lookup_backend(name), 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return self.inner(graph, inputs)


def _built(how: str, backend: Any) -> tuple[Net, nn.Module]:
    """The sharded model, and what is called."""
    net: Net = Compilable()
    if how == "blocks, then sharded":
        for block in net.blocks:
            block.compile(backend=backend)
    if how == "wrapped blocks":
        net.blocks = nn.ModuleList(torch.compile(block, backend=backend) for block in net.blocks)
    for block in net.blocks:
        fully_shard(block)
    fully_shard(net)
    if how == "sharded, then blocks":
        for block in net.blocks:
            block.compile(backend=backend)
    if how == "sharded, wrapped blocks":
        for i, block in enumerate(net.blocks):
            net.blocks[i] = torch.compile(block, backend=backend)
    if how == "whole":
        net.compile(backend=backend)
    return net, torch.compile(net, backend=backend) if how == "wrapped whole" else net


def _trained(
    rank: int, how: str, backend: str, codecs: tuple[Any, Any] | None, *, late: bool = False
) -> tuple[list[Tensor], dict[str, Any], int]:
    """Shards after some steps, what was sent, and how many graphs were compiled.

    With ``late`` the model is compressed after steps have been compiled without.
    """
    torch._dynamo.reset()
    counted = Counted(backend)
    net, model = _built(how, counted)
    state = None

    def compressed() -> Any:
        assert codecs is not None
        made = fsdp.compress(model, *codecs, seed=5, min_numel=SMALL, error_feedback="auto")
        groups = [group for x in private.fsdp_modules(net) for group in private.groups_of(x)]
        names = [private.reduce_scatter_of(group).unit.name for group in groups]  # type: ignore[attr-defined]
        assert names == ["", "blocks.0", "blocks.1"], "errors must name what the user knows"
        assert made.parameters.names == [n for n, _ in Compilable().named_parameters()]
        return made

    if codecs and not late:
        state = compressed()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.5)
    for step in range(4):
        if step == 2 and codecs and late:
            state = compressed()
        if step == 3 and state:
            fsdp.restore(model)
        optimizer.zero_grad()
        loss_of(model, rank, step, side=step == 1).backward()
        optimizer.step()
    shards = [local(parameter).clone() for parameter in net.parameters()]
    return shards, {} if state is None else state.stats(), counted.graphs


@functools.cache
def _uncompiled(rank: int, late: bool) -> tuple[list[Tensor], dict[str, Any], int]:
    return _trained(rank, "not at all", "eager", CODECS, late=late)


def compiled(rank: int, ranks: int, how: str, backend: str, exact: bool, late: bool) -> None:
    """A compiled model trains as a compiled plain one, and as one that is not compiled.

    Args:
        rank: This rank.
        ranks: All ranks.
        how: One of :data:`HOWS`.
        backend: Of torch.compile.
        exact: Whether that backend computes what uncompiled code computes, bit for bit.
        late: Compress after steps were compiled.
    """
    plain, _, graphs = _trained(rank, how, backend, None)
    assert graphs > 0, f"{how}: nothing was compiled"
    raw, _, ours = _trained(rank, how, backend, (Raw(), Raw()))
    assert ours == graphs, f"{how}: {ours} graphs, {graphs} without pydist"
    lossy, sent, ours = _trained(rank, how, backend, CODECS, late=late)
    assert ours == graphs, f"{how}: {ours} graphs, {graphs} without pydist"
    wanted, eager, none = _uncompiled(rank, late)
    assert none == 0
    for direction in ("gradients", "parameters"):
        assert sent[direction]["calls"] == eager[direction]["calls"] > 0, direction
        assert not sent[direction]["uncompressed"], sent
    names = [name for name, _ in Compilable().named_parameters()]
    for got, expected, what in [(raw, plain, "Raw")] + [(lossy, wanted, "codecs")] * exact:
        for name, x, y in zip(names, got, expected, strict=True):
            first_difference(x, y, f"{how}, {what}: {name}")

"""What ranks do in test_ddp_state.py: skipped steps, checkpoints, errors of the DDP hook."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from ranks_collectives import bits
from ranks_faults import raised_by, still_works
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

from pydist import QSGD, BlockInt, Sign, Ternary, TopK
from pydist.ddp import CompressionState, compress, compression_hook
from pydist.transport.communicator import communicator

SMALL = {"bucket_cap_mb": 0.0001}
SPARSE = {"0.*": TopK(0.1, block=32), "2.*": TopK(0.02), "*": Ternary()}
TRITS = {"2.*": Ternary(), "*": TopK(0.1, block=64, values="float16")}


def model() -> torch.nn.Module:
    torch.manual_seed(5)
    return torch.nn.Sequential(
        torch.nn.Linear(20, 40), torch.nn.Tanh(), torch.nn.Linear(40, 30), torch.nn.Tanh(),
        torch.nn.Linear(30, 20),
    )  # fmt: skip


def loss_of(net: Any, rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(5, 20, generator=generator)
    return (net(x) - x).square().mean()


def setup(codec: Any = None, ddp: dict[str, Any] | None = None, **options: Any) -> Any:
    net = model()
    wrapped = DDP(net, **(SMALL if ddp is None else ddp))
    state = compress(wrapped, codec or Sign("l1", block=64), **{"min_numel": 100} | options)
    return net, wrapped, state, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def steps_of(net: Any, opt: Any, rank: int, steps: Any, ddp: Any) -> None:
    for step in steps:
        opt.zero_grad()
        loss_of(ddp, rank, step).backward()
        opt.step()


def everything(net: torch.nn.Module, state: CompressionState) -> list[Any]:
    saved = state.state_dict()
    residuals = [
        [name, *(bits(x) if isinstance(x, Tensor) else x for x in entry.values())]
        for name, entry in saved["parameters"].items()
    ]
    return [[bits(p) for p in net.parameters()], residuals, saved["step"]]


# --------------------------------------------------------------------------- buckets


def any_buckets(rank: int, ranks: int, codec: Any = None, **options: Any) -> list[Any]:
    """However the parameters are cut into buckets, the result is bit-identical."""
    results = []
    for ddp_options in ({}, SMALL, {"bucket_cap_mb": 0.006, "gradient_as_bucket_view": True}):
        net, ddp, state, opt = setup(codec, ddp=ddp_options, algorithm="two_phase", **options)
        steps_of(net, opt, rank, range(5), ddp)
        results.append(everything(net, state))
    assert results[0] == results[1] == results[2]
    return results[0][0]


def shortened(rank: int, ranks: int) -> list[Any]:
    """Elias codes make messages shorter and change neither parameters nor residuals."""
    results, sent = [], []
    for entropy in (None, "elias"):
        codec = QSGD(4, block=256, entropy=entropy)
        net, ddp, state, opt = setup(codec, ddp={}, algorithm="two_phase")
        steps_of(net, opt, rank, range(4), ddp)
        results.append(everything(net, state))
        sent.append(state.stats()["wire_bytes"])
    assert results[0] == results[1]
    assert sent[1] < 0.9 * sent[0], sent
    return results[0][0]


def plain_registration(rank: int, ranks: int) -> list[bytes]:
    """PyTorch's own convention, with names and without; all of one state, or a state a model."""
    finals = []
    for named in (True, False):
        net = model()
        ddp = DDP(net, **SMALL)
        names = ddp.named_parameters() if named else None
        state = CompressionState(QSGD(4), min_numel=100, seed=3, named_parameters=names)
        ddp.register_comm_hook(state, compression_hook)
        opt = torch.optim.SGD(net.parameters(), lr=0.1)
        steps_of(net, opt, rank, range(3), ddp)
        names = list(state.state_dict()["parameters"])
        assert names == (["0.weight", "2.weight", "4.weight"] if named else names), names
        assert all(name.startswith("parameter ") for name in names) or named, names
        finals.append([bits(p) for p in net.parameters()])
    return finals[0]


# --------------------------------------------------------------------------- not finite


def skipped(
    rank: int, ranks: int, exact: bool, codec: Any = None, options: dict[str, Any] | None = None
) -> list[Any]:
    """A NaN in one bucket on one rank; the optimizer is told by the gradients' NaN."""
    options = {"exact_skip": exact} | (options or {})
    net, ddp, state, opt = setup(codec, **options)
    clean, clean_ddp, clean_state, clean_opt = setup(codec, **options)
    for step in range(6):
        if step == 3:
            before = everything(net, state)
            opt.zero_grad()
            loss = loss_of(ddp, rank, 77)
            if rank == ranks - 1:  # in one gradient of one bucket
                net[2].weight.register_hook(_spoil_once())
            loss.backward()
            grads = [p.grad for p in net.parameters()]
            bad = [bool(grad.isnan().all()) for grad in grads]
            assert any(bad) and not all(bad), bad
            assert all(b or bool(g.isfinite().all()) for b, g in zip(bad, grads, strict=True))
            after = everything(net, state)
            assert (before == after) == exact, "residuals moved" if exact else "nothing moved"
            for entry in state.state_dict()["parameters"].values():
                for kept in entry.values():
                    assert not isinstance(kept, Tensor) or bool(kept.isfinite().all())
            continue  # as GradScaler or a guard would: no optimizer step
        steps_of(net, opt, rank, [step], ddp)
        steps_of(clean, clean_opt, rank, [step], clean_ddp)
    assert state.stats()["non_finite_steps"] == 1
    assert clean_state.stats()["non_finite_steps"] == 0
    if exact:
        assert everything(net, state) == everything(clean, clean_state)
    return [bits(p) for p in net.parameters()]


def _spoil_once() -> Any:
    done = []

    def fill_nan(grad: Tensor) -> Tensor:
        if done:
            return grad
        done.append(True)
        return with_nan(grad)

    return fill_nan


def with_nan(grad: Tensor) -> Tensor:
    """A gradient with one element filled_with_nan."""
    grad = grad.clone()
    grad.view(-1)[7] = float("nan")
    return grad


def scaled(rank: int, ranks: int, how: str, options: dict[str, Any] | None = None) -> list[bytes]:
    """With a loss scale that doubles and halves, residuals follow: powers of two change nothing."""
    scales = [8.0, 8.0, 16.0, 4.0, 4.0, 1.0]

    class Scaler:
        def get_scale(self) -> float:
            return scale

    scale = scales[0]
    options = options or {}
    unlike = dict(options)
    if how == "rescale" and "clip_norm" in options:  # in the unit that gradients have at first
        unlike["clip_norm"] = scale * options["clip_norm"]
    net, ddp, state, opt = setup(scaler=Scaler() if how == "scaler" else None, **unlike)
    plain, plain_ddp, plain_state, plain_opt = setup(**options)
    for step, new in enumerate(scales):
        if how == "rescale" and step and new != scale:
            state.rescale(new / scale)
        scale = new
        opt.zero_grad()
        (scale * loss_of(ddp, rank, step)).backward()
        for p in net.parameters():
            p.grad /= scale
        opt.step()
        steps_of(plain, plain_opt, rank, [step], plain_ddp)
        assert [bits(p) for p in net.parameters()] == [bits(p) for p in plain.parameters()], step
    return [bits(p) for p in net.parameters()]


def grad_scaler(rank: int, ranks: int) -> list[Any]:
    """torch's own GradScaler: an infinity on one rank skips the step everywhere."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    net, ddp, state, opt = setup(scaler=scaler, ddp={}, exact_skip=True)
    scales = []
    for step in range(7):
        opt.zero_grad()
        loss = scaler.scale(loss_of(ddp, rank, step))
        before = [bits(p) for p in net.parameters()]
        (loss * (float("inf") if step == 4 and rank == 0 else 1.0)).backward()
        scaler.step(opt)
        scaler.update()
        scales.append(scaler.get_scale())
        assert (before == [bits(p) for p in net.parameters()]) == (step == 4)
    assert scales == [4.0, 8.0, 8.0, 16.0, 8.0, 8.0, 16.0], scales
    assert state.stats()["non_finite_steps"] == 1 and state.step == 6
    return [bits(p) for p in net.parameters()]


# --------------------------------------------------------------------------- disagreement


def other_state(rank: int, ranks: int, what: str) -> Any:
    """Rank 1 makes another state than the others."""
    odd = rank == 1
    codec = BlockInt(4) if odd and what == "codec" else QSGD(4)
    options: dict[str, Any] = {"min_numel": 100, "seed": 1 if odd and what == "seed" else 0}
    if odd and what == "exclude":
        options["exclude"] = ["*.bias"]
    if odd and what == "invalid":
        options["warmup_steps"] = -1
    ddp = DDP(model())
    if what == "name" and odd:
        net = model()
        net.other = net[0]
        net = torch.nn.Sequential(*net)
        names = [(f"odd.{name}", p) for name, p in net.named_parameters()]
        return raised_by(lambda: CompressionState(codec, named_parameters=names, **options))
    if what == "name":
        names = list(ddp.named_parameters())
        return raised_by(lambda: CompressionState(codec, named_parameters=names, **options))
    found = raised_by(lambda: compress(ddp, codec, **options))
    still_works(rank, ranks)
    return found


def other_layout(rank: int, ranks: int, static: bool) -> Any:
    """Codecs that only differ by a predicate: seen at the first bucket, before any payload."""
    net = model()
    ddp = DDP(net, static_graph=static)
    state = compress(
        ddp, QSGD(4), min_numel=100,
        exclude=lambda name, param: rank == 1 and name == "2.weight",
    )  # fmt: skip
    found = raised_by(lambda: loss_of(ddp, rank, 0).backward())
    assert all(bool(p.grad.isnan().all()) for p in net.parameters()), "garbage"
    assert state.stats()["wire_bytes"] == 0
    again = raised_by(lambda: loss_of(ddp, rank, 1).backward())
    assert again[0] == found[0], "the second backward fares no better"
    still_works(rank, ranks)
    return found


class WithSparse(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.table = torch.nn.Embedding(50, 8, sparse=True)
        self.dense = torch.nn.Linear(8, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.table(x))


def sparse(rank: int, ranks: int) -> list[bytes]:
    """A sparse gradient travels raw, as a dense one, and comes back sparse."""
    ddp = DDP(WithSparse())
    state = compress(ddp, QSGD(4), min_numel=100)
    bare = WithSparse()
    for step in range(2):
        ddp.zero_grad()
        ddp(torch.arange(6) + 4 * rank + step).sum().backward()
        grads = []
        for other in range(ranks):
            bare.zero_grad()
            bare(torch.arange(6) + 4 * other + step).sum().backward()
            grads.append(bare.table.weight.grad.to_dense())
        got = ddp.module.table.weight.grad
        assert got.is_sparse and got.sparse_dim() == 1
        wanted = sum(grads[1:], grads[0]) / ranks
        assert torch.equal(got.to_dense(), wanted), "mean of dense gradients"
    assert state.stats()["fallbacks"]["sparse gradient"] == {"parameters": 1, "elements": 400}
    return [bits(ddp.module.table.weight.grad.to_dense()), bits(ddp.module.dense.weight.grad)]


def fails_on_one_rank(rank: int, ranks: int) -> Any:
    """A parameter that only one rank's state does not know."""
    net = model()
    ddp = DDP(net, **SMALL)
    state = compress(ddp, QSGD(4), min_numel=100)
    steps_of(net, torch.optim.SGD(net.parameters(), lr=0.1), rank, [0], ddp)
    if rank == 1:
        state.parameters._places.pop(net[4].weight)
    found = raised_by(lambda: loss_of(ddp, rank, 1).backward())
    still_works(rank, ranks)
    return found


def after_destruction(rank: int, ranks: int) -> Any:
    """The hook of a broken group raises at the end of backward instead of waiting."""
    group = dist.new_group(list(range(ranks)))
    net = model()
    ddp = DDP(net, process_group=group, **SMALL)
    state = compress(ddp, QSGD(4), min_numel=100)
    state.communicator.shutdown()
    return raised_by(lambda: loss_of(ddp, rank, 0).backward())


# --------------------------------------------------------------------------- in DDP


def joined(rank: int, ranks: int, **options: Any) -> list[bytes]:
    """Ranks have different numbers of batches."""
    net, ddp, state, opt = setup(**options)
    alone = rank + 2
    with ddp.join():
        for step in range(alone):
            opt.zero_grad()
            loss_of(ddp, rank, step).backward()
            opt.step()
    assert state.stats()["steps"] == ranks + 1
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, state.step)
    assert everyone == [ranks + 1] * ranks
    # After the last batches only the last rank had a gradient: the mean is over all ranks.
    return [bits(p) for p in net.parameters()]


class Checkpointed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)


def composed(rank: int, ranks: int) -> list[bytes]:
    """Checkpointed activations and a compiled model give the same bits."""
    plain, plain_ddp, _, plain_opt = setup()
    net = Checkpointed()
    ddp = DDP(net, **SMALL)
    compress(ddp, Sign("l1", block=64), min_numel=100)
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    steps_of(plain, plain_opt, rank, range(3), plain_ddp)
    steps_of(net, opt, rank, range(3), ddp)
    wanted = [bits(p) for p in plain.parameters()]
    assert [bits(p) for p in net.parameters()] == wanted
    net = model()
    compiled = DDP(torch.compile(net, backend="aot_eager"))
    state = compress(compiled, Sign("l1", block=64), min_numel=100)
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    steps_of(net, opt, rank, range(3), compiled)
    assert [bits(p) for p in net.parameters()] == wanted
    assert list(state.state_dict()["parameters"]) == ["0.weight", "2.weight", "4.weight"]
    return wanted


class Odd(torch.nn.Module):
    """Types that codecs do not take."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.wide = torch.nn.Parameter(torch.randn(40, dtype=torch.float64))
        self.twofold = torch.nn.Parameter(torch.randn(33, dtype=torch.complex64))
        self.usual = torch.nn.Parameter(torch.randn(500))

    def forward(self, factor: float) -> Tensor:
        return factor * (self.wide.square().sum() + self.twofold.abs().square().sum().double()
                         + self.usual.square().sum().double())  # fmt: skip


def odd_types(rank: int, ranks: int) -> list[bytes]:
    """Travel raw, in the same way, and are counted with their reason."""
    net = Odd()
    ddp = DDP(net)
    state = compress(ddp, QSGD(4), min_numel=100)
    ddp(float(rank + 1)).backward()
    mean = sum(range(1, ranks + 1)) / ranks
    torch.testing.assert_close(net.wide.grad, 2 * mean * net.wide.detach(), rtol=1e-15, atol=0)
    torch.testing.assert_close(net.twofold.grad, 2 * mean * net.twofold.detach())
    fallbacks = state.stats()["fallbacks"]
    assert fallbacks["codecs do not take torch.float64"] == {"parameters": 1, "elements": 40}
    assert fallbacks["codecs do not take torch.complex64"]["parameters"] == 1
    return [bits(torch.view_as_real(p.grad) if p.is_complex() else p.grad)
            for p in net.parameters()]  # fmt: skip


class Writer:
    def __init__(self) -> None:
        self.seen: dict[str, float] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        assert step == 3
        self.seen[name] = value


def observed(rank: int, ranks: int) -> Any:
    """Warm-up, then compressed: what stats, log and profiler say."""
    before = dict(communicator().traffic.bytes_sent)
    net, ddp, state, opt = setup(QSGD(4, block=64), warmup_steps=1, exclude=["2.*"], ddp={},
                                 algorithm="two_phase")  # fmt: skip
    reference, reference_ddp = model(), None
    reference_ddp = DDP(reference)
    loss_of(reference_ddp, rank, 0).backward()
    steps_of(net, opt, rank, [0], ddp)
    exact = [bool((p.grad - q.grad).abs().max() < 1e-6)
             for p, q in zip(net.parameters(), reference.parameters(), strict=True)]  # fmt: skip
    assert all(exact), exact
    warm = state.stats()
    assert set(warm["fallbacks"]) == {"warm-up"} and warm["residual_bytes"] == 0
    threads = torch.profiler._ExperimentalConfig(profile_all_threads=True)
    with torch.profiler.profile(experimental_config=threads) as profile:
        steps_of(net, opt, rank, [1, 2], ddp)
    phases = {f"pydist.{phase}" for phase in ("agree", "encode", "wait", "reduce", "decode")}
    missing = {"pydist.compression_hook", *phases} - {event.key for event in profile.key_averages()}
    assert not missing, missing
    writer = Writer()
    state.log(writer)
    summary = state.stats()
    assert writer.seen["pydist/wire_bytes"] == summary["wire_bytes"]
    assert summary["fallbacks"] == {
        "excluded by '2.*'": {"parameters": 2, "elements": 1230},
        "fewer than 100 elements": {"parameters": 2, "elements": 60},
    }
    # All that the group sent meanwhile, but for the agreement at construction.
    traffic = state.communicator.traffic.bytes_sent
    sent = sum(traffic.values()) - sum(before.values()) - 16 * (ranks - 1)
    assert summary["wire_bytes"] == sent, (summary["wire_bytes"], sent)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("pydist.ddp")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    state.log_summary()
    logger.removeHandler(handler)
    assert len(lines) == 1 and "3 steps" in lines[0] and "excluded by '2.*'" in lines[0], lines
    return warm["wire_bytes"], summary["wire_bytes"], summary["ratio"]


def no_names(rank: int, ranks: int) -> Any:
    state = CompressionState(QSGD(4))
    return [
        raised_by(lambda: CompressionState({"*": QSGD(4)})),
        raised_by(lambda: state.rescale(0.0)),
        raised_by(lambda: compress([torch.nn.Linear(2, 2)], QSGD(4))),
        raised_by(lambda: compression_hook(state, (torch.ones(2), torch.ones(2)))),
    ]

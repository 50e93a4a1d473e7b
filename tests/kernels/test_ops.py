"""The torch operators: schemas, fake kernels, tracing and compilation."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pydist import QSGD, BlockFloat, BlockInt, Sign, TopK, ops
from pydist.formats import wire

N = 37
BETAS = {"beta1": 0.9, "beta2": 0.99}


def table(*lengths: int) -> Tensor:
    return torch.from_numpy(wire.segments(lengths))


def flags() -> Tensor:
    return torch.zeros(1, dtype=torch.int32)


def votes(rows: int, n: int = N) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    shape = (rows, wire.payload_bytes(n))
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def values(n: int = N, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)


FOUR = BlockInt(4, 32)
TENTH = TopK(0.1, 32)


def payloads(ranks: int, n: int = N) -> Tensor:
    return torch.stack([ops.quantize(values(n) * (r + 1), FOUR) for r in range(ranks)])


def selected(ranks: int) -> Tensor:
    return torch.stack([ops.topk_select(values() * (r + 1), TENTH) for r in range(ranks)])


# (operator, arguments, keyword arguments)
CASES: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "pack_signs": ("pack_signs", (values(),), {}),
    "pack_signs flags": ("pack_signs", (values(),), {"flags": flags(), "zero_bit": 0}),
    "pack_signs 2-d": ("pack_signs", (values(35).view(5, 7).t(),), {}),
    "pack_signs empty": ("pack_signs", (values(0),), {}),
    "unpack_votes": ("unpack_votes", (votes(1), N), {}),
    "unpack_votes mean": (
        "unpack_votes",
        (votes(3), N),
        {"ranks": 5, "mean": True, "dtype": torch.bfloat16},
    ),
    "count_votes": ("count_votes", (votes(4),), {}),
    "majority_vote": ("majority_vote", (votes(4),), {"n": N, "seed": 3, "step": 5}),
    "majority_vote step": (
        "majority_vote",
        (votes(4),),
        {"n": N, "step": torch.tensor([5])},
    ),
    "majority_vote zero": ("majority_vote", (votes(4),), {"ties": "zero"}),
    "majority_vote segments": (
        "majority_vote",
        (votes(4, 64),),
        {"segments": table(5, 32)},
    ),
    "lion_pack_": ("lion_pack_", (values(), values(N)), BETAS),
    "lion_pack_ out": (
        "lion_pack_",
        (values(dtype=torch.bfloat16), values()),
        {**BETAS, "momentum_out": values(), "flags": flags(), "binarization_range": 1.0},
    ),
    "lion_pack_ step": (
        "lion_pack_",
        (values(), values(N)),
        {**BETAS, "binarization_range": 1.0, "step": torch.tensor([5])},
    ),
    "lion_apply_": ("lion_apply_", (values(), votes(1)), {"lr": 0.1}),
    "lion_apply_ strided": ("lion_apply_", (values(2 * N)[::2], votes(1)), {"lr": 0.1}),
    "lion_apply_ counts": (
        "lion_apply_",
        (values(dtype=torch.float16), votes(3)),
        {"lr": 0.1, "weight_decay": 0.1, "ranks": 5, "skip": flags()},
    ),
    "lion_apply_ segments": (
        "lion_apply_",
        (values(), votes(1, 64)),
        {"lr": 0.1, "segments": table(5, 32)},
    ),
    "pack_signs out": ("pack_signs", (values(),), {"out": votes(1)[0], "flags": flags()}),
    "unpack_votes out": (
        "unpack_votes",
        (votes(3), N),
        {"ranks": 5, "out": values(dtype=torch.float16)},
    ),
    "count_votes out": ("count_votes", (votes(4),), {"out": votes(3)}),
    "majority_vote out": ("majority_vote", (votes(4),), {"ties": "zero", "out": votes(2)}),
    "lion_pack_ into": ("lion_pack_", (values(), values(N)), {**BETAS, "out": votes(1)[0]}),
    "quantize": ("quantize", (values(), BlockInt(4, 32)), {}),
    "quantize stochastic": (
        "quantize",
        (values(dtype=torch.bfloat16), QSGD(3, 32, "l2")),
        {"seed": 1, "rank": 2, "step": 3, "flags": flags()},
    ),
    "quantize step": (
        "quantize",
        (values(), QSGD(3, 32)),
        {"step": torch.tensor([2**40 + 7])},
    ),
    "quantize empty": ("quantize", (values(0), BlockFloat("e4m3")), {}),
    "quantize_feedback_": ("quantize_feedback_", (values(), values(), Sign("l1", 32)), {}),
    "quantize_feedback_ strided": (
        "quantize_feedback_",
        (values(), values(2 * N)[::2], BlockFloat("e5m2", 32)),
        {"flags": flags()},
    ),
    "sum_quantized": ("sum_quantized", (payloads(3), FOUR, N), {"mean": True}),
    "reduce_quantized": ("reduce_quantized", (payloads(3), FOUR, N), {"mean": True, "rank": 1}),
    "dequantize": ("dequantize", (payloads(1)[0], FOUR, N), {"dtype": torch.bfloat16}),
    "sum_values": ("sum_values", (values(2 * N).view(2, N),), {"mean": True, "flags": flags()}),
    "sum_values out": ("sum_values", (values(N).view(1, N),), {"out": values()}),
    "quantize out": ("quantize", (values(), FOUR), {"out": payloads(1)[0]}),
    "quantize_feedback_ into": (
        "quantize_feedback_",
        (values(), values(), FOUR),
        {"out": payloads(1)[0]},
    ),
    "sum_quantized out": ("sum_quantized", (payloads(2), FOUR, N), {"out": values()}),
    "reduce_quantized out": (
        "reduce_quantized",
        (payloads(2), FOUR, N),
        {"out": payloads(1)[0], "flags": flags()},
    ),
    # The length of these payloads depends on the table's values.
    "pack_signs segments": ("pack_signs", (values(),), {"segments": table(5, 32)}),
    "lion_pack_ segments": (
        "lion_pack_",
        (values(), values()),
        {**BETAS, "segments": table(5, 32)},
    ),
    "quantize segments": ("quantize", (values(), FOUR), {"segments": table(5, 32)}),
    "topk_select": ("topk_select", (values(), TENTH), {"seed": 3, "flags": flags()}),
    "topk_select step": ("topk_select", (values(), TENTH), {"step": torch.tensor([7])}),
    "topk_select segments": ("topk_select", (values(), TENTH), {"segments": table(5, 32)}),
    "topk_feedback_": ("topk_feedback_", (values(), values(), TENTH), {}),
    "topk_feedback_ into": (
        "topk_feedback_",
        (values(), values(), TENTH),
        {"out": selected(1)[0]},
    ),
    "topk_scatter": ("topk_scatter", (selected(3), TENTH, N), {"mean": True}),
    "topk_scatter out": ("topk_scatter", (selected(2), TENTH, N), {"out": values()}),
    "topk_reduce": ("topk_reduce", (selected(3), TENTH, N), {"mean": True, "flags": flags()}),
    "topk_reduce out": ("topk_reduce", (selected(3), TENTH, N), {"out": selected(1)[0]}),
    "topk_clear_": ("topk_clear_", (values(), selected(1)[0], TENTH), {}),
}


def cloned(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of their own for each run; strides are kept."""

    def clone(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
        return copy.copy_(x)

    return [clone(x) for x in args], {name: clone(x) for name, x in kwargs.items()}


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str) -> None:
    name, args, kwargs = CASES[case]
    positional, named = cloned(args, kwargs)
    if name == "dequantize":  # no operator of its own
        name, positional[0] = "sum_quantized", positional[0][None]
    codecs = [x for x in positional if hasattr(x, "block_format")]
    if codecs:
        positional.remove(codecs[0])
        form = codecs[0].topk_format if isinstance(codecs[0], TopK) else codecs[0].block_format
        named |= dataclasses.asdict(form)
    if "out" in named:
        name = f"{name[:-1]}_out_" if name.endswith("_") else f"{name}_out"
    if isinstance(named.get("step"), Tensor):
        named["step_tensor"] = named.pop("step")
    operator = getattr(torch.ops.pydist, name).default
    torch.library.opcheck(operator, tuple(positional), named)


def _same(actual: Any, expected: Any) -> bool:
    if not isinstance(actual, Tensor):
        return bool(actual == expected)
    raw = [x.contiguous().view(-1).view(torch.uint8) for x in (actual, expected)]
    return actual.shape == expected.shape and torch.equal(*raw)


@pytest.mark.parametrize("case", [name for name in CASES if not name.endswith("empty")])
def test_compiled_equals_eager(case: str) -> None:
    name, args, kwargs = CASES[case]
    function: Callable[..., Any] = getattr(ops, name)
    positional, named = cloned(args, kwargs)
    expected = function(*positional, **named)
    traced, traced_named = cloned(args, kwargs)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        result = compiled(*traced, **traced_named)
    assert _same(result, expected)
    for place, (actual, wanted) in enumerate(zip(traced, positional, strict=True)):
        assert _same(actual, wanted), f"argument {place}"
    for key, wanted in named.items():
        assert _same(traced_named[key], wanted), key


@pytest.mark.soak  # half a minute of compilation
def test_compiled_by_inductor() -> None:
    def step(x: Tensor, grad: Tensor, momentum: Tensor) -> Tensor:
        payload = ops.lion_pack_(grad * 2.0, momentum, **BETAS)
        planes = ops.majority_vote(torch.stack([payload, payload]), n=x.numel())
        ops.lion_apply_(x, planes, lr=0.1)
        return x + 1.0

    eager, traced = ([values(), values(N), values()] for _ in range(2))
    expected = step(*eager)
    torch._dynamo.reset()
    with torch._inductor.config.patch(compile_threads=1):  # a pool of compilers starts slowly
        result = torch.compile(step, fullgraph=True)(*traced)
    assert _same(result, expected)
    assert all(_same(a, e) for a, e in zip(traced, eager, strict=True))


def test_traced_with_symbolic_lengths() -> None:
    torch._dynamo.reset()
    seen: list[int] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(len(graph.graph.nodes))
        return graph

    compiled = torch.compile(ops.pack_signs, fullgraph=True, dynamic=True, backend=count)
    for n in (5, 33, 1001):
        assert torch.equal(compiled(values(n)), ops.pack_signs(values(n)))
    assert len(seen) == 1, "compiled anew for another length"


# --------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("name", ["lion_apply_", "lion_pack_", "quantize_feedback_"])
def test_changes_in_place_are_seen_by_autograd(name: str) -> None:
    weight = values().requires_grad_()
    changed = weight if name == "lion_apply_" else weight.detach()
    loss = (weight * weight).sum()
    with torch.no_grad():
        if name == "lion_apply_":
            ops.lion_apply_(changed, votes(1), lr=0.1)
        elif name == "quantize_feedback_":
            ops.quantize_feedback_(values(), changed, FOUR)
        else:
            ops.lion_pack_(values(), changed, **BETAS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_payloads_need_no_gradient() -> None:
    assert not ops.pack_signs(values().requires_grad_()).requires_grad
    with torch.inference_mode():
        assert ops.pack_signs(torch.ones(3)).tolist() == [7, 0, 0, 0]


def test_in_place_on_a_lazily_negated_view() -> None:
    complex_values = torch.view_as_complex(values(2 * 32).view(32, 2))
    view = complex_values.conj().imag
    assert view.is_neg()
    expected = view.clone()
    ops.lion_apply_(expected, votes(1, 32), lr=0.1)
    ops.lion_apply_(view, votes(1, 32), lr=0.1)
    assert torch.equal(view, expected)


# --------------------------------------------------------------------------- who looks at operators


COMPILED_FIRST = """
import torch
from pydist import ops
x = torch.randn(64)
f = torch.compile(lambda x: ops.pack_signs(x), fullgraph=True, backend="aot_eager")
assert torch.equal(f(x), ops.pack_signs(x))
"""


def test_a_compiled_call_may_be_the_first() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPILED_FIRST], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


def test_traced_calls_are_operators() -> None:
    traced = torch.jit.trace(lambda x: ops.pack_signs(x), values(), check_trace=False)
    assert "pydist::pack_signs" in str(traced.graph)
    other = -values()
    assert torch.equal(traced(other), ops.pack_signs(other))


def test_fake_tensors_anywhere_among_the_arguments() -> None:
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(votes(1))
    with pytest.raises((ValueError, RuntimeError, AssertionError)):
        ops.lion_apply_(values(), fake, lr=0.1)


def test_calls_inside_of_a_transform() -> None:
    def loss(x: Tensor) -> Tensor:
        assert ops.pack_signs(x.detach()).dtype == torch.uint8
        return x.square().sum()

    assert torch.equal(torch.func.grad(loss)(values()), 2 * values())


def test_calls_are_seen_by_the_profiler() -> None:
    with torch.profiler.profile() as profile:
        ops.pack_signs(values())
    assert "pydist::pack_signs" in {event.key for event in profile.key_averages()}

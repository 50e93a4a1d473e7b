"""Every argument of every kernel, of a wrong type: a TypeError that names it, and a short one."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

from pydist import BlockInt, Ternary, TopK, arrays, ops
from pydist.kernels.arguments import wrong_argument

MODULES = {"ops": ops, "arrays": arrays}
FUNCTIONS = [(door, name) for door, module in MODULES.items() for name in module.__all__]


def array_of(door: str, dtype: str = "int32") -> Any:
    x = np.zeros(64, dtype=dtype)
    return torch.from_numpy(x) if door == "ops" else x


def kind_of(parameter: inspect.Parameter) -> str:
    """The first kind of its annotation."""
    return str(parameter.annotation).split(" | ")[0]


def usual(door: str, function: Any) -> dict[str, Any]:
    """An argument of the right type for everything that must be given."""
    codecs = {"tern": Ternary(), "topk": TopK(0.1, 64)}
    codec = codecs.get(function.__name__[:4], BlockInt(4, 32))
    parameters = inspect.signature(function).parameters.values()
    return {
        p.name: {"A": array_of(door), "int": 3, "float": 0.5}.get(kind_of(p), codec)
        for p in parameters
        if p.default is p.empty
    }


@pytest.mark.parametrize(("door", "name"), FUNCTIONS)
def test_wrong_types(door: str, name: str) -> None:
    function = getattr(MODULES[door], name)
    given = usual(door, function)
    assert not wrong_argument(function, (), given)
    signature = inspect.signature(function)
    for argument, parameter in signature.parameters.items():
        kinds = str(parameter.annotation).split(" | ")
        for wrong in (None, "text", [1.0], object()):
            right = (wrong is None and "None" in kinds) or (wrong == "text" and "str" in kinds)
            if right or parameter.annotation in ("Segments", "DType"):
                continue
            with pytest.raises(TypeError) as raised:
                function(**(given | {argument: wrong}))
            message = str(raised.value)
            # Several may be wrong, as the usual ones are zeros of int32; this one's type is first.
            assert message.startswith(argument) and len(message) < 160, (argument, wrong, message)


@pytest.mark.parametrize("name", ["quantize", "topk_select", "elias_encode", "ternary_unpack"])
def test_array_in_the_place_of_a_codec(name: str) -> None:
    for door, module in MODULES.items():
        function = getattr(module, name)
        given = usual(door, function)
        argument = next(
            (a for a, v in given.items() if isinstance(v, BlockInt | TopK | Ternary)), "n"
        )
        with pytest.raises(TypeError) as raised:
            function(**(given | {argument: array_of(door)}))
        assert argument in str(raised.value) and len(str(raised.value)) < 160


def test_sparse_tensors() -> None:
    x = torch.eye(8).to_sparse()
    for call in (ops.pack_signs, lambda y: ops.quantize(y, BlockInt(4, 32))):
        with pytest.raises(TypeError, match="x must be dense, got layout torch.sparse_coo"):
            call(x)


@pytest.mark.parametrize("kept", [0, 400])
def test_tensors_whose_storage_was_freed(kept: int) -> None:
    x = torch.ones(1000)
    x.untyped_storage().resize_(kept)
    for call in (ops.pack_signs, lambda y: ops.topk_select(y, TopK(0.1, 64))):
        with pytest.raises(ValueError, match=rf"x has 1000 elements, .* has {kept} bytes"):
            call(x)
    with pytest.raises(ValueError, match="out has 1000 elements"):
        ops.unpack_signs(torch.zeros(128, dtype=torch.uint8), 1000, out=x)


def test_negative_views() -> None:
    """The imaginary part of a conjugate is a view that negates its memory."""
    z = torch.complex(torch.randn(100), torch.randn(100))
    negative = z.conj().imag
    assert negative.is_neg()
    assert torch.equal(ops.pack_signs(negative), ops.pack_signs(-z.imag))
    momentum = torch.zeros(100)
    ops.lion_pack_(negative, momentum, beta1=0.9, beta2=0.5)
    assert torch.equal(momentum, -z.imag * 0.5)


def test_what_is_right_costs_nothing() -> None:
    """The error of a call whose types are right stays as it is."""
    with pytest.raises(ValueError, match="zero_bit must be 0 or 1, got 2") as raised:
        ops.pack_signs(torch.ones(3), zero_bit=2)
    assert raised.value.__cause__ is None

"""One list of kernels: whoever goes through all of them finds the same ones."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch

import pydist
from pydist import _C, arrays, ops, selfcheck
from pydist.bench.options import FAMILIES
from pydist.kernels.register import KERNELS

ROOT = Path(__file__).resolve().parents[2]
STUB = ROOT / "pydist" / "_C.pyi"
COMPOSED = {"dequantize"}  # of another, in Python
OF_THE_HOST = {"crc32c", "seal_messages", "first_damaged"}  # checksums, of no array
OF_THE_DEVICE = {"find_used", "keep_used", "put_headers", "merge_headers", "fill_nan"}
CHECKED_WITH = {
    "ternary_unpack_sums": "ternary_unpack", "topk_clear_": "topk_select",
    "unpack_signs": "unpack_votes",
}  # fmt: skip
NATIVE = {"sum_quantized": "dequantize", "unpack_signs": "unpack_votes"}  # in the compiled module
INSIDE = {"topk_clear_"}  # an option of another kernel of the compiled module


def native_names() -> set[str]:
    return {NATIVE.get(name, name.removesuffix("_")) for name in KERNELS if name not in INSIDE}


def names_of(module: Any) -> set[str]:
    return {name for name in dir(module) if not name.startswith("_")}


def test_front_ends_have_them_all() -> None:
    assert set(ops.__all__) == set(arrays.__all__) == set(KERNELS) | COMPOSED
    for name in ops.__all__:
        assert getattr(ops, name) is getattr(arrays, name)


@pytest.mark.parametrize("name", KERNELS)
def test_operators(name: str) -> None:
    """Each is an operator; and another one, where there is a result."""
    twin = f"{name[:-1]}_out_" if name.endswith("_") else f"{name}_out"
    assert hasattr(torch.ops.pydist, name)
    has_out = "out" in inspect.signature(KERNELS[name].function).parameters
    assert hasattr(torch.ops.pydist, twin) == has_out


def test_the_self_check_has_them_all() -> None:
    checked = {CHECKED_WITH.get(name, name).removesuffix("_") for name in KERNELS}
    assert set(selfcheck.KERNELS) == checked


def test_the_compiled_module_has_them_all() -> None:
    assert names_of(_C.cpu) == native_names() | OF_THE_HOST


@pytest.mark.emulated
@pytest.mark.skipif(emulated.MODULE is None, reason="the emulated kernels are not built")
def test_the_emulated_module_has_them_all() -> None:
    assert names_of(emulated.MODULE.cuda) == native_names() | OF_THE_DEVICE | {
        "device_count", "device_name",
    }  # fmt: skip


def test_aarch64_has_them_all() -> None:
    tree = ast.parse((ROOT / "tests" / "aarch64" / "remote.py").read_text())
    (listed,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "KERNELS"
    )
    assert set(listed) == native_names() | OF_THE_HOST
    methods = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert {f"_{name}" for name in listed} <= methods


def test_the_benchmark_has_them_all() -> None:
    listed = {name for family in FAMILIES.values() for name in family}
    through_others = {"unpack_votes", "topk_clear_"}  # unpack_signs, topk_scatter: the same code
    assert set(KERNELS) - listed == through_others
    assert listed - set(KERNELS) == COMPOSED


# --------------------------------------------------------------------------- the stub


def stub() -> dict[str, set[str]]:
    """Names of the stub, by class; those of the module by an empty name."""
    names: dict[str, set[str]] = {"": set()}
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.AnnAssign):
            names[""].add(ast.unparse(node.target))
        elif isinstance(node, ast.FunctionDef):
            names[""].add(node.name)
        elif isinstance(node, ast.ClassDef) and node.name in ("cpu", "cuda"):
            names[node.name] = {
                ast.unparse(x.target) if isinstance(x, ast.AnnAssign) else x.name
                for x in node.body
                if isinstance(x, ast.AnnAssign | ast.FunctionDef)
            }
        elif isinstance(node, ast.ClassDef):
            names[""].add(node.name)
    return names


def test_the_stub_names_what_is_there() -> None:
    known = stub()
    assert known["cpu"] == names_of(_C.cpu)
    assert known["cuda"] == native_names() | OF_THE_DEVICE | {"device_count", "device_name"}
    assert known[""] | {"cpu"} == names_of(_C) - {"cuda"}


def argument_counts() -> dict[str, int]:
    """Arguments of the constructors, as the stub has them."""
    return {
        node.name: len(init.args.posonlyargs) - 1
        for node in ast.parse(STUB.read_text()).body
        if isinstance(node, ast.ClassDef)
        for init in node.body
        if isinstance(init, ast.FunctionDef) and init.name == "__init__"
    }


@pytest.mark.parametrize(("name", "count"), argument_counts().items())
def test_the_stub_has_the_arguments(name: str, count: int) -> None:
    text = str(getattr(_C, name).__init__.__doc__)
    assert len(re.findall(r"arg\d+: ", text)) == count, text


# --------------------------------------------------------------------------- types

TYPES = """
import numpy as np
import torch
from typing import Any
from pydist import QSGD, arrays, ops

x, a = torch.ones(3), np.ones(3, dtype=np.float32)
reveal_type(ops.pack_signs(x))
reveal_type(ops.quantize(x, QSGD(4), seed=1))
reveal_type(arrays.pack_signs(a))
reveal_type(arrays.topk_clear_)
ops.pack_signs(x, out=a)
ops.pack_signs([1.0])
"""


def test_type_checkers_see_the_kind_of_array(tmp_path: Path) -> None:
    """Tensor in, tensor out; array in, array out; never both."""
    pytest.importorskip("mypy")
    file = tmp_path / "typed.py"
    file.write_text(TYPES)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", file],  # with the cache of make lint
        capture_output=True, text=True, timeout=100, cwd=Path(pydist.__file__).parents[1],
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert 'Revealed type is "torch._tensor.Tensor"' in lines[0], done.stdout + done.stderr
    assert 'Revealed type is "torch._tensor.Tensor"' in lines[1]
    assert "ndarray" in lines[2] and "Tensor" not in lines[2]
    assert 'cannot be "object"' in lines[4], lines
    assert 'cannot be "list[float]"' in lines[5] and len(lines) == 6, lines

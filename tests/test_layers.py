"""Imports go down only, and what needs no torch works without it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pydist

PACKAGE = Path(pydist.__file__).parent

# A module imports from layers below its own, or from its own package. A new module needs a line.
LAYERS = [
    {"_C", "arguments", "errors", "wire"},
    {"blocks", "reference", "ternary"},
    {"reference_blocks", "reference_message", "reference_raw", "elias", "topk"},
    {"reference_elias", "reference_ternary", "reference_topk"},
    {"checks"},
    {"kernels"},
    {"block_kernels"},
    {"elias_kernels", "ternary_kernels", "topk_kernels"},
    {"array_backends", "operators"},
    {"block_operators", "elias_operators", "raw_operators", "ternary_operators", "topk_operators"},
    {"elias_arrays", "elias_ops"},
    {"block_arrays", "block_ops", "ternary_arrays"},
    {"ternary_ops", "topk_arrays", "topk_ops"},
    {"ops", "arrays", "environment"},
    {"selfcheck"},
    {"transport"},
    {"groups", "norms", "series", "staging"},
    {"codecs", "communicator"},
    {"parcels"},
    {"road"},
    {"hierarchy"},
    {"collectives"},
    {"momentum", "simulate"},
    {"feedback"},
    {"training"},
    {"ddp", "optim"},
    {"fsdp"},
    {"bench"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
TORCH_FREE = {
    "__init__",
    "wire",
    "blocks",
    "reference",
    "reference_blocks",
    "reference_message",
    "reference_raw",
    "elias",
    "reference_elias",
    "reference_ternary",
    "ternary",
    "arguments",
    "checks",
    "kernels",
    "block_kernels",
    "elias_kernels",
    "ternary_kernels",
    "array_backends",
    "block_arrays",
    "elias_arrays",
    "ternary_arrays",
    "topk",
    "reference_topk",
    "topk_kernels",
    "topk_arrays",
    "arrays",
    "errors",
    "environment",
    "cli",
}


def unit_of(path: Path) -> str:
    """The module or subpackage directly below pydist that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Full names of what a file imports; `if TYPE_CHECKING:` is for the type checker alone."""
    names: set[str] = set()
    nodes: list[ast.AST] = list(ast.parse(path.read_text()).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            nodes.extend(node.orelse)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(PACKAGE.parent).parts[: -node.level] if node.level else ()
            home = ".".join([*package, *([node.module] if node.module else [])])
            names.update(f"{home}.{alias.name}" for alias in node.names)
        elif not (top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            nodes.extend(ast.iter_child_nodes(node))
    return names


def units_imported(path: Path) -> set[str]:
    parts = [name.split(".") for name in imported(path)]
    return {part[1] for part in parts if part[0] == "pydist" and len(part) > 1}


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = unit_of(path)
    assert own in LEVEL, f"pydist/{own} has no layer yet: add it to LAYERS"
    for other in units_imported(path) - {own}:
        if other in LEVEL:  # else a name of pydist/__init__.py itself, such as __version__
            assert LEVEL[other] < LEVEL[own], f"pydist.{own} imports pydist.{other}"


def test_the_check_sees_every_kind_of_import(tmp_path: Path) -> None:
    source = """
if TYPE_CHECKING:
    from pydist import cli
from pydist import kernels
def f():
    import pydist.ops
"""
    path = tmp_path / "wire.py"
    path.write_text(source)
    assert imported(path) == {"pydist.kernels", "pydist.ops"}
    assert imported(path, top_level_only=True) == {"pydist.kernels"}


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if unit_of(path) in TORCH_FREE], ids=lambda path: path.name
)
def test_no_torch_at_import(path: Path) -> None:
    names = imported(path, top_level_only=True)
    assert not [name for name in names if name.split(".")[0] in ("torch", "cupy")]


WITHOUT_TORCH = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "cupy", "ml_dtypes"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTorch())
import pydist, numpy
assert not {"torch", "pydist.ops"} & set(sys.modules)
x = numpy.array([1, -1, 1], dtype=numpy.float32)
payload = pydist.arrays.pack_signs(x)
assert payload.tolist() == [5, 0, 0, 0], payload
pydist.arrays.lion_apply_(x, payload[None], lr=1.0)
assert x.tolist() == [0, 0, 0], x
from pydist.cli import main
assert main(["info"]) == 0
try:
    pydist.ops
except ModuleNotFoundError as error:
    assert error.name == "torch", error
else:
    raise AssertionError("pydist.ops came without torch")
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip


def test_without_torch() -> None:
    done = run_python(WITHOUT_TORCH)
    assert done.returncode == 0, done.stderr


def test_import_does_not_import_torch() -> None:
    done = run_python("import pydist, pydist.arrays, sys; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr

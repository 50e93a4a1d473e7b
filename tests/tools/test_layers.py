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
sys.path.append(str(Path(__file__).parents[2] / "tools"))

import house  # noqa: E402

SOURCES = sorted(PACKAGE.rglob("*.py"))
TORCH_FREE = {
    "__init__", "__main__", "arrays", "cli", "codecs", "errors", "formats", "reference",
}  # fmt: skip
TORCH_KERNELS = {"operators", "torch_tensors"}
CALLS_C = {
    "arrays.py": "the instruction set, as it is imported",
    "bench/kernels.py": "how the module was built",
    "bench/worker.py": "a module of the caller's in its place",
    "selfcheck/backends.py": "the instruction sets",
    "transport/message.py": "checksums of messages, which no array is",
}
ALSO_SEND = {
    "ddp/local.py": "local steps: torch's own all-reduce among near ranks",
    "fsdp/sharded.py": "what stays uncompressed goes the way it would without pydist",
    "integrations/lightning.py": "what a checkpoint gathers, as Lightning writes one file",
    "optim/checkpoint.py": "a checkpoint's gather",
    "optim/replicas.py": "weights of rank 0, once",
    "optim/shards.py": "one number among the ranks of a sharded parameter",
}
SENDS = {
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all",
    "all_to_all_single", "batch_isend_irecv", "broadcast", "gather", "irecv", "isend", "recv",
    "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "send",
}  # fmt: skip


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_rooms_have_layers() -> None:
    rooms = {house.room_of(module) for module in house.module_imports(PACKAGE)}
    assert rooms == set.union(*house.LAYERS), "a room of pydist/ needs its layer in tools/house.py"


def test_imports_go_down() -> None:
    assert house.upward(PACKAGE) == []


def test_no_circles() -> None:
    assert house.circles(house.module_imports(PACKAGE)) == []


def test_the_house_stays_small() -> None:
    assert len(set.union(*house.LAYERS)) <= 20
    assert len(house.LAYERS) <= 6
    assert len([path for path in SOURCES if path.parent == PACKAGE]) <= 9


def test_only_the_self_check_imports_the_reference() -> None:
    assert {a for a, b in house.arrows(PACKAGE) if b == "reference"} == {"selfcheck"}


def test_only_kernels_call_the_compiled_module() -> None:
    found = {name_of(path) for path in SOURCES if "pydist._C" in house.imports(path, PACKAGE)}
    assert {name for name in found if not name.startswith("kernels/")} == set(CALLS_C)
    assert found - set(CALLS_C)


def sends(path: Path) -> bool:
    """Whether a file calls a collective of ``torch.distributed``."""
    calls = (
        node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
    )
    return any(
        isinstance(func, ast.Attribute)
        and func.attr in SENDS
        and isinstance(func.value, ast.Name)
        and func.value.id == "dist"
        for func in calls
    )


def test_only_transport_sends() -> None:
    found = {name_of(path) for path in SOURCES if sends(path)}
    assert {name for name in found if not name.startswith("transport/")} == set(ALSO_SEND)
    assert found - set(ALSO_SEND)


def test_the_check_sees_every_kind_of_import(tmp_path: Path) -> None:
    package = tmp_path / "pydist"
    (package / "formats").mkdir(parents=True)
    (package / "kernels").mkdir()
    for name in ("__init__", "formats/__init__", "kernels/__init__", "cli"):
        (package / f"{name}.py").write_text("")
    (package / "ops.py").write_text("from . import formats\n")
    (package / "formats" / "wire.py").write_text(
        """
if TYPE_CHECKING:
    from pydist import cli
from pydist import kernels
def f():
    import pydist.ops
"""
    )
    graph = house.module_imports(package)
    assert graph["formats.wire"] == {"kernels", "ops"}
    assert graph["ops"] == {"formats"}
    assert house.circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert house.upward(package) == [("formats", "kernels"), ("formats", "ops")]


def imported_at_once(path: Path) -> set[str]:
    """First names of what a file imports as it is imported itself."""
    names: set[str] = set()
    nodes: list[ast.AST] = list(ast.parse(path.read_text()).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            nodes.extend(node.orelse)
        elif isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes.extend(ast.iter_child_nodes(node))
    return names


def is_torch_free(path: Path) -> bool:
    room = house.room_of(house.module_of(path, PACKAGE))
    return room in TORCH_FREE or (room == "kernels" and path.stem not in TORCH_KERNELS)


@pytest.mark.parametrize("path", [p for p in SOURCES if is_torch_free(p)], ids=name_of)
def test_no_torch_at_import(path: Path) -> None:
    assert not imported_at_once(path) & {"torch", "cupy"}


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
        cwd=PACKAGE.parent, env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip


@pytest.mark.parametrize("what", ["ops", "arrays", "all_reduce"])
def test_a_source_tree_without_the_module_says_what_to_do(what: str) -> None:
    done = run_python(f"import sys; sys.modules['pydist._C'] = None; from pydist import {what}")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: pydist._C, the compiled module, is not in"), done.stderr
    assert str(PACKAGE) in last and "pip install -e ." in last


def test_without_torch() -> None:
    done = run_python(WITHOUT_TORCH)
    assert done.returncode == 0, done.stderr


def test_import_does_not_import_torch() -> None:
    done = run_python("import pydist, pydist.arrays, sys; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr

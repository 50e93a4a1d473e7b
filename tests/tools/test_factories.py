"""No tensor of pydist's takes its device or dtype from what a user has set for a thread."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import pydist

PACKAGE = Path(pydist.__file__).parent
# What torch.set_default_device redirects; those that infer their dtype from data need none.
FACTORIES = {
    "arange", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand", "randint",
    "randn", "randperm", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip
SOURCES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.parent.name not in ("bench", "selfcheck")
)


def careless(path: Path) -> list[str]:
    """The calls of factories without ``device=`` or ``dtype=``."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if ast.unparse(node.func.value) != "torch" or node.func.attr not in FACTORIES:
            continue
        given = {keyword.arg for keyword in node.keywords}
        missing = {"device", "dtype"} - given
        if missing and None not in given:  # **options may hold them
            found.append(
                f"line {node.lineno}: {ast.unparse(node)} has no {', '.join(sorted(missing))}"
            )
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_factories_name_device_and_dtype(path: Path) -> None:
    assert not careless(path)

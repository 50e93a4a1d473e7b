"""How the package is built up: ``python tools/house.py [folder]`` prints it, tests hold it.

A room is a folder of ``pydist/`` or a file beside them. Rooms import downward alone; ``LAYERS``
says what is below what. Standard library only.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

LAYERS = (
    {"errors", "formats"},
    {"reference", "kernels", "codecs", "transport"},
    {"encoding", "ops", "arrays"},
    {"collectives", "selfcheck", "bench"},
    {"training", "simulate", "cli"},
    {"ddp", "fsdp", "optim", "integrations", "__main__"},
)
"""From the bottom to the top; rooms of one layer are blind to each other."""

LONG_FUNCTION = 50
"""Lines of a function, without its docstring and decorators."""
LONG_FILE = 450

Arrow = tuple[str, str]


def imports(path: Path, package: Path) -> set[str]:
    """Full names of the package's modules, or of names in them, that a file imports anywhere.

    What stands below ``if TYPE_CHECKING:`` is for the type checker alone.
    """
    names: set[str] = set()
    nodes: list[ast.AST] = list(ast.parse(path.read_text()).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            nodes.extend(node.orelse)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(package.parent).parts[: -node.level] if node.level else ()
            home = ".".join([*above, *([node.module] if node.module else [])])
            names.update(f"{home}.{alias.name}" for alias in node.names)
        else:
            nodes.extend(ast.iter_child_nodes(node))
    return {name for name in names if name.split(".")[0] == package.name}


def module_of(path: Path, package: Path) -> str:
    """A file's dotted name below the package; ``__init__`` for the package's own."""
    parts = list(path.relative_to(package).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def module_imports(package: Path) -> dict[str, set[str]]:
    """What each module of the package imports of it, by modules."""
    files = {module_of(path, package): path for path in sorted(package.rglob("*.py"))}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        graph[module] = set()
        for name in imports(path, package):
            inner = name.split(".", 1)[1] if "." in name else "__init__"
            home = inner.rpartition(".")[0]
            graph[module].add(inner if inner in files else home if home in files else "__init__")
        graph[module] -= {module, "__init__"}
    del graph["__init__"]  # imports by name, when a name is asked for
    return graph


def room_of(module: str) -> str:
    """The room that a module is in."""
    return module.split(".")[0]


def arrows(package: Path) -> set[Arrow]:
    """Rooms and what they import."""
    return {
        (room_of(module), room_of(other))
        for module, others in module_imports(package).items()
        for other in others
        if room_of(module) != room_of(other)
    }


def upward(package: Path) -> list[Arrow]:
    """Arrows that do not go down."""
    level = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
    return sorted((a, b) for a, b in arrows(package) if level.get(b, 99) >= level.get(a, -1))


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of nodes that reach each other."""
    reach = {node: _reachable(graph, node) for node in graph}
    found = {
        tuple(sorted({node, *(n for n in reach[node] if node in reach.get(n, ()))}))
        for node in graph
        if node in reach[node]
    }
    return [list(circle) for circle in sorted(found)]


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    nodes = list(graph[start])
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            nodes.extend(graph.get(node, ()))
    return seen


def levels(graph: dict[str, set[str]]) -> int:
    """Nodes of the longest way down; zero where there are circles."""
    if circles(graph):
        return 0
    depth: dict[str, int] = {}

    def depth_of(node: str) -> int:
        if node not in depth:
            depth[node] = 1 + max((depth_of(n) for n in graph.get(node, ())), default=0)
        return depth[node]

    return max(depth_of(node) for node in graph)


def long_functions(path: Path) -> Iterator[tuple[str, int]]:
    """Names and lines of functions over ``LONG_FUNCTION`` lines, docstrings not counted."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1] if ast.get_docstring(node) and node.body[1:] else node.body[0]
            size = (node.end_lineno or 0) - first.lineno + 1
            if size > LONG_FUNCTION:
                yield node.name, size


def _print(package: Path) -> None:
    files = sorted([*package.rglob("*.py"), *package.rglob("*.pyi")])
    lines = {path: len(path.read_text().splitlines()) for path in files}
    modules = module_imports(package)
    graph: dict[str, set[str]] = {room_of(module): set() for module in modules}
    for a, b in arrows(package):
        graph[a].add(b)
    for room in sorted(graph):
        inside = [p for p in files if room_of(module_of(p, package)) == room]
        size = sum(lines[p] for p in inside)
        below = ", ".join(sorted(graph[room]))
        print(f"{room:14}{len(inside):4} files{size:7,} lines  imports {below}")
    print()
    for path in files:
        for name, size in long_functions(path):
            print(f"{path.relative_to(package)}: {name} has {size} lines")
        if lines[path] > LONG_FILE:
            print(f"{path.relative_to(package)}: {lines[path]} lines")
    top = [path for path in files if path.parent == package and path.suffix == ".py"]
    between_files = circles(modules)
    print(f"\n{len(files)} files, {sum(lines.values()):,} lines, {len(top)} files at the top")
    print(f"{len(graph)} rooms on {levels(graph)} levels, {len(arrows(package))} arrows")
    print(f"upward: {upward(package) or 'none'}")
    print(f"circles: {circles(graph) or 'none'} of rooms, {between_files or 'none'} of files")


if __name__ == "__main__":
    _print(Path(sys.argv[1] if sys.argv[1:] else Path(__file__).parent.parent / "pydist"))

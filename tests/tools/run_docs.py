"""Runs the Python of the documentation: ``python tests/tools/run_docs.py page.md …``.

Blocks fenced as ``python`` run, page by page, in one namespace per page, and so does what stands in
``<!-- run … -->`` before them: what a reader has and the page does not repeat. Blocks with a title
are parts of a reader's own files; they are parsed alone.
"""

from __future__ import annotations

import ast
import os
import re
import socket
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

BLOCK = re.compile(
    r"^(?P<indent> *)```python(?P<title> title=[^\n]*)?\n(?P<code>.*?)^(?P=indent)```$"
    r"|^<!-- run\n(?P<hidden>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)


def blocks(page: Path) -> Iterator[tuple[int, str, bool]]:
    """First line, code and whether it runs, of every block of a page."""
    text = page.read_text()
    for found in BLOCK.finditer(text):
        code = found["hidden"] or found["code"] or ""
        line = text.count("\n", 0, found.start()) + 2
        yield line, code, found["title"] is None


def run(page: Path) -> None:
    """Runs a page; what is raised names its lines."""
    namespace = {"__name__": f"docs_{page.stem}"}
    for line, code, runs in blocks(page):
        # Line numbers of the page, in tracebacks too.
        tree = compile("\n" * (line - 1) + code, str(page), "exec", flags=ast.PyCF_ONLY_AST)
        if runs:
            exec(compile(tree, str(page), "exec"), namespace)


def main() -> int:
    """Runs all pages, each as torchrun would start one rank; how many failed."""
    failed = 0
    for name in sys.argv[1:]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        os.environ |= {
            "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }  # fmt: skip
        before = failed
        try:
            run(Path(name))
        except Exception:
            traceback.print_exc()
            failed += 1
        import torch.distributed as dist

        if dist.is_initialized():
            print(f"{name}: leaves a process group", file=sys.stderr)
            dist.destroy_process_group()
            failed += 1
        print(name, "failed" if failed > before else "ran", flush=True)
    return failed


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())

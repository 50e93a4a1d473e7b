"""What mkdocs needs beside docs/: files of the repository that pages link to."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"\]\(((?:\.\./)+)([^)#]+)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the two pages at the root, and the examples as files."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    for path in sorted([*ROOT.glob("examples/**/*.py"), ROOT / "bench/README.md"]):
        target = str(path.relative_to(ROOT)).replace("README.md", "README.txt")
        files.append(File.generated(config, target, content=path.read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points links that leave docs/ to where those files are in the site."""
    depth = page.file.src_uri.count("/")
    if page.file.src_uri in PAGES.values():  # at the root they link into docs/
        return re.sub(r"\]\((?:docs/)?", lambda m: "](", markdown)

    def moved(found: re.Match[str]) -> str:
        ups, target = found[1].count("../"), found[2]
        if ups <= depth:
            return found[0]
        inside = PAGES.get(target, target.replace("bench/README.md", "bench/README.txt"))
        return "](" + posixpath.join(*[".."] * depth, inside) if depth else "](" + inside

    return LINK.sub(moved, markdown)

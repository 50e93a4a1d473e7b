"""Opens every page of the built documentation in a browser, as wide as a desktop and as a phone.

    python tools/look_at_docs.py build/site --shots build/site-shots

Fails on a page wider than its window, an image that does not load, an error in the console, a link
to a place that the page does not have, markup that was left as it is, and on searches that find
nothing. The pictures are for a person. `make docs-look` runs it; CHROMIUM names the browser.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from playwright.sync_api import TimeoutError, sync_playwright

WIDTHS = {"desktop": (1440, 900), "phone": (390, 844)}
SEARCHES = ("majority vote", "QSGD", "error feedback")
LONGEST = 6000  # pixels of a picture; Chromium draws no more than 16,384
PATIENCE = 300_000  # milliseconds: a busy machine draws slowly

FAULTS = r"""() => {
  const faults = [], page = document.documentElement;
  if (page.scrollWidth > innerWidth) {
    const wide = [...document.querySelectorAll(".md-content *")].find(
      e => e.getBoundingClientRect().right > innerWidth && !e.closest("pre, .md-typeset__table"));
    faults.push(`${page.scrollWidth} pixels wide: ${wide ? wide.outerHTML.slice(0, 90) : ""}`);
  }
  for (const image of document.images)
    if (image.complete && !image.naturalWidth) faults.push("no image: " + image.src);
  for (const link of document.querySelectorAll("article a[href^='#'], .md-nav a[href^='#']")) {
    const place = decodeURIComponent(link.hash.slice(1));
    if (place && !document.getElementById(place)) faults.push("no such place: #" + place);
  }
  const text = document.querySelector("article").cloneNode(true);
  text.querySelectorAll("pre, code, .doc-section-title").forEach(e => e.remove());
  const raw = /``|:(func|class|meth|mod|attr|data|exc):|^\s*(Args|Returns|Raises):$|\]\(/gm;
  for (const left of text.innerText.match(raw) || []) faults.push("markup: " + left.trim());
  return faults;
}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a web server of the folder."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def take(page: Any, shots: Path, name: str) -> None:
    """Saves the whole page, in several pictures where it is long."""
    width, height = page.evaluate("[innerWidth, document.documentElement.scrollHeight]")
    for part, top in enumerate(range(0, height, LONGEST)):
        clip = {"x": 0, "y": top, "width": width, "height": min(LONGEST, height - top)}
        page.screenshot(path=shots / f"{name}-{part + 1}.png", full_page=True, clip=clip)


def found(page: Any, address: str, words: str) -> bool:
    """Whether the search lists a page."""
    page.goto(address, wait_until="networkidle")
    page.locator(".md-search__input").click()
    page.keyboard.type(words)
    with suppress(TimeoutError):
        return bool(page.wait_for_selector(".md-search-result__item", timeout=10_000))
    return False


def main() -> int:
    """Looks at every page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("--shots", type=Path, default=Path("build/site-shots"))
    arguments = parser.parse_args()
    arguments.shots.mkdir(parents=True, exist_ok=True)
    pages = sorted(arguments.site.rglob("*.html"))
    if not pages:
        parser.error(f"{arguments.site} has no pages")
    faults: list[str] = []
    with served(arguments.site) as address, sync_playwright() as playwright:
        chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium)
        for kind, (width, height) in WIDTHS.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(PATIENCE)
            errors: list[str] = []
            page.on("console", lambda m, e=errors: m.type == "error" and e.append(m.text))
            page.on("pageerror", lambda error, e=errors: e.append(str(error)))
            for path in pages:
                relative = path.relative_to(arguments.site).as_posix()
                page.goto(address + relative.removesuffix("index.html"), wait_until="networkidle")
                name = relative.removesuffix(".html").removesuffix("/index").replace("/", "-")
                take(page, arguments.shots, f"{kind}-{name}")
                faults += [f"{relative}, {kind}: {f}" for f in page.evaluate(FAULTS) + errors]
                errors.clear()
            if kind == "desktop":
                empty = [words for words in SEARCHES if not found(page, address, words)]
                faults += [f"search finds nothing: {words}" for words in empty]
        browser.close()
    print("\n".join(faults) or f"{len(pages)} pages: nothing is wrong")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())

"""Check every page of the built site in a real browser.

    python tools/check_site.py [FOLDER] [--screenshots OUT]

Each page of docs/_build/html (`make docs`) is opened at 1280 and at 400 pixels, and in
dark. Findings are errors in the console, files that do not arrive, dead links within
the site, boxes that are cut off on the right, pictures that were not drawn, and
violations of axe-core's rules. Needs Chromium (apt install chromium) and `pip install
playwright axe-playwright-python`; the site is served from this machine, and no other
server is used.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

SITE = Path(__file__).parents[1] / "docs" / "_build" / "html"
VIEWS = (
    (1280, "light", None),
    (400, "light", None),
    (1280, "dark", ["color-contrast"]),
)
"""Width, colours, and axe's rules to check: all, or those that depend on colours."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
]
CUT_OFF = """() => {
  const wide = document.documentElement.scrollWidth - window.innerWidth;
  const found = [];
  if (wide > 0) found.push(`the page is ${wide} pixels wider than the window`);
  const article = document.querySelector("article");
  const edge = article.getBoundingClientRect().right + 1;
  const boxes = ["pre", "table", "img", ".math", "p"];
  const selector = boxes.map((box) => `article ${box}`).join(", ");
  for (const box of document.querySelectorAll(selector)) {
    if (!box.checkVisibility() || box.closest("math")) continue;
    const scrolled = [];
    for (let at = box; at && at.tagName !== "ARTICLE"; at = at.parentElement)
      scrolled.push(["auto", "scroll"].includes(getComputedStyle(at).overflowX));
    const overflows = box.scrollWidth > box.clientWidth + 1 && box.tagName === "PRE";
    const beyond = box.getBoundingClientRect().right > edge;
    if ((overflows && !scrolled[0]) || (beyond && !scrolled.includes(true))) {
      const text = box.textContent.trim().slice(0, 50);
      found.push(`${box.tagName.toLowerCase()} is cut off: ${text}`);
    }
  }
  for (const image of document.images)
    if (image.checkVisibility() && image.complete && !image.naturalWidth)
      found.push(`not drawn: ${image.src}`);
  return found;
}"""
DRAWN = """() => {
  for (const image of document.images) image.loading = 'eager';
  return document.fonts.ready.then(() => 1);
}"""


class Links(HTMLParser):
    """Targets of a page's links, and places on it that can be linked to."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect links of every kind, and identifiers."""
        values = dict(attrs)
        for key in ("href", "src"):
            target = values.get(key)
            if target:
                self.links.append(target)
        for key in ("id", "name"):
            place = values.get(key)
            if place:
                self.places.add(place)


def dead_links(site: Path) -> dict[str, list[str]]:
    """Return the dead links within the site, ``{page: messages}``."""
    pages = {
        page.relative_to(site).as_posix(): Links(page.read_text(encoding="utf-8"))
        for page in pages_of(site)
    }
    found: dict[str, list[str]] = {}
    for name, page in pages.items():
        for link in page.links:
            target, place = urldefrag(urljoin(f"http://site/{name}", link))
            parts = urlsplit(target)
            if parts.netloc != "site" or parts.scheme != "http":
                continue
            path = unquote(parts.path).lstrip("/") or "index.html"
            missing = not (site / path).is_file()
            if not missing and place and path in pages:
                missing = unquote(place) not in pages[path].places
            if missing:
                found.setdefault(name, []).append(f"link that leads nowhere: {link}")
    return found


def pages_of(site: Path) -> list[Path]:
    """Return every page, without sources of modules and static files."""
    left_out = {"_modules", "_static"}
    pages = site.rglob("*.html")
    return sorted(page for page in pages if left_out.isdisjoint(page.parts))


class Quiet(SimpleHTTPRequestHandler):
    """Server of files that logs nothing."""

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@contextmanager
def served(site: Path) -> Iterator[str]:
    """Serve the site on a port of this machine; yield its address."""
    handler = functools.partial(Quiet, directory=str(site))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def browser_path() -> str | None:
    """Return the path of Chromium, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def look(
    site: Path, screenshots: Path | None = None, only: str = ""
) -> Iterator[tuple[str, list[str]]]:
    """Yield each page's name and its findings.

    ``only`` is a part of the names of pages to check.
    """
    from playwright.sync_api import sync_playwright

    dead = dead_links(site)
    names = [file.relative_to(site).as_posix() for file in pages_of(site)]
    with served(site) as address, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browser_path(), args=FLAGS)
        messages: list[str] = []
        views = []
        for width, scheme, rules in VIEWS:
            context = browser.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme
            )
            page = context.new_page()
            listen(page, messages)
            views.append((f"{width} {scheme}", page, rules))
        for name in names:
            if only not in name:
                continue
            findings = list(dead.get(name, []))
            for view, page, rules in views:
                messages.clear()
                page.goto(address + name, wait_until="load")
                page.evaluate(DRAWN)
                texts = [*messages, *page.evaluate(CUT_OFF), *violations(page, rules)]
                findings += [f"{view}: {text}" for text in texts]
                if screenshots is not None:
                    screenshots.mkdir(parents=True, exist_ok=True)
                    stem = name.removesuffix(".html").replace("/", "-")
                    shot = screenshots / f"{stem}-{view.replace(' ', '-')}.png"
                    page.screenshot(path=shot, full_page=True)
            yield name, findings
        browser.close()


def listen(page: Any, messages: list[str]) -> None:
    """Collect a page's errors, and its files that do not arrive."""

    def on_console(message: Any) -> None:
        if message.type in ("error", "warning"):
            messages.append(message.text)

    page.on("console", on_console)
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on(
        "requestfailed",
        lambda request: messages.append(f"did not arrive: {request.url}"),
    )


def violations(page: Any, rules: list[str] | None) -> list[str]:
    """Return a page's violations of axe's rules, each with its first place."""
    from axe_playwright_python.sync_playwright import Axe

    options: dict[str, Any] = {"resultTypes": ["violations"]}
    if rules:
        options["runOnly"] = rules
    texts = []
    for rule in Axe().run(page, options=options).response["violations"]:
        nodes = rule["nodes"]
        target = " ".join(map(str, nodes[0]["target"]))
        where = f"{target} ({len(nodes)} in all)"
        html = nodes[0]["html"][:120]
        texts.append(f"axe {rule['id']}: {rule['help']}: {where}: {html}")
    return texts


def main() -> int:
    """Print the findings; return 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=SITE)
    parser.add_argument("--screenshots", type=Path)
    parser.add_argument("--only", default="", help="pages whose names contain this")
    options = parser.parse_args()
    pages = 0
    findings = 0
    for name, texts in look(options.folder, options.screenshots, options.only):
        pages += 1
        findings += len(texts)
        if texts:
            print(name, *texts, sep="\n    ", flush=True)
    print(f"{pages} pages, {findings} findings")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())

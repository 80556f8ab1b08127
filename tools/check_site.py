"""python tools/check_site.py [FOLDER] [--screenshots OUT]: looks at every page of the
built site in a real browser.

Each page of docs/_build/html (`make docs`) is opened at 1280 and at 400 pixels, and in
dark. A finding is: an error in the console, a file that does not arrive, a link within
the site that leads nowhere, something that is cut off on the right, a picture that was
not drawn, or a violation that axe-core names. Needs Chromium (apt install chromium) and
`pip install playwright axe-playwright-python`; the site is served from this machine and
nothing else is asked for.
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
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

SITE = Path(__file__).parents[1] / "docs" / "_build" / "html"
VIEWS = (
    (1280, "light", None),
    (400, "light", None),
    (1280, "dark", ["color-contrast"]),
)
"""Width, colours, and which of axe's rules are asked: all, or what the colours
change."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]  # fmt: skip
CUT_OFF = """() => {
  const wide = document.documentElement.scrollWidth - window.innerWidth;
  const found = wide > 0 ? [`the page is ${wide} pixels wider than the window`] : [];
  for (const box of document.querySelectorAll("article pre, article table, article img, article .math, article p")) {
    if (!box.checkVisibility() || box.closest("math")) continue;
    const scrolled = [];
    for (let at = box; at && at.tagName !== "ARTICLE"; at = at.parentElement)
      scrolled.push(["auto", "scroll"].includes(getComputedStyle(at).overflowX));
    const own = scrolled[0] || !(box.scrollWidth > box.clientWidth + 1 && box.tagName === "PRE");
    const edge = document.querySelector("article").getBoundingClientRect().right + 1;
    if (!own || (box.getBoundingClientRect().right > edge && !scrolled.includes(true)))
      found.push(`${box.tagName.toLowerCase()} is cut off: ${box.textContent.trim().slice(0, 50)}`);
  }
  for (const image of document.images)
    if (image.checkVisibility() && image.complete && !image.naturalWidth) found.push(`not drawn: ${image.src}`);
  return found;
}"""
DRAWN = "() => { for (const image of document.images) image.loading = 'eager'; return document.fonts.ready.then(() => 1) }"


class Links(HTMLParser):
    """What a page links to, and the places on it that can be linked to."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Links of every kind, and identifiers."""
        named = dict(attrs)
        self.links += [target for key in ("href", "src") if (target := named.get(key))]
        self.places |= {place for key in ("id", "name") if (place := named.get(key))}


def dead_links(site: Path) -> dict[str, list[str]]:
    """By page, the links within the site that lead nowhere."""
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
            missing = not (site / path).is_file() or (
                place and path in pages and unquote(place) not in pages[path].places
            )
            if missing:
                found.setdefault(name, []).append(f"link that leads nowhere: {link}")
    return found


def pages_of(site: Path) -> list[Path]:
    """Every page, sources of modules left out."""
    return sorted(
        page
        for page in site.rglob("*.html")
        if "_modules" not in page.parts and "_static" not in page.parts
    )


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def served(site: Path) -> Iterator[str]:
    """The site on a port of this machine."""
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def browser_path() -> str | None:
    """Where Chromium is, if it is."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def look(
    site: Path, screenshots: Path | None = None, only: str = ""
) -> Iterator[tuple[str, list[str]]]:
    """Page by page, its name and everything that was found. ``only`` takes pages whose
    names hold it."""
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    dead = dead_links(site)
    names = [file.relative_to(site).as_posix() for file in pages_of(site)]
    with served(site) as address, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browser_path(), args=FLAGS)
        said: list[str] = []
        pages = []
        for width, scheme, rules in VIEWS:
            page = browser.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme
            ).new_page()
            page.on(
                "console",
                lambda told: (
                    told.type in ("error", "warning") and said.append(told.text)
                ),
            )
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on(
                "requestfailed",
                lambda asked: said.append(f"did not arrive: {asked.url}"),
            )
            pages.append((f"{width} {scheme}", page, rules))
        for name in (name for name in names if only in name):
            found = dead.get(name, [])
            for view, page, rules in pages:
                said.clear()
                page.goto(address + name, wait_until="load")
                page.evaluate(DRAWN)
                told = [*said, *page.evaluate(CUT_OFF)]
                options = {
                    "resultTypes": ["violations"],
                    **({"runOnly": rules} if rules else {}),
                }
                for rule in Axe().run(page, options=options).response["violations"]:
                    first = rule["nodes"][0]
                    where = f"{' '.join(map(str, first['target']))} ({len(rule['nodes'])} in all)"
                    told.append(
                        f"axe {rule['id']}: {rule['help']}: {where}: {first['html'][:120]}"
                    )
                found = found + [f"{view}: {text}" for text in told]
                if screenshots is not None:
                    screenshots.mkdir(parents=True, exist_ok=True)
                    shot = f"{name.removesuffix('.html').replace('/', '-')}-{view.replace(' ', '-')}.png"
                    page.screenshot(path=screenshots / shot, full_page=True)
            yield name, found
        browser.close()


def main() -> int:
    """Prints what was found; 1 if anything was."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=SITE)
    parser.add_argument("--screenshots", type=Path)
    parser.add_argument("--only", default="", help="pages whose names hold this")
    options = parser.parse_args()
    pages = findings = 0
    for name, texts in look(options.folder, options.screenshots, options.only):
        pages, findings = pages + 1, findings + len(texts)
        if texts:
            print(name, *texts, sep="\n    ", flush=True)
    print(f"{pages} pages, {findings} findings")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())

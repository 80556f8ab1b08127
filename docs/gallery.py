"""The gallery: a page with picture and time for every file of examples/.

Each file is run when the site is built. Its docstring's first sentence has its title
and its subject, the rest is the page's text; ``main(out=folder)`` makes the pictures.
The results of a run (``_build/gallery/``) are kept until the example, the library or a
model changes. An example of a package that is not installed gets a page that says so.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from changed import AT_ONCE, ROOT, hash_of, library_hash
from PIL import Image
from run_example import CHAINS
from sphinx.errors import ExtensionError
from sphinx.util.logging import getLogger

DOCS = ROOT / "docs"
PAGES = DOCS / "gallery"
KEPT = DOCS / "_build" / "gallery"
RUN = DOCS / "run_example.py"
SECONDS = 1800
"""Greatest time of an example."""


@dataclass(frozen=True)
class Example:
    """One file of examples/."""

    path: Path

    @cached_property
    def text(self) -> str:
        """The source without its docstring."""
        source = self.path.read_text(encoding="utf-8")
        end = ast.parse(source).body[0].end_lineno
        return "\n".join(source.splitlines()[end:]).strip() + "\n"

    @cached_property
    def docstring(self) -> str:
        """The docstring."""
        return ast.get_docstring(ast.parse(self.path.read_text(encoding="utf-8"))) or ""

    @property
    def title(self) -> str:
        """The text before the first colon."""
        return self.docstring.partition("\n")[0].partition(":")[0].rstrip(".")

    @property
    def learned(self) -> str:
        """The rest of the first paragraph."""
        return " ".join(self.docstring.partition("\n\n")[0].partition(":")[2].split())

    @property
    def body(self) -> str:
        """The paragraphs after the first; how to run it, which is indented, as code."""
        _, _, text = self.docstring.partition("\n\n")
        paragraphs = [part for part in text.split("\n\n") if part.strip()]
        return "\n\n".join(map(_paragraph, paragraphs))

    @property
    def kept(self) -> Path:
        """The folder of its run."""
        return KEPT / f"{self.path.stem}-{library_hash()}-{hash_of(self.path, RUN)}"


def _paragraph(text: str) -> str:
    """Return a paragraph in Markdown; an indented one is a console's."""
    if not text.startswith("    "):
        return text
    lines = "\n".join(line[4:] for line in text.splitlines())
    return f"```console\n{lines}\n```"


def run(example: Example) -> dict[str, Any]:
    """Run an example, unless nothing changed since it ran; return its record.

    Raises:
        ExtensionError: it failed, took too long or made no picture.
    """
    record = example.kept / "run.json"
    if not _is_current(record):
        for old in KEPT.glob(f"{example.path.stem}-*-*"):
            shutil.rmtree(old)
        example.kept.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(RUN), str(example.path), str(example.kept)]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {
            **os.environ,
            "MPLBACKEND": "agg",
            "PYTHONPATH": path,
            "COLUMNS": "100",
        }
        try:
            subprocess.run(
                command,
                env=environment,
                timeout=SECONDS,
                check=True,
                capture_output=True,
                text=True,
            )
        except subprocess.TimeoutExpired as error:
            raise ExtensionError(
                f"examples/{example.path.name} took more than {SECONDS} s"
            ) from error
        except subprocess.CalledProcessError as error:
            raise ExtensionError(
                f"examples/{example.path.name} failed:\n{error.stderr[-3000:]}"
            ) from error
    found = json.loads(record.read_text(encoding="utf-8"))
    if not found["needs"] and not list(example.kept.glob("*.png")):
        raise ExtensionError(
            f"examples/{example.path.name} leaves no picture: save one into the folder "
            "out="
        )
    return found


def _is_current(record: Path) -> bool:
    """Return whether a run need not be repeated.

    It must, where the package that it lacked is installed now.
    """
    if not record.is_file():
        return False
    needs = json.loads(record.read_text(encoding="utf-8"))["needs"]
    return not needs or find_spec(needs) is None


def page(example: Example, found: dict[str, Any] | None) -> str:
    """The Markdown of an example's page."""
    name = example.path.stem
    parts = [f"# {example.title}", _sentence(example.learned), example.body]
    if found is None:
        parts.append("*The examples were not run for this build.*")
    elif found["needs"]:
        parts.append(
            f"*It needs {found['needs']}, which was not installed where this site was "
            "built.*"
        )
    else:
        parts += [
            f"![{example.title}: {example.learned}](pictures/{picture.name})"
            for picture in pictures(example)
        ]
        parts.append(
            f"With at most {CHAINS} chains it ran {found['seconds']:.0f} s beside "
            f"others on {found['cores']} cores, compilation included "
            f"({found['processor']:.0f} s of processor time)."
        )
    parts.append(f"{{download}}`Download {name}.py <../../examples/{name}.py>`")
    parts += ["## The code", f"```python\n{example.text}```"]
    if found and found["printed"].strip():
        parts += ["## What it prints", f"```text\n{found['printed'].rstrip()}\n```"]
    return "\n\n".join(filter(None, parts)) + "\n"


def pictures(example: Example) -> list[Path]:
    """Return the pictures of a run, that of the example's own name first."""
    return sorted(
        example.kept.glob("*.png"),
        key=lambda file: (file.stem != example.path.stem, file.name),
    )


def card(example: Example, found: dict[str, Any] | None) -> str:
    """The Markdown of an example's card."""
    shown = pictures(example)
    options = [f":link: {example.path.stem}", ":link-type: doc"]
    if shown:
        wide = " wide" if _is_wide(shown[0]) else ""
        options += [
            f":img-top: pictures/{shown[0].name}",
            f":img-alt: What {example.path.name} draws",
        ]
        options.append(f":class-card: example{wide}")
    words = _sentence(example.learned) or example.body.partition("\n\n")[0]
    footer = []
    if found is not None:
        text = f"{found['seconds']:.0f} s"
        if found["needs"]:
            text = f"needs {found['needs']}"
        footer = ["", ":::{card-footer}", text, ":::"]
    return "\n".join(
        [
            f"::::{{grid-item-card}} {example.title}",
            *options,
            "",
            words,
            *footer,
            "::::",
        ]
    )


def _sentence(words: str) -> str:
    """Return text with a capital at its beginning, unless this is a formula."""
    first = words.partition(" ")[0]
    is_word = first[:2].isalpha() and (len(first) > 1 or first == "a")
    return words[:1].upper() + words[1:] if is_word else words


def _is_wide(picture: Path) -> bool:
    """Return whether a picture has panels in a row; a card has room for the first."""
    width, height = Image.open(picture).size
    return width > 2.04 * height  # two panels of a result are 7.4 by 3.6 inches


def index(cards: list[str], names: list[str]) -> str:
    """The Markdown of the gallery's first page."""
    return "\n\n".join(
        [
            "# Gallery",
            "One short file an idea. Each ran when this site was built, most with at "
            f"most {CHAINS} chains; times include compilation. Open one for its code. "
            "In a checkout they are in `examples/`: `python examples/product.py`, or "
            "`composeprob run examples/product.py --chains 2000`.",
            ":::::{grid} 1 2 2 3\n:gutter: 3",
            *cards,
            ":::::",
            "```{toctree}\n:hidden:\n\n" + "\n".join(names) + "\n```",
        ]
    )


def _write(file: Path, content: str | bytes) -> None:
    """Write a file unless it has this content, so that its page is not built again."""
    data = content.encode() if isinstance(content, str) else content
    if not file.is_file() or file.read_bytes() != data:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


def build(app: Any) -> None:
    """Run the examples that changed, some at once, and write the pages."""
    examples = [Example(path) for path in sorted((ROOT / "examples").glob("*.py"))]
    executed = app.config.gallery_run and app.config.nb_execution_mode != "off"

    def record_of(example: Example) -> dict[str, Any] | None:
        kept = (example.kept / "run.json").is_file()
        if executed and not kept:
            getLogger(__name__).info("running examples/%s", example.path.name)
        return run(example) if executed or kept else None

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = dict(zip(examples, pool.map(record_of, examples), strict=True))
    for example in examples:
        for picture in pictures(example):
            _write(PAGES / "pictures" / picture.name, picture.read_bytes())
        _write(PAGES / f"{example.path.stem}.md", page(example, found[example]))
    # Examples that were not run go last.
    examples.sort(key=lambda example: not pictures(example))
    names = [example.path.stem for example in examples]
    for old in {file.stem for file in PAGES.glob("*.md")} - {*names, "index"}:
        (PAGES / f"{old}.md").unlink()
    _write(
        PAGES / "index.md",
        index([card(example, found[example]) for example in examples], names),
    )


def setup(app: Any) -> dict[str, Any]:
    """Make the pages before Sphinx looks for them."""
    app.add_config_value("gallery_run", True, "env", bool)
    app.connect("builder-inited", build)
    return {"parallel_read_safe": True}

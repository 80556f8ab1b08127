"""Every tutorial as a notebook to download, and its picture for cards with links to it.

A page is executed once. Its cells with their outputs become an `.ipynb` beside the page
that runs in Jupyter without Sphinx: Sphinx's own markup becomes Markdown. ``picture:``
at the head of a page is the number of the picture that represents it (1 is the first);
by default it is the last.
"""

from __future__ import annotations

import logging
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
from changed import AT_ONCE
from docutils import nodes
from jupyter_cache import get_cache
from jupyter_cache.executors import load_executor
from measured import measured
from myst_nb.core.read import is_myst_markdown_notebook

MADE = Path(__file__).parent / "tutorials" / "pictures"
FIRST = "%pip install --quiet 'composeprob[all]'"
EXECUTED = "jupyter_execute"


def plain(markdown: str) -> str:
    """Return Markdown without Sphinx's roles.

    Numbers are filled in, and links to other pages become their names.
    """
    markdown = re.sub(
        r"\{measured\}`([^`]*)`", lambda found: measured(found[1]), markdown
    )
    markdown = re.sub(r"\{\w+\}`([^`<]*?)(?:\s*<[^`>]*>)?`", r"\1", markdown)
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)[^)]*\)", r"*\1*", markdown)


def notebook(executed: Path, kept: Path | None = None) -> nbformat.NotebookNode:
    """Return the notebook for readers.

    MyST-NB leaves outputs that are in its cache, ``kept``, out of its file.
    """
    read = nbformat.read(executed, as_version=4)
    if kept is not None:
        with suppress(KeyError):  # executed without a cache
            _, read = get_cache(kept).merge_match_into_notebook(read)
    for cell in read.cells:
        if cell.cell_type == "markdown":
            cell.source = plain(cell.source)
        else:
            # Pages show no progress bar, but those who wait for a cell need one.
            cell.source = cell.source.replace(", progress=False", "")
    install = nbformat.v4.new_code_cell(
        f"# {FIRST}  # where composeprob is not installed yet"
    )
    has_title = bool(read.cells) and read.cells[0].cell_type == "markdown"
    read.cells.insert(int(has_title), install)
    read.metadata = {
        "kernelspec": {
            "name": "python3",
            "display_name": "Python 3",
            "language": "python",
        }
    }
    return read


def _execute(app: Any) -> None:
    """Execute the pages that changed, some at once, as Sphinx reads page after page.

    A page that fails here is executed again when it is read, and reported there.
    """
    if app.config.nb_execution_mode != "cache":
        return
    kept = app.config.nb_execution_cache_path
    quiet = logging.getLogger(__name__)
    quiet.setLevel(logging.CRITICAL)
    texts = {
        str(page): page.read_text(encoding="utf-8")
        for page in sorted(Path(app.srcdir).rglob("*.md"))
    }
    pages = [page for page, text in texts.items() if is_myst_markdown_notebook(text)]
    for page in pages:
        get_cache(kept).add_nb_to_project(
            page, read_data={"type": "plugin", "name": "myst_nb_md"}
        )

    def execute(page: str) -> None:
        executor = load_executor("local-serial", get_cache(kept), logger=quiet)
        executor.run_and_cache(
            filter_uris=[page], timeout=app.config.nb_execution_timeout
        )

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(execute, pages))


def _tutorials_first(app: Any, env: Any, docnames: list[str]) -> None:
    """Cards show the pictures of pages, which these must have made before."""
    docnames.sort(key=lambda name: (name in ("index", "tutorials/index"), name))


def _keep_picture(app: Any, doctree: nodes.document) -> None:
    env = app.env
    docname = getattr(env, "current_document", env).docname
    if not docname.startswith("tutorials/") or docname == "tutorials/index":
        return
    shown = [
        Path(app.srcdir, node["uri"].lstrip("/"))
        for node in doctree.findall(nodes.image)
        if EXECUTED in node["uri"]
    ]
    if shown:
        number = int(env.metadata[docname].get("picture", 0))
        picture = shown[number - 1]
        target = MADE / f"{Path(docname).name}.png"
        if not target.is_file() or target.read_bytes() != picture.read_bytes():
            MADE.mkdir(exist_ok=True)
            shutil.copyfile(picture, target)


def _write_notebooks(app: Any, error: Exception | None) -> None:
    if error is not None or app.builder.name != "html":
        return
    kept = Path(app.config.nb_execution_cache_path)
    for executed in sorted(
        Path(app.outdir).parent.glob(f"{EXECUTED}/tutorials/*.ipynb")
    ):
        if f"tutorials/{executed.stem}" in app.env.found_docs:
            nbformat.write(
                notebook(executed, kept), Path(app.outdir, "tutorials", executed.name)
            )


def _offer(
    app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any
) -> None:
    """A link above the first heading's text."""
    if (
        pagename.startswith("tutorials/")
        and pagename != "tutorials/index"
        and "body" in context
    ):
        file = f"{Path(pagename).name}.ipynb"
        link = (
            f'<p class="download"><a href="{file}" download>'
            "Download as a notebook</a></p>"
        )
        context["body"] = context["body"].replace("</h1>", f"</h1>\n{link}", 1)


def setup(app: Any) -> dict[str, Any]:
    """Cells before a page is read, pictures when it is, links when it is written,
    notebooks when all is done."""
    app.connect("builder-inited", _execute, priority=600)  # after the gallery
    app.connect("env-before-read-docs", _tutorials_first)
    app.connect("doctree-read", _keep_picture, priority=900)
    app.connect("html-page-context", _offer)
    app.connect("build-finished", _write_notebooks)
    return {"parallel_read_safe": False}

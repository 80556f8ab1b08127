"""Sphinx settings: MyST pages, tutorials executed at build, reference from docstrings.

Every warning is an error.
"""

from __future__ import annotations

import os
import re
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

from docutils import nodes
from sphinx.util.logging import getLogger

project = "composeprob"
author = "the composeprob authors"
project_copyright = author
version = release = installed_version("composeprob")

sys.path.insert(0, str(Path(__file__).parent))  # for the extensions of this folder
from changed import library_hash  # noqa: E402

extensions = [
    "accessible",
    "checks_table",
    "counted",
    "gallery",
    "mathml",
    "measured",
    "notebooks",
    "myst_nb",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "README.md", "Thumbs.db"]

html_theme = "furo"
html_title = "composeprob"
html_static_path = ["_static"]
# Pages at former addresses, which lead on to where their text stands now.
html_extra_path = ["_moved"]
html_favicon = "_static/favicon.svg"
html_theme_options = {"top_of_page_buttons": []}
templates_path = ["_templates"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
# A console's prompt and output are not copied.
copybutton_exclude = ".linenos, .gp, .go"

# ── pages and notebooks ───────────────────────────────────────────────────────────────
myst_enable_extensions = [
    "amsmath",
    "attrs_block",
    "attrs_inline",
    "colon_fence",
    "deflist",
    "dollarmath",
    "strikethrough",
]
# MyST warns that text is struck out in HTML only, and the site is HTML.
suppress_warnings = ["myst.strikethrough"]
myst_heading_anchors = 3
# Notebooks draw inline; another backend would leave the pages without pictures.
os.environ.pop("MPLBACKEND", None)
# Outputs are kept by a page's cells, under a name that changes with the library: a page
# runs again when either does.
nb_execution_mode = "cache"
nb_execution_cache_path = str(
    Path(__file__).parent / "_build" / "notebooks" / library_hash()
)
nb_execution_raise_on_error = True
nb_execution_show_tb = True
# Seconds of a cell, as of an example: a machine may be busy with other things too.
nb_execution_timeout = 1800
nb_merge_streams = True
# tqdm and JAX warn notebooks of missing widgets and accelerators.
nb_output_stderr = "remove"

# ── reference ─────────────────────────────────────────────────────────────────────────
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# fields stay in the class's own text, and are not described a second time as members
napoleon_use_ivar = True
napoleon_use_rtype = False
# `MALA` in a docstring links where it can, and is code where it cannot.
default_role = "py:obj"


def _markdown_math(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings write formulas as in Markdown, $…$ and $$…$$; autodoc reads
    reStructuredText."""
    text = "\n".join(lines)

    def displayed(match: re.Match[str]) -> str:
        indent = match["indent"]
        body = "\n".join(
            f"{indent}   {line.strip()}" for line in match["body"].strip().splitlines()
        )
        return f"\n{indent}.. math::\n\n{body}\n\n{indent}"

    text = re.sub(
        r"^(?P<indent>[ ]*)\$\$(?P<body>.+?)\$\$",
        displayed,
        text,
        flags=re.DOTALL | re.MULTILINE,
    )
    text = re.sub(r"(?<![\\$`])\$(?P<body>[^$\n]+)\$", r":math:`\g<body>`", text)
    lines[:] = [_bars(line) for line in text.split("\n")]


def _bars(line: str) -> str:
    """|x| is an absolute value here, not one of docutils' substitutions."""
    if "`" in line or ">>>" in line:
        return line
    return re.sub(r"(?<!\\)\|(?=[^\s|][^|]*\|)", r"\\|", line)


PLOTS = re.compile(r"^\S.*\.plot\(\)", re.MULTILINE)
"""A statement of a cell that plots a result."""


def _require_picture(app, doctree, docname: str) -> None:
    """Warn of a tutorial without a picture, and of a plot that the page lacks."""
    if not docname.startswith("tutorials/"):
        return
    warn = getLogger(__name__).warning
    if not any(doctree.findall(nodes.image)):
        warn("no cell of this tutorial shows a picture", location=docname)
    for cell in doctree.findall(nodes.container):
        if "cell" not in cell["classes"]:
            continue
        plot = PLOTS.search(cell.astext())
        if plot and not any(cell.findall(nodes.image)):
            warn("%s shows no picture", plot[0], location=docname)


def setup(app) -> None:
    """Connect the Markdown formulas and the check of pictures."""
    # Before napoleon (priority 500) reads the sections of docstrings.
    app.connect("autodoc-process-docstring", _markdown_math, priority=400)
    # After myst-nb has chosen the outputs of each cell.
    app.connect("doctree-resolved", _require_picture)

"""Pictures in notebooks: each is shown once, for any end of a cell."""

import json
import re

import pytest

from processes import HASTE, said

RESULTS = """
import composeprob as cp, jax, numpyro.distributions as dist
f = cp.Analytic(dist.Normal(0.0, 1.0), cp.Schedule.log_snr(12))
density = cp.compile(cp.program(lambda f: cp.sample("x", f)), f)
key = jax.random.key(0)
result = cp.infer(density, key, num_chains=4, sampler=cp.Ancestral(), progress=False)
"""
CELLS = {
    "picture()": 1,
    "picture();": 1,  # the semicolon hides a cell's value, but no picture of pyplot
    "figure = picture()": 1,
    "figure = picture()\nfigure": 1,
    "for _ in range(3):\n    picture()": 3,
    "picture()\npicture()": 2,
    "figure": 1,  # of an earlier cell, once more
    "picture().savefig('picture.png')": 1,
    "picture().savefig('picture.png')\nplt.close('all')": 0,
    "1 + 1": 0,
}
FIRST = """
import matplotlib.pyplot as plt
from composeprob.plotting import new_figure, style

def picture():
    with style():
        figure = new_figure(2, 2)
        figure.subplots()
    return figure
"""
SHELL = """
import json, os, sys
os.chdir(os.environ["IPYTHONDIR"])  # where cells save pictures
from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.interactiveshell import InteractiveShell

shown = []  # everything that a notebook's page would get


class Values(DisplayHook):
    def write_format_data(self, format_dict, md_dict=None):
        shown.append(format_dict)


class Published(DisplayPublisher):
    def publish(self, data, *args, **kwargs):
        shown.append(data)


class Shell(InteractiveShell):
    displayhook_class = Values
    display_pub_class = Published

    def enable_gui(self, gui=None):  # pictures inline need no event loop
        pass


shell = Shell.instance()
shell.run_cell(sys.argv[2])
counts = {}
for cell in json.loads(sys.argv[1]):
    shown.clear()
    shell.run_cell(cell, store_history=True).raise_error()
    counts[cell] = sum("image/png" in data for data in shown)
shell.run_cell(sys.argv[3]).raise_error()
pages = []
for cell in ("density", "result"):
    shown.clear()
    shell.run_cell(cell, store_history=True).raise_error()
    pages.append([data.get("text/html", "") for data in shown])
print()
print(json.dumps([counts, pages]))
"""


def test_a_picture_is_shown_once_and_densities_and_results_are_pages(tmp_path):
    pytest.importorskip("IPython")
    pytest.importorskip("matplotlib_inline")
    inline = {
        "IPYTHONDIR": str(tmp_path),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    lines = said(SHELL, json.dumps(list(CELLS)), FIRST, RESULTS, **inline, **HASTE)
    pictures, pages = json.loads(lines[-1])
    assert pictures == CELLS
    (density,), (result,) = pages  # one output each: no picture beside
    assert "π<sub>k</sub>(x) ∝ f(x)" in density
    assert "<svg" in density or "<b>x</b> ∼" in density
    assert "data:image/png;base64," in result
    assert "f(x)" in result
    # A cell's file has a number for a name.
    assert re.search(r"\(In\[\d+\], line 3\)", density), density

"""What `import composeprob` and the command line load: nothing that only some programs need."""

import os
import subprocess
import sys

import numpy as np
import pytest
from jaxtyping import TypeCheckError

import composeprob
from composeprob.results.estimates import Families

USED = "import composeprob; composeprob.program"
KERNEL = """import sys, types
shell = types.SimpleNamespace(config={'IPKernelApp': 1})
sys.modules.update({'ipywidgets': None, 'ipykernel.zmqshell': types.ModuleType('zmqshell')})
sys.modules['IPython'] = types.SimpleNamespace(get_ipython=lambda: shell)"""
HEAVY = ["arviz", "blackjax", "flax", "matplotlib", "optax", "orbax", "scipy.optimize", "scipy.spatial", "tensorstore"]


@pytest.mark.parametrize(
    ("statement", "unwanted", "heard"),
    [("import composeprob.cli", ["jax", "numpy"], False), (USED, HEAVY, False), ("import tqdm.auto", [], True)],
)
def test_what_is_not_loaded_and_what_a_notebook_without_widgets_does_not_hear(statement, unwanted, heard):
    code = f"{KERNEL}; {statement}; print([name for name in {unwanted} if name in sys.modules])"
    command = [sys.executable, "-W", "default", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert ("IProgress not found" in done.stderr) == heard


def test_arviz_has_no_word_of_its_own_in_a_first_run(tmp_path):
    """It keeps the day that it last spoke in the user's cache, which a stranger's does not have."""
    code = "import composeprob.results.arviz_versions"
    home = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-W", "default", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=home)
    assert "ArviZ" not in done.stderr


def test_unknown_names():
    with pytest.raises(AttributeError, match=r"(?s)has no 'progam'.*did you mean 'program'"):
        _ = composeprob.progam
    assert {"SMC", "program", "__version__"} <= set(dir(composeprob))


def test_shapes_of_signatures_are_checked_in_the_tests():
    with pytest.raises(TypeCheckError):
        Families(np.ones(3), np.zeros(2, int))

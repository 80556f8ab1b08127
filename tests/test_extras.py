"""Packages of single features: the library works without them, and a feature whose
package is missing names its extra."""

import json
import tomllib
from pathlib import Path

import pytest

from composeprob.errors import MissingPackageError
from composeprob.extras import EXTRAS, needed
from messages import check_wording
from processes import said
from refusals import refused

ROOT = Path(__file__).parents[1]
MODULES = {
    "huggingface-hub": "huggingface_hub",
    "orbax-checkpoint": "orbax",
}
"""Modules of packages that are not called as these."""
SCRIPT = """
import json, sys, tempfile
hidden = {hidden}
for module in hidden:
    sys.modules[module] = None
import composeprob as cp, jax, numpyro.distributions as dist
import composeprob.cli
folder = tempfile.mkdtemp()
normal = cp.Analytic(dist.Normal(0.0, 1.0), cp.Schedule.log_snr(4))

@cp.program
def program(normal):
    cp.sample("x", normal)

density = cp.compile(program, normal)
key = jax.random.key(0)
options = dict(num_chains=8, sampler=cp.AnnealedMCMC(cp.ULA(0.1), 1))
result = cp.infer(density, key, **options)
print(density, result.summary(), result["x"].shape)
result.report(folder + "/run.html")
result.to_arviz()
result.save(folder + "/run")
cp.Result.load(folder + "/run")
sys.modules["pandas"] = None
recipe = cp.training.Recipe(
    network=lambda key: None, data=lambda key, n: key, schedule=normal.schedule
)
store = cp.Draws(3, store=folder + "/draws")
features = {{
    "graph": density.graph.dot,
    "flax": lambda: cp.load("ring2d"),
    "store": lambda: cp.infer(density, key, draws=store, **options),
    "checkpoint": lambda: cp.infer(density, key, checkpoint_dir=folder, **options),
    "train": recipe.optimiser,
    "pandas": result.to_pandas,
}}
refused = {{}}
for name, feature in features.items():
    try:
        feature()
    except cp.errors.MissingPackageError as error:
        refused[name] = str(error)
try:
    composeprob.cli.app()
except SystemExit as stopped:
    refused["exit code"] = stopped.code
print(json.dumps(refused))
"""


def test_without_the_packages_of_extras():
    packages = {package for names in EXTRAS.values() for package in names}
    # xarray, which every result needs, imports pandas.
    modules = sorted(MODULES.get(package, package) for package in packages - {"pandas"})
    refusals = json.loads(said(SCRIPT.format(hidden=modules))[-1])
    assert refusals.pop("exit code") == 2
    assert set(refusals) == {"graph", "flax", "store", "checkpoint", "train", "pandas"}
    for text in refusals.values():
        check_wording(text)


def test_the_extras_are_those_of_the_distribution():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        assert tuple(line.split(">=")[0] for line in declared[extra]) == packages
    assert declared["all"] == [f"composeprob[{','.join(sorted(EXTRAS))}]"]
    core = {line.split(">=")[0] for line in project["dependencies"]}
    assert not core & {package for names in EXTRAS.values() for package in names}


def test_only_a_package_of_the_extra_is_named_by_it():
    def of_the_extra():
        with needed("graph", "A drawing"):
            raise ModuleNotFoundError(name="graphviz.backend")

    error = refused(of_the_extra, MissingPackageError)
    assert "graphviz" in error.fix
    with (
        pytest.raises(ModuleNotFoundError, match="own"),
        needed("graph", "A drawing"),
    ):
        raise ModuleNotFoundError("my own", name="mine")

"""A third-party trained network, loaded and evaluated here, beside the original.

The original runs in ONNX Runtime.

    python -m benchmarks trained-elsewhere --original PYTHON

PYTHON is that of an environment with the packages adaptive-terrain-diffusion (MIT
licence; its consistency network of heights of terrain is in guided-diffusion's layout),
onnx and onnxruntime. It writes the weights as a state dict, and the outputs of the
original; the state dict goes through tools/convert_guided_diffusion.py. The original
embeds a label, one number, by two layers, which take the place of a table.

A consistency network returns the end of a path from x, and not the mean of x₀: it is a
trained network to load and to compare, and not the score of a density. Exits with 1 if
the outputs differ by more than 1e-4 of the greatest.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from report import publish
from safetensors.numpy import load_file, save_file

import composeprob as cp

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from convert_guided_diffusion import Supplied, convert

MOST = 1e-4
ORIGINAL = """
import importlib.resources, sys
import numpy, onnx, onnxruntime
from onnx import numpy_helper
from safetensors.numpy import save_file
folder = importlib.resources.files("terrain_diffusion").joinpath("weights")
(file,) = folder.glob("*.onnx")
graph = onnx.load(str(file)).graph
arrays = {a.name: numpy_helper.to_array(a) for a in graph.initializer}
state = {}
for name, array in arrays.items():
    if name.startswith("network."):
        state[name.removeprefix("network.")] = array
# A norm became a normalisation and two nameless constants. Each comes right before a
# layer, from whose name the norm's follows.
norm_before = {
    "in_layers.2": "in_layers.0",
    "out_layers.3": "out_layers.0",
    "qkv": "norm",
    "out.2": "out.0",
}
names = []
for node in graph.node:
    if node.op_type == "Conv":
        layer = node.input[1].removeprefix("network.").removesuffix(".weight")
        for end, norm in norm_before.items():
            if layer.endswith(end):
                names.append(layer.removesuffix(end) + norm)
read = {n.input[0]: n for n in graph.node if n.op_type in ("Mul", "Add", "Reshape")}
norms = [n for n in graph.node if n.op_type == "InstanceNormalization"]
assert len(norms) == len(names)
for name, norm in zip(names, norms):
    scaled = read[read[norm.output[0]].output[0]]
    state[name + ".weight"] = arrays[scaled.input[1]].ravel()
    state[name + ".bias"] = arrays[read[scaled.output[0]].input[1]].ravel()
state = {n: numpy.ascontiguousarray(a) for n, a in state.items()}
save_file(state, sys.argv[1] + "/state.safetensors")
session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
random = numpy.random.RandomState(0)
noise = random.standard_normal((2, 1, 128, 128)).astype("f4")
labels = numpy.float32([0.2, 0.9])
found = {}
for sigma in (0.01, 0.3, 2.0, 80.0):
    x = noise * numpy.float32(sigma)
    sigmas = numpy.full(2, sigma, "f4")
    (y,) = session.run(None, {"noisy": x, "sigma": sigmas, "difficulty": labels})
    found |= {f"x{sigma}": x[:, 0, ..., None], f"y{sigma}": y[:, 0, ..., None]}
found = {n: numpy.ascontiguousarray(a) for n, a in found.items()} | {"labels": labels}
save_file(found, sys.argv[1] + "/told.safetensors")
"""


class Consistency(eqx.Module):
    """c_skip·x + c_out·F(c_in·x, 250·log σ), clipped, as the original has it; the
    data's standard deviation is ½.

    References:
        Song et al. 2023, *Consistency models*, appendix C.
    """

    network: Any

    def __call__(self, x: Array, sigma: Array, label: Array) -> Array:
        total = sigma**2 + 0.25
        after = sigma - 0.002
        inner = self.network(
            x / jnp.sqrt(total), 250 * jnp.log(sigma), label=label[None]
        )
        y = 0.25 / (after**2 + 0.25) * x + 0.5 * after / jnp.sqrt(total) * inner
        return jnp.clip(y, -1.0, 1.0)


def load(folder: Path) -> Any:
    """The network of a state dict."""
    state = load_file(folder / "state.safetensors")
    labels = {
        name.removeprefix("label_emb."): state.pop(name)
        for name in list(state)
        if name.startswith("label_emb")
    }
    save_file(state, folder / "network.safetensors")
    supplied = Supplied(128, num_head_channels=32, use_new_attention_order=True)
    convert(folder / "network.safetensors", folder / "here", supplied)
    network = cp.from_diffusers(folder / "here").network
    layers = {"0": "linear_1", "2": "linear_2"}
    found = {
        f"class_embedding.{layers[name[0]]}{name[1:]}": jnp.asarray(array)
        for name, array in labels.items()
    }
    return replace(
        network,
        arrays=network.arrays | found,
        form=replace(network.form, label="projection"),
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--original", required=True, metavar="PYTHON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([arguments.original, "-c", ORIGINAL, name], check=True)
        began = time.perf_counter()
        network = load(folder)
        loaded = time.perf_counter() - began
        told = load_file(folder / "told.safetensors")
    evaluate = jax.jit(jax.vmap(Consistency(network), (0, None, 0)))
    sigmas = sorted(float(key[1:]) for key in told if key.startswith("x"))
    rows, errors = [], []
    for sigma in sigmas:
        y = np.asarray(evaluate(told[f"x{sigma}"], sigma, told["labels"]))
        wanted = told[f"y{sigma}"]
        errors.append(float(np.abs(y - wanted).max() / np.abs(wanted).max()))
        rows.append(
            [
                f"σ = {sigma:g}",
                f"{errors[-1]:.1e}",
                f"{np.abs(wanted - told[f'x{sigma}']).max():.2f}",
            ]
        )
    weights = sum(leaf.size for leaf in jax.tree.leaves(network))
    title = (
        f"A consistency network of {weights / 1e6:.1f} million weights that other "
        "people trained, beside the original"
    )
    head = [
        "",
        "greatest difference of the outputs, of the greatest",
        "greatest change that the original makes",
    ]
    checks = {"the same outputs up to 1e-4": max(errors) <= MOST}
    details = {
        "sigmas": sigmas,
        "errors": errors,
        "weights": weights,
        "seconds to convert and load": loaded,
    }
    shown = "python -m benchmarks trained-elsewhere --original PYTHON"
    return publish(
        "trained_elsewhere", title, head, rows, checks, details, made_by=shown
    )


if __name__ == "__main__":
    sys.exit(main())

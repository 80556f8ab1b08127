"""Write a posterior estimator that sbi has trained (NPSE or FMPE) as one file.

`cp.from_estimator` reads it.

Runs beside torch and sbi 0.27, and needs nothing of composeprob; copy it there:

    from export_sbi import export

    estimator = NPSE(prior).append_simulations(theta, x).train()      # or FMPE(prior)
    export(estimator, "posterior.npz")

or ``python export_sbi.py estimator.pt posterior.npz`` with a file of
``torch.save(estimator, "estimator.pt")``. Such a file is a pickle, which runs code when
it is opened: open your own only. The file that is written has arrays and JSON alone.

Estimators need vector fields of the network "mlp", which is sbi's default. Data may be
standardised and go through an embedding of linear layers and activations. Any other
embedding is left out by ``embedded=True``; conditions are then the outputs of
``estimator.embedding_net``.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from typing import Any

import numpy as np
import torch

LAYERS = (
    "Standardize",
    "Linear",
    "LayerNorm",
    "ReLU",
    "GELU",
    "SiLU",
    "Tanh",
    "ELU",
    "Flatten",
)
NUMBERS = (
    "noise_scale",
    "gaussian_baseline",
    "beta_min",
    "beta_max",
    "sigma_min",
    "sigma_max",
    "t_min",
    "t_max",
)


def export(estimator: Any, path: str, embedded: bool = False) -> None:
    """Write the file.

    Args:
        estimator: the estimator that ``train()`` returned.
        path: path of the file, ending in .npz.
        embedded: leave the embedding net out; conditions are then its outputs.

    Raises:
        TypeError: an estimator, network or embedding that cannot be written.
    """
    network = getattr(estimator, "net", None)
    if type(network).__name__ != "VectorFieldMLP":
        raise TypeError(
            f"{type(estimator).__name__} has the network {type(network).__name__}; "
            'only VectorFieldMLP is written: train NPSE or FMPE with the network "mlp".'
        )
    arrays: dict[str, torch.Tensor] = {
        f"net.{name}": array for name, array in network.state_dict().items()
    }
    arrays |= {"mean_0": estimator.mean_0, "std_0": estimator.std_0}
    arrays |= {"shift": estimator._theta_shift, "scale": estimator._theta_scale}
    layers = [] if embedded else flat(estimator.embedding_net)
    embedding = []
    for i, layer in enumerate(layers):
        kind = type(layer).__name__
        if kind not in LAYERS or (kind == "GELU" and layer.approximate != "none"):
            raise TypeError(
                f"The embedding has a layer {kind}; pass embedded=True, and its "
                "outputs as conditions."
            )
        embedding.append(kind)
        for name, array in layer.state_dict().items():
            arrays[f"embedding.{i}.{name}"] = array
    described = {
        "package": "sbi",
        "version": importlib.metadata.version("sbi"),
        "kind": type(estimator).__name__,
        "activation": type(network.activation).__name__,
        "skip": bool(network.skip_connections),
        "condition_shape": None if embedded else list(estimator.condition_shape),
        "embedding": embedding,
    }
    for name in NUMBERS:
        if hasattr(estimator, name):
            described[name] = float(getattr(estimator, name))
    numbers = {
        name: array.detach().cpu().float().numpy() for name, array in arrays.items()
    }
    np.savez_compressed(path, described=np.array(json.dumps(described)), **numbers)


def flat(module: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers of a chain, one after another."""
    if isinstance(module, torch.nn.Identity):
        return []
    if isinstance(module, torch.nn.Sequential):
        return [layer for member in module for layer in flat(member)]
    if type(module).__name__ == "FCEmbedding":
        return flat(module.net)
    return [module]


if __name__ == "__main__":
    export(torch.load(sys.argv[1], weights_only=False), sys.argv[2])

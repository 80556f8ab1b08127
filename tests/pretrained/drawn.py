"""Weights of a state dict from the shapes alone: the same wherever they are drawn, so
that no file has to hold them."""

from collections.abc import Mapping

import numpy as np


def weights(shapes: Mapping[str, list[int]], seed: int) -> dict[str, np.ndarray]:
    """Every array drawn anew, such that no layer is silent and none blows up; norms and
    biases are no 1 and 0."""
    random = np.random.RandomState(seed)  # whose numbers numpy has promised to keep
    found = {}
    for name, shape in shapes.items():
        noise = random.standard_normal(shape)
        if len(shape) > 1 and "label" not in name:
            noise /= np.prod(shape[1:]) ** 0.5
        elif name.endswith("weight") and len(shape) == 1:
            noise = 1 + 0.2 * noise
        else:
            noise *= 0.3
        found[name] = noise.astype(np.float32)
    return found

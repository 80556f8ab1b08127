"""Weights of a state dict drawn for its shapes: the same on every machine, so that no
file has to hold them."""

from collections.abc import Mapping

import numpy as np


def weights(shapes: Mapping[str, list[int]], seed: int) -> dict[str, np.ndarray]:
    """Draw every array such that no layer is silent and none blows up, and such that
    norms and biases are not 1 and 0."""
    random = np.random.RandomState(seed)  # whose numbers numpy has promised to keep
    drawn = {}
    for name, shape in shapes.items():
        noise = random.standard_normal(shape)
        if len(shape) > 1 and "label" not in name:
            noise /= np.prod(shape[1:]) ** 0.5
        elif name.endswith("weight") and len(shape) == 1:
            noise = 1 + 0.2 * noise
        else:
            noise *= 0.3
        drawn[name] = noise.astype(np.float32)
    return drawn

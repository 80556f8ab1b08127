"""Images: of latents by the models of a program, and of events that are images themselves."""

from __future__ import annotations

import numpy as np

from composeprob.errors import CapabilityError
from composeprob.results.record import Record


def images(result: Record, site: str | None) -> np.ndarray:
    """See `Result.images`."""
    if site is not None:
        result[site]  # refuses what is no site
    ways = {} if result.density is None else result.density.described.pictures
    shown = {name for name, values in result.samples.items() if name in ways or is_image(_event(result, values))}
    some = set(ways) if len(ways) == 1 else shown
    name = site if site is not None or len(some) != 1 else next(iter(some))
    if name is None or name not in shown:
        has = ", ".join(map(repr, sorted(shown)))
        raise CapabilityError(
            f"Nothing says how to make images of {name!r}, of shape {_event(result, result[name])}."
            if name
            else "Which site is meant is not clear: not exactly one has images.",
            fix=f"name one of {has}: result.images(site)."
            if has
            else "images have the shape (height, width), (height, width, 1) or (height, width, 3). Latents become some "
            "by their model: those of cp.from_diffusers do where a site has one autoencoder, as a model has that is "
            "loaded once; else, and after Result.load, call model.decode(result[site]).",
        )
    values = result.unweighted()[name]
    return ways[name](values) if name in ways else as_images(values)


def _event(result: Record, values: np.ndarray) -> tuple[int, ...]:
    return tuple(np.shape(values)[1 if result.about.draws is None else 2 :])


def is_image(shape: tuple[int, ...]) -> bool:
    """Says whether events of a shape are images: (H, W), (H, W, 1) or (H, W, 3) with sides of 6 or more."""
    return len(shape) in (2, 3) and min(shape[:2]) >= 6 and (len(shape) == 2 or shape[2] in (1, 3))


def as_images(values: np.ndarray) -> np.ndarray:
    """Events (N, H, W) or (N, H, W, C) as images (N, H, W, C), from 0 to 1; values in [0, 1] or [−1, 1] keep their
    meaning, others are stretched."""
    images = np.nan_to_num(np.asarray(values, float))
    images = images[..., None] if images.ndim == 3 else images
    low, high = (float(end) for end in np.quantile(images, [0.001, 0.999]))  # level 0 still carries some noise
    if low > -0.25 and high < 1.25:
        low, high = 0.0, 1.0
    elif low > -1.5 and high < 1.5:
        low, high = -1.0, 1.0
    return np.clip((images - low) / max(high - low, 1e-12), 0, 1)

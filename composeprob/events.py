"""Events of a site: names of their entries, sequences of tokens, and images."""

from __future__ import annotations

import numpy as np

from composeprob import tuning


def entries(name: str, shape: tuple[int, ...]) -> list[str]:
    """The names of a site's entries: ``x``, or ``x[0, 1]`` and so on."""
    if not shape:
        return [name]
    return [f"{name}[{', '.join(map(str, index))}]" for index in np.ndindex(shape)]


def shown_entries(
    name: str, values: np.ndarray, lead: int
) -> tuple[list[str], np.ndarray]:
    """The names of a site's entries and their values, (…, entries), behind ``lead``
    axes of samples; of many entries their mean alone, as ``x (28×28, pooled)``."""
    shape = values.shape[lead:]
    flat = values.reshape(*values.shape[:lead], -1)
    if flat.shape[-1] <= tuning.SUMMARY.most_rows:
        return entries(name, shape), flat
    pooled = f"{name} ({'×'.join(map(str, shape))}, pooled)"
    return [pooled], flat.mean(-1, keepdims=True)


def is_tokens(values: np.ndarray, lead: int) -> bool:
    """Return whether values are sequences of tokens: whole numbers with an axis of
    positions behind ``lead`` axes of samples."""
    return np.issubdtype(values.dtype, np.integer) and values.ndim > lead


def is_image(shape: tuple[int, ...]) -> bool:
    """Return whether events of a shape are images: (H, W), (H, W, 1) or (H, W, 3) with
    sides of 6 or more."""
    if len(shape) not in (2, 3) or min(shape[:2]) < 6:
        return False
    return len(shape) == 2 or shape[2] in (1, 3)


def as_images(values: np.ndarray) -> np.ndarray:
    """Events (N, H, W) or (N, H, W, C) as images (N, H, W, C), from 0 to 1; values in
    [0, 1] or [−1, 1] keep their meaning, others are stretched."""
    images = np.nan_to_num(np.asarray(values, float))
    if images.ndim == 3:
        images = images[..., None]
    low, high = map(float, np.quantile(images, [0.001, 0.999]))
    # With some room, as level 0 still carries some noise.
    if low > -0.25 and high < 1.25:
        low, high = 0.0, 1.0
    elif low > -1.5 and high < 1.5:
        low, high = -1.0, 1.0
    return np.clip((images - low) / max(high - low, 1e-12), 0, 1)

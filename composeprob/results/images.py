"""Images of a result's samples, made by the models of its program."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from composeprob.errors import CapabilityError, InvalidValueError

if TYPE_CHECKING:
    from composeprob.results.result import Result


def images(result: Result, site: str | None) -> np.ndarray:
    """See `Result.images`."""
    if result.density is None:
        raise InvalidValueError(
            "A result that was loaded from a file has no models to make images with.",
            fix="of latents, model.decode(result.unweighted()[site]) makes them.",
        )
    ways = result.density.described.pictures
    if site is not None:
        result[site]  # refuses what is no site
    name = site if site is not None or len(ways) != 1 else next(iter(ways))
    if name is None or name not in ways:
        has = ", ".join(map(repr, ways))
        raise CapabilityError(
            f"Of the samples of {name!r} no images are known." if name else "Which site's images is not said.",
            fix=f"name one of {has}: result.images(site)."
            if has
            else "images come of models from cp.from_diffusers; other samples are shown by result.plot().",
        )
    return ways[name](result.unweighted()[name])

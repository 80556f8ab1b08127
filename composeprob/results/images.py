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
            fix="load the model, and call model.decode(result.unweighted()[site]).",
        )
    ways = result.density.described.pictures
    if site is not None:
        result[site]  # refuses what is no site
    name = site if site is not None or len(ways) != 1 else next(iter(ways))
    if name is None or name not in ways:
        has = ", ".join(map(repr, ways))
        raise CapabilityError(
            f"No model says how to make images of {name!r}."
            if name
            else "Which site is meant is not clear: not exactly one has images that its models share.",
            fix=f"name one of {has}: result.images(site)."
            if has
            else "models from cp.from_diffusers make images where those of a site have one autoencoder, as a model has "
            "that is loaded once; of several, call model.decode(result[site]). result.plot() shows other samples.",
        )
    return ways[name](result.unweighted()[name])

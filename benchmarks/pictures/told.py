"""Captions, without sampling: does a true caption of a noised scene fit better than one
that is wrong in one word?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import composeprob as cp
from composeprob.models.worlds import captions, shapes

from .captioned import MODEL
from .cells import Cell, share

KEY = 3
SCENES = 300
LOG_SNR = (-2.0, 0.0, 2.0, 6.0, 8.0)
ALIKE = "circle or square"
OTHER = {"circle": "square", "square": "circle"}
"""The kind of wrong caption that exchanges these two shapes, which differ by their
corners."""
WRONG = ("shape", ALIKE, "colour", "place")
OPPOSITE = {
    "on the left": "on the right",
    "on the right": "on the left",
    "at the top": "at the bottom",
    "at the bottom": "at the top",
    "in the middle": "on the left",
}


def cells() -> Iterator[Cell]:
    """All cells."""
    if MODEL in cp.zoo():
        for wrong in WRONG:
            yield Cell("told", {"wrong": wrong}, lambda wrong=wrong: measure(wrong))


def measure(wrong: str) -> tuple[dict[str, Any], np.ndarray]:
    """One cell: at each log-SNR the share of scenes whose true caption has the larger
    log-density."""
    true = jax.device_get(
        jax.jit(lambda key: shapes.draw(key, SCENES))(jax.random.key(KEY))
    )
    pairs, kept = [], []
    for i in range(SCENES):
        one = type(true)(*(field[i : i + 1] for field in true))
        words = _words(one)
        if wrong == ALIKE and words[1] not in OTHER:
            continue
        pair = tuple(
            " ".join(("a", *each)) for each in (words, _replaced(words, wrong))
        )
        if not captions.true_of(pair[1], one)[
            0
        ]:  # another object may make the wrong caption true
            pairs.append([captions.tokens(caption) for caption in pair])
            kept.append(i)
    model: Any = cp.load(MODEL)
    images = true.images[kept]
    noise = jax.random.normal(jax.random.key(KEY + 1), true.images[kept].shape)

    @jax.jit
    def better(log_snr: Any) -> Any:
        alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
        sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))

        def one(event: Any) -> Any:
            clean, normal, pair = event
            fit = jax.vmap(
                lambda caption: model.network(
                    alpha * clean + sigma * normal, log_snr, caption=caption
                )[1]
            )
            right, other = fit(pair)
            return right > other

        return jax.lax.map(
            one, (images, noise, jnp.asarray(np.array(pairs))), batch_size=50
        )

    found = {f"{log_snr:g}": share(better(jnp.float32(log_snr))) for log_snr in LOG_SNR}
    return {"scenes": len(kept), "by_log_snr": found}, images[:0]


def _words(one: Any) -> tuple[str, str, str]:
    """Colour, shape and place of a scene's first object."""
    place = next(
        name
        for name, true in zip(
            captions.PLACES, captions.places(one.centres[0, 0]), strict=True
        )
        if true
    )
    return shapes.COLOURS[one.colours[0, 0]], shapes.SHAPES[one.shapes[0, 0]], place


def _replaced(words: tuple[str, str, str], wrong: str) -> tuple[str, str, str]:
    """The words with the next colour, the next shape, the other of circle and square,
    or the opposite place."""
    colour, shape, place = words
    if wrong == ALIKE:
        return colour, OTHER[shape], place
    if wrong == "colour":
        return _next(shapes.COLOURS, colour), shape, place
    if wrong == "shape":
        return colour, _next(shapes.SHAPES, shape), place
    return colour, shape, OPPOSITE[place]


def _next(options: tuple[str, ...], word: str) -> str:
    return options[(options.index(word) + 1) % len(options)]

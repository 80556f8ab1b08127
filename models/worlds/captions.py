"""What is said of one object of a scene, in words of a closed vocabulary, and whether
it is true of a scene.

A caption is such as "a red circle on the left", "a red object", "a circle at the top"
or "an object in the middle": colour, shape and place may each be left out. It is true
of a scene that has at least one such object; of others it says nothing. Left is where x
< 0.4, right x > 0.6, top y < 0.4, bottom y > 0.6, and the middle where |x − 0.5| and |y
− 0.5| are at most 0.2.
"""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob.errors import InvalidValueError, ShapeError, WrongTypeError

from .detector import Found
from .shapes import COLOURS, SHAPES, Scenes

PLACES = ("on the left", "on the right", "at the top", "at the bottom", "in the middle")
WORDS = (
    "",
    "a",
    "an",
    *COLOURS,
    *SHAPES,
    "object",
    *dict.fromkeys(" ".join(PLACES).split()),
)
"""The vocabulary; a word's token is its index, and 0 is no word."""
LENGTH = 6
"""Words that a caption has at most."""
EMPTY = (0,) * LENGTH
"""The tokens of no caption."""
_SAID = 0.75
"""How often colour, shape and place are each said."""
_TOKENS = {word: i for i, word in enumerate(WORDS)}


class Meaning(NamedTuple):
    """What a caption says: indices into `COLOURS`, `SHAPES` and `PLACES`; None for what
    it leaves open."""

    colour: int | None
    shape: int | None
    place: int | None


def tokens(caption: Any) -> np.ndarray:
    """The tokens of a caption, shape (6,), with 0 after the last word; tokens are
    returned as they are.

    Raises:
        InvalidValueError: a word that is not in the vocabulary, or too many words.
        WrongTypeError, ShapeError: neither text nor tokens.
    """
    if not isinstance(caption, str):
        given = np.asarray(caption)
        if given.dtype.kind not in "iu":
            raise WrongTypeError(
                f"A caption is text; got {type(caption).__name__}.",
                fix='for example "a red circle on the left".',
            )
        if given.shape != (LENGTH,):
            raise ShapeError(
                f"A caption has {LENGTH} tokens; got shape {given.shape}.",
                fix="pass the text itself.",
            )
        return given
    words = caption.lower().replace(",", " ").rstrip(". ").split()
    for word in words:
        if word not in _TOKENS:
            near = difflib.get_close_matches(word, WORDS[1:], n=1, cutoff=0.0)[0]
            raise InvalidValueError(
                f"The word {word!r} is not in the vocabulary of captions.",
                fix=f"did you mean {near!r}? It knows: {', '.join(WORDS[1:])}.",
            )
    if len(words) > LENGTH:
        raise InvalidValueError(
            f"The caption {caption!r} has {len(words)} words; models read {LENGTH}.",
            fix="say one thing, and multiply or divide factors for several: f.given(caption=…) * g.given(caption=…).",
        )
    return np.asarray(
        [_TOKENS[word] for word in words] + [0] * (LENGTH - len(words)), np.int32
    )


def text(given: Any) -> str:
    """The words of tokens (6,)."""
    return " ".join(WORDS[token] for token in np.asarray(given) if token)


def meaning(caption: str) -> Meaning:
    """What a caption says.

    Raises:
        InvalidValueError: a word that is not in the vocabulary.
    """
    words = text(tokens(caption))

    def said(options: tuple[str, ...]) -> int | None:
        return next((i for i, option in enumerate(options) if option in words), None)

    return Meaning(said(COLOURS), said(SHAPES), said(PLACES))


def true_of(caption: str, found: Found) -> np.ndarray:
    """Whether a caption is true of what was found in n images, shape (n,)."""
    colour, shape, place = meaning(caption)
    fits = found.present.copy()
    if colour is not None:
        fits &= found.colours == colour
    if shape is not None:
        fits &= found.shapes == shape
    if place is not None:
        fits &= places(found.centres)[place]
    return fits.any(-1)


def places(centres: Any) -> tuple[Any, ...]:
    """Which of the centres (…, 2), of NumPy or JAX, lie in each of `PLACES`: five
    arrays (…)."""
    x, y = centres[..., 0], centres[..., 1]
    return (
        x < 0.4,
        x > 0.6,
        y < 0.4,
        y > 0.6,
        (abs(x - 0.5) <= 0.2) & (abs(y - 0.5) <= 0.2),
    )


def describe(key: Array, scenes: Scenes) -> Array:
    """Tokens (n, 6) of a caption of each of n scenes, true of it: of one of its
    objects, drawn uniformly, with colour, shape and place each said three times in
    four. Traceable."""
    return jax.vmap(_describe)(jax.random.split(key, len(scenes.count)), scenes)


def reshaped(key: Array, given: Array) -> Array:
    """Captions (n, 6) with another shape, mostly one that is easily taken for it:
    "circle" and "square" become each other with probability 0.8, and every other pair
    of shapes with 0.2; a caption without a shape stays. Traceable."""
    first = _TOKENS[SHAPES[0]]
    odds = jnp.array(
        [[0.0, 0.8, 0.2], [0.8, 0.0, 0.2], [0.2, 0.2, 0.6]]
    )  # symmetric, as `Recipe` asks of `vary`
    shape = jnp.clip(given - first, 0, len(SHAPES) - 1)
    other = first + jax.random.categorical(key, jnp.log(odds)[shape])
    return jnp.where((given >= first) & (given < first + len(SHAPES)), other, given)


def _describe(key: Array, scene: Scenes) -> Array:
    which_key, said_key, place_key = jax.random.split(key, 3)
    which = jax.random.randint(which_key, (), 0, scene.count)
    colour_said, shape_said, place_said = jax.random.bernoulli(said_key, _SAID, (3,))
    holds = jnp.where(jnp.stack(places(scene.centres[which])), 0.0, -jnp.inf)
    place = jax.random.categorical(
        place_key, holds
    )  # at least one place holds every centre
    colour = jnp.where(colour_said, _TOKENS[COLOURS[0]] + scene.colours[which], 0)
    shape = jnp.where(
        shape_said, _TOKENS[SHAPES[0]] + scene.shapes[which], _TOKENS["object"]
    )
    article = jnp.where(colour_said | shape_said, _TOKENS["a"], _TOKENS["an"])
    phrases = jnp.asarray(
        [[_TOKENS[word] for word in phrase.split()] for phrase in PLACES]
    )
    all_words = jnp.concatenate(
        [jnp.stack([article, colour, shape]), jnp.where(place_said, phrases[place], 0)]
    )
    return all_words[jnp.argsort(all_words == 0, stable=True)].astype(jnp.int32)

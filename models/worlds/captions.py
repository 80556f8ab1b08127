"""Captions of one object of a scene, in a closed vocabulary, and their truth.

A caption is such as "a red circle on the left", "a red object", "a circle at the top"
or "an object in the middle": colour, shape and place may each be left out. It is true
of a scene that has at least one such object; of other objects it says nothing. Left is
x < 0.4, right x > 0.6, top y < 0.4, bottom y > 0.6, and the middle |x − 0.5| and |y −
0.5| of at most 0.2.
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
"""Greatest number of words of a caption."""
EMPTY = (0,) * LENGTH
"""The tokens of no caption."""
_MENTIONED = 0.75
"""Probability that colour, shape or place is mentioned."""
_TOKENS = {word: i for i, word in enumerate(WORDS)}


class Meaning(NamedTuple):
    """Meaning of a caption: indices into `COLOURS`, `SHAPES` and `PLACES`.

    None stands for a property that the caption leaves open.
    """

    colour: int | None
    shape: int | None
    place: int | None


def tokens(caption: Any) -> np.ndarray:
    """Return the tokens of a caption, shape (6,), with 0 after the last word.

    Tokens are returned unchanged.

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
            fix="say one thing, and multiply or divide factors for several: "
            "f.given(caption=…) * g.given(caption=…).",
        )
    padding = [0] * (LENGTH - len(words))
    return np.asarray([_TOKENS[word] for word in words] + padding, np.int32)


def text(given: Any) -> str:
    """Return the words of tokens (6,)."""
    return " ".join(WORDS[token] for token in np.asarray(given) if token)


def meaning(caption: str) -> Meaning:
    """Return the meaning of a caption.

    Raises:
        InvalidValueError: a word that is not in the vocabulary.
    """
    words = text(tokens(caption))

    def mentioned(options: tuple[str, ...]) -> int | None:
        for i, option in enumerate(options):
            if option in words:
                return i
        return None

    return Meaning(mentioned(COLOURS), mentioned(SHAPES), mentioned(PLACES))


def true_of(caption: str, found: Found) -> np.ndarray:
    """Return whether a caption is true of some object, for each of n images, (n,)."""
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
    """Return for each of `PLACES` whether centres (…, 2) lie in it: five arrays (…).

    Centres are of NumPy or JAX.
    """
    x = centres[..., 0]
    y = centres[..., 1]
    middle = (abs(x - 0.5) <= 0.2) & (abs(y - 0.5) <= 0.2)
    return x < 0.4, x > 0.6, y < 0.4, y > 0.6, middle


def describe(key: Array, scenes: Scenes) -> Array:
    """Draw a true caption of each of n scenes; return its tokens (n, 6).

    It describes one object, drawn uniformly, and mentions colour, shape and place with
    probability ¾ each. JAX can trace it.
    """
    return jax.vmap(_describe)(jax.random.split(key, len(scenes.count)), scenes)


def reshaped(key: Array, given: Array) -> Array:
    """Return captions (n, 6) with another shape, mostly a similar one.

    "circle" and "square" become each other with probability 0.8, and every other pair
    of shapes with 0.2; a caption without a shape is unchanged. JAX can trace it.
    """
    first = _TOKENS[SHAPES[0]]
    # Symmetric, as `CrossCondition` requires of `vary`.
    odds = jnp.array([[0.0, 0.8, 0.2], [0.8, 0.0, 0.2], [0.2, 0.2, 0.6]])
    shape = jnp.clip(given - first, 0, len(SHAPES) - 1)
    other = first + jax.random.categorical(key, jnp.log(odds)[shape])
    return jnp.where((given >= first) & (given < first + len(SHAPES)), other, given)


def _describe(key: Array, scene: Scenes) -> Array:
    """Draw a true caption of one scene."""
    object_key, mentioned_key, place_key = jax.random.split(key, 3)
    index = jax.random.randint(object_key, (), 0, scene.count)
    has_colour, has_shape, has_place = jax.random.bernoulli(
        mentioned_key, _MENTIONED, (3,)
    )
    # At least one place contains each centre.
    contains = jnp.stack(places(scene.centres[index]))
    logits = jnp.where(contains, 0.0, -jnp.inf)
    place = jax.random.categorical(place_key, logits)
    colour = jnp.where(has_colour, _TOKENS[COLOURS[0]] + scene.colours[index], 0)
    named_shape = _TOKENS[SHAPES[0]] + scene.shapes[index]
    shape = jnp.where(has_shape, named_shape, _TOKENS["object"])
    # Only "object" alone begins with a vowel.
    article = jnp.where(has_colour | has_shape, _TOKENS["a"], _TOKENS["an"])
    phrases = jnp.asarray(
        [[_TOKENS[word] for word in phrase.split()] for phrase in PLACES]
    )
    place_words = jnp.where(has_place, phrases[place], 0)
    words = jnp.concatenate([jnp.stack([article, colour, shape]), place_words])
    # Words that are left out go behind the others.
    return words[jnp.argsort(words == 0, stable=True)].astype(jnp.int32)

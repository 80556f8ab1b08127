"""What a folder's network is to a factor: its skeleton, the events and conditions it takes, the time that it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from jax import Array

from composeprob.json_data import JSON


@dataclass(frozen=True)
class Network:
    """A network's skeleton with what must be known to call it.

    Attributes:
        module: called as ``module(x, t, **conditions)`` on one event; its arrays are `layers.Parameter`s.
        sample_size: height and width of events, or one number for both; None where the file has none.
        channels: of events.
        outputs: channels of the output; twice ``channels`` where the variance is learned too.
        multiple: height and width must be multiples of it.
        time: what it takes of the noise, as `Diffusion`'s ``time``.
        conditions: the shape of each condition.
        classes: how many labels there are; None where labels are not numbered.
        null_label: the label that means "no label"; None where there is none.
    """

    module: Callable[..., Array]
    sample_size: JSON
    channels: int
    outputs: int
    multiple: int
    time: str = "real_level"
    conditions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    classes: int | None = None
    null_label: int | None = None

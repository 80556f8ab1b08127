"""Diffusion models of tokens under uniform noise: score entropy, D3PM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from composeprob.arguments import check_choice, check_count
from composeprob.factors.categorical import (
    TokenFactor,
    check_outputs,
    name_of,
    network_of_tokens,
    shape_of,
)
from composeprob.factors.factor import Traits, check_leaf
from composeprob.factors.networks import Network
from composeprob.factors.uniform_noise import (
    Noised,
    NoisedEvent,
    UniformNoise,
    of_clean,
    of_ratios,
    without_own,
)
from composeprob.schedule import Noise, Schedule

OUTPUTS = ("ratios", "x0")
"""Outputs of a network: log-ratios of neighbours, or logits of the clean tokens."""


class UniformDiffusion(TokenFactor):
    r"""A diffusion model of L tokens under uniform noise: at a level each token is kept
    with probability a, and otherwise replaced by a uniform value,

    $$p_a(x) = \sum_{x_0} p(x_0) \prod_i \big(a\,1\{x_i = x_{0,i}\} + (1-a)/V\big).$$

    Its network gives one of two things at noised tokens x:

    * ``output="ratios"``: log p_a(y)/p_a(x) of the neighbours y, which differ from x in
      one position, as score entropy learns them (SEDD);
    * ``output="x0"``: logits of p(x₀ᵢ | x), the clean token of every position (D3PM,
      uniform-state diffusion).

    The two determine each other: with q(v | u) = a·1{v = u} + (1 − a)/V,

    $$\frac{p_a(x_{i \to v})}{p_a(x)} = \sum_u p(x_{0,i} = u \mid x)\,
      \frac{q(v \mid u)}{q(x_i \mid u)},$$

    and the inverse is p(x₀ᵢ = u | x) ∝ q(x_i | u)·(c_i(u) − (1 − a)/V), with c_i(u) the
    ratios of position i, divided by their sum.

    A program with such a factor has levels of noise instead of reveals, and
    `cp.TauLeaping` moves its tokens. Closed forms are noised exactly; energies and
    classifiers of tokens get an exponent that grows from 0 to 1.

    Args:
        network: ``network(tokens, kept, **conditions)`` returns an array (length,
            num_values). ``tokens`` are integers of shape (length,), all of them
            visible, and ``kept`` is a, a number in (0, 1). Of ratios the entry of the
            token itself does not count. A network of SEDD takes the total noise −log a.
        schedule: the levels to offer. A level's a is α²/(α² + σ²), so that its log-SNR
            is the log-odds of a token to be kept. The network is evaluated at any a
            between those of the first level and the last.
        length: L.
        num_values: V; tokens are 0 … V − 1.
        output: ``"ratios"`` or ``"x0"``.
        conditions: names of the arguments that `given` fixes.
        label: the name to show.

    Raises:
        NetworkError: the network cannot be called so, or returns another shape.
        InvalidValueError: an unknown output, or weights that are NaN.

    Example:
        >>> import composeprob as cp, jax.numpy as jnp
        >>> def mostly_zeros(tokens, kept):
        ...     clean = jnp.log(jnp.array([0.9, 0.1]))
        ...     # The clean token's probability given the noised one.
        ...     same = tokens[:, None] == jnp.arange(2)
        ...     return clean + jnp.log(jnp.where(same, kept, 0.0) + (1 - kept) / 2)
        >>> f = cp.UniformDiffusion(
        ...     mostly_zeros,
        ...     cp.Schedule.log_snr(20),
        ...     length=4,
        ...     num_values=2,
        ...     output="x0",
        ... )
        >>> f
        mostly_zeros (2 values, 4)

    References:
        Austin et al. 2021, *Structured denoising diffusion models in discrete
        state-spaces*; Lou, Meng and Ermon 2024, *Discrete diffusion modeling by
        estimating the ratios of the data distribution*.
    """

    network: Network
    num_values: int = eqx.field(static=True)
    names: tuple[str, ...] = eqx.field(static=True)
    output: str = eqx.field(static=True)

    OFFERS: ClassVar[frozenset[str]] = frozenset({"energy", "normalised"})

    def __init__(
        self,
        network: object,
        schedule: Schedule,
        *,
        length: int,
        num_values: int,
        output: str = "ratios",
        conditions: tuple[str, ...] = (),
        label: str = "",
    ):
        check_choice("output", output, OUTPUTS)
        self.label = label or name_of(network)
        self.network = network_of_tokens(network, self.label)
        self.schedule = schedule
        self.event_shape = check_leaf(schedule, shape_of(length))
        self.num_values = check_count(num_values, "num_values", least=2)
        self.names = tuple(conditions)
        self.output = output
        self.fixed = {}

    @property
    def traits(self) -> Traits:
        return Traits(self.OFFERS, "range", self.names)

    def abstract_event(self) -> Any:
        def blank() -> NoisedEvent:
            kept = jnp.full((), 0.5)
            noise = UniformNoise(kept, kept, kept, kept)
            return NoisedEvent(jnp.zeros((self.length,), jnp.int32), noise)

        return jax.eval_shape(blank)

    def check_network(self) -> None:
        kept = self.abstract_event().noise.kept
        check_outputs(self, "kept", kept, "ratios and logits", number=", a number")

    def noised(self, event: NoisedEvent, conditions: Mapping[str, Array]) -> Noised:
        returned = self.network(event.tokens, event.noise.kept, **conditions)
        logs: Float[Array, "length values"] = jnp.asarray(
            returned, jnp.result_type(float)
        )
        if self.output == "ratios":
            return of_ratios(logs, event)
        posterior = jax.nn.softmax(logs, axis=1)
        return of_clean(without_own(posterior, event), event, None)

    def evaluate(  # type: ignore[override]
        self, x: NoisedEvent, noise: Noise, conditions: Mapping[str, Array]
    ) -> Noised:
        # `closed` records the user's functions by such a call.
        return self.noised(x, conditions)

"""Factors as sites of ordinary NumPyro models: log-densities from the compiler, draws
from a sampler."""

from __future__ import annotations

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
from jax import Array
from jax.custom_batching import custom_vmap
from jaxtyping import Float, Key
from numpyro.util import is_prng_key

from composeprob.arguments import check_count, check_key
from composeprob.compiler.pipeline import compile
from composeprob.density.annealed import AnnealedDensity
from composeprob.errors import CapabilityError, DoublyIntractableError, WrongTypeError
from composeprob.factors.analytic import Analytic
from composeprob.factors.distribution import FactorDistribution
from composeprob.factors.factor import Factor, is_factor
from composeprob.language.decorator import single
from composeprob.runtime.infer import not_a_sampler
from composeprob.samplers.choose import check_capabilities, choose
from composeprob.samplers.random import key_of
from composeprob.samplers.run import begin
from composeprob.samplers.sampler import Sampler
from composeprob.schedule import Schedule

ORDER = 2**32 - 100
"""Series of the first chain's random numbers that shuffles the draws."""


def as_distribution(
    factor: Factor,
    *,
    schedule: Schedule | None = None,
    sampler: Sampler | None = None,
    num_chains: int = 1,
) -> FactorDistribution:
    r"""Make a NumPyro distribution of a factor, for ``numpyro.sample`` in an ordinary
    NumPyro model.

    ``log_prob(x)`` is log f(x) at level 0, the distribution of the samples that `infer`
    returns. It is **unnormalised** unless the factor is `Analytic` or calibrated:
    posteriors do not depend on the constant, but evidences, ``log_prob`` as a number,
    and comparisons between several factors do. For the same reason a factor that is not
    `Analytic` may not depend on a latent of the model.

    ``sample`` runs the sampler. All draws of one call travel as chains of one run, also
    under ``numpyro.infer.Predictive(parallel=True)``, `jax.vmap` and plates. An
    `Analytic` factor is drawn from directly. Make the distribution outside of the
    model, so that it is compiled once.

    Args:
        factor: the factor; events have its shape.
        schedule: the levels to sample along; left out, those of the factor.
        sampler: the sampler; left out, chosen by the number of draws, as in `infer`.
        num_chains: the least number of chains, of which the draws are a random subset:
            for a sampler that needs a population, such as `SMC`.

    Returns:
        A distribution without batch shape. Inside a `program` it is the same as the
            factor.

    Raises:
        DoublyIntractableError: the factor depends on a latent of the model and is not
            `Analytic`.
        CapabilityError: from ``log_prob``: the factor offers only its score (draws need
            no more).
        ConditionError: the factor lacks a condition.
        NetworkError: the factor's network cannot be evaluated.

    Example:
        >>> import composeprob as cp, jax, numpyro, numpyro.distributions as dist
        >>> f = cp.Analytic(dist.Normal(0.0, 1.0), cp.Schedule.log_snr(20))
        >>> prior = cp.as_distribution(f * f)
        >>> round(float(prior.log_prob(1.0) - prior.log_prob(0.0)), 2)
        -1.0
        >>> def model(y):
        ...     x = numpyro.sample("x", prior)
        ...     numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
        >>> value, _ = numpyro.infer.util.log_density(model, (1.0,), {}, {"x": 1.0})
        >>> round(float(value - prior.log_prob(1.0)), 2)
        -0.23
    """
    if not is_factor(factor):
        raise WrongTypeError(
            f"as_distribution takes a factor; got {type(factor).__name__}.",
            fix="wrap a network in cp.Diffusion, a log-density in cp.Energy; "
            "NumPyro's own distributions need nothing.",
        )
    if sampler is not None and not isinstance(sampler, Sampler):
        raise not_a_sampler(sampler)
    check_count(num_chains, "num_chains")
    if isinstance(factor, Analytic):
        return ClosedFactor(factor, schedule or factor.schedule)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(factor)):
        raise DoublyIntractableError(
            "The factor depends on a latent of the model (or on an argument of a "
            "compiled function): its unknown normaliser would depend on it too.",
            fix="make the distribution outside of the model; "
            "only cp.Analytic factors may depend on latents.",
        )
    # Compilation adds no sites to an enclosing model, and stays out of its trace.
    with numpyro.handlers.block(), jax.ensure_compile_time_eval():
        density = compile(single, factor, schedule=schedule)
    return SampledFactor(factor, density, sampler, num_chains)


class ClosedFactor(FactorDistribution):
    """An `Analytic` factor: its exact distribution at level 0, whose parameters may be
    latents."""

    pytree_data_fields = ("exact",)

    def __init__(self, factor: Analytic, schedule: Schedule):
        super().__init__(factor)
        self.exact = factor.at(schedule.at(0))

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        _check_key(key)
        return self.exact.sample(key, sample_shape)

    def log_prob(self, value: Array) -> Array:
        return self.exact.log_prob(value)


class SampledFactor(FactorDistribution):
    """A factor without a closed form: its compiled density and a sampler."""

    pytree_data_fields = ("density", "sampler")
    pytree_aux_fields = ("num_chains",)

    def __init__(
        self,
        factor: Factor,
        density: AnnealedDensity,
        sampler: Sampler | None,
        num_chains: int,
    ):
        super().__init__(factor)
        self.density = density
        self.sampler = sampler
        self.num_chains = num_chains

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        _check_key(key)
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        size = math.prod(sample_shape)
        if size == 0:
            return jnp.zeros((*sample_shape, *self.event_shape))

        # Under vmap all keys of the batch become chains of one run: a population for
        # each key would be a run of one chain.
        draws = custom_vmap(self._draws)

        @draws.def_vmap
        def batched_draws(
            size: int, batched: list[bool], keys: Key[Array, "batch n"]
        ) -> tuple[Array, bool]:
            events = draws(keys.reshape(-1))
            return events.reshape(*keys.shape, *self.event_shape), True

        events = draws(jax.random.split(key, size))
        return events.reshape(*sample_shape, *self.event_shape)

    def _draws(self, keys: Key[Array, " n"]) -> Float[Array, "n ..."]:
        """One draw for each key, by chains of one run.

        May be traced and mapped, unlike `infer`. The order of the draws is random:
        resampling leaves copies of one chain side by side.
        """
        density = self.density
        num_chains = max(len(keys), self.num_chains)
        # The sampler depends on the density's numbers, which are concrete under a trace
        # too.
        with jax.ensure_compile_time_eval():
            sampler = self.sampler
            if sampler is None:
                sampler = choose(density, num_chains)[0]
            check_capabilities(sampler, density)
            sampler = sampler.prepare(density).in_numbers()
            first = sampler.first_level(density)
        return _draw(density, sampler, keys, num_chains, first)["x"]

    def log_prob(self, value: Array) -> Array:
        if "energy" not in self.density.capabilities:
            raise CapabilityError(
                "A NumPyro model needs log_prob, and this factor offers only its "
                "score.",
                fix="use a model trained with an energy parameterization, "
                "or write a cp.program for cp.infer.",
            )
        value = jnp.asarray(value)

        def log_density(x: Array) -> Array:
            return self.density.log_density({"x": x}, 0)

        batched = log_density
        for _ in range(value.ndim - self.event_dim):
            batched = jax.vmap(batched)
        return batched(value)


def _check_key(key: object) -> None:
    """Refuse what is no random key, of NumPyro's old kind or of the typed one."""
    if not is_prng_key(key):
        check_key(key)


@eqx.filter_jit
def _draw(
    density: AnnealedDensity,
    sampler: Sampler,
    keys: Key[Array, " n"],
    num_chains: int,
    first: int,
) -> dict[str, Array]:
    """Run ``num_chains`` chains from level ``first`` to 0; return n of their samples at
    random."""
    n = keys.shape[0]
    words = jax.random.key_data(keys).reshape(n, -1)[:, -2:]
    run = begin(keys[0], num_chains, sampler.visits(density, None))
    # The first n chains take their random numbers from the keys of the draws.
    run = dataclasses.replace(run, words=jnp.concatenate([words, run.words[n:]]))
    run = sampler.start(run, density, first)
    run = sampler.advance(run, density, density.num_levels)
    chosen = jax.random.permutation(key_of(words[0], ORDER), num_chains)[:n]
    samples = jax.vmap(density.to_samples)(sampler.positions(run, density))
    return jax.tree.map(lambda values: values[chosen], samples)

"""Gibbs sweeps over discrete latents whose entries depend on one another."""

from __future__ import annotations

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Target
from composeprob.errors import CapabilityError
from composeprob.kernels import Info, Kernel, KernelState
from composeprob.kernels.gibbs import Gibbs, in_blocks, replaced
from composeprob.kernels.kernel import log_density_of
from composeprob.kernels.step_size import StepSizeLike, as_step_size
from composeprob.samplers.hierarchy import ClosedFormDensity
from composeprob.samplers.layout import Layout
from composeprob.schedule import Noise


class DiscreteGibbs(Kernel[KernelState]):
    r"""Gibbs sweep: each discrete entry in turn is drawn from its distribution given
    all others, $\pi(z_i = v \mid z_{-i}, \theta) \propto \pi(z_1, …, v, …, z_n, θ)$.

    The density is compared at all values of the entry. Where all that depends on
    latents has a closed form without networks, that costs evaluations of the program's
    statements alone, and one evaluation of the density where the sweep ends; elsewhere
    one evaluation of the density for each value.
    """

    sees_whole: ClassVar[bool] = True

    step_size: StepSizeLike = eqx.field(default=1.0, converter=as_step_size, repr=False)
    # Places of the entries in a chain's vector, and the number of values of each.
    entries: tuple[int, ...] = eqx.field(static=True, default=(), repr=False)
    counts: tuple[int, ...] = eqx.field(static=True, default=(), repr=False)
    # True if no network is needed to compare values.
    closed: bool = eqx.field(static=True, default=True, repr=False)
    closed_form: ClosedFormDensity | None = eqx.field(default=None, repr=False)

    optimal_acceptance = None
    scale_exponent = 0
    requires = frozenset[str]()

    @property
    def evaluations_per_step(self) -> int:
        return 1 if self.closed else 1 + len(self.entries) * max(self.counts)

    def resolved(
        self, sites: tuple[str, ...], density: AnnealedDensity
    ) -> DiscreteGibbs:
        """Return the sweep over these sites of a density; refuse one that is too long,
        or that needs a log-density where there is none."""
        layout = Layout.of_density(density)
        entries: list[int] = []
        counts: list[int] = []
        for name in sites:
            places = layout.entries((name,))
            entries += map(int, places)
            counts += [density.sites[name].num_values] * len(places)
        evaluations = len(entries) * max(counts)
        names = ", ".join(map(repr, sites))
        if evaluations > tuning.DISCRETE.most_evaluations:
            raise CapabilityError(
                f"A sweep over {names}, whose entries depend on one another or have no "
                f"plate, takes {evaluations:,} evaluations of the density, and "
                f"{tuning.DISCRETE.most_evaluations:,} are the most.",
                where=density.described.where,
                fix="write entries that are independent given the other latents in a "
                "numpyro.plate, together with what depends on them: these are summed "
                "out, however many they are.",
            )
        closed = density.evaluator.knows_latents
        if not closed and "energy" not in density.capabilities:
            raise CapabilityError(
                f"Values of {names} are compared by log-densities, and a factor that "
                "depends on them, or that an observation of them looks at, offers only "
                "its score.",
                where=density.described.where,
                fix="sum over the values, by dist.MixtureSameFamily or cp.mixture, or "
                "observe them.",
            )
        return replaced(
            self, entries=tuple(entries), counts=tuple(counts), closed=closed
        )

    def under(self, density: AnnealedDensity, noise: Noise) -> DiscreteGibbs:
        layout = Layout.of_density(density)
        return replaced(self, closed_form=ClosedFormDensity(density, noise, layout))

    def step(
        self, key: Key[Array, ""], state: KernelState, target: Target, step_size: Array
    ) -> tuple[KernelState, Info]:
        assert self.closed_form is not None
        closed_form = self.closed_form
        # The block is the whole vector of a chain, as values are compared given all.
        ((name, start),) = state.position.items()
        entries = jnp.asarray(self.entries)
        counts = jnp.asarray(self.counts)
        values = jnp.arange(max(self.counts))

        def log_density(v: Float[Array, " size"]) -> Float[Array, ""]:
            if self.closed:
                return closed_form.log_density(v)
            return log_density_of(target({name: v}))

        def draw(i: Array, v: Float[Array, " size"]) -> Float[Array, " size"]:
            def at_value(value: Array) -> Float[Array, ""]:
                return log_density(v.at[entries[i]].set(value.astype(v.dtype)))

            logits = jax.lax.map(at_value, values)
            possible = (values < counts[i]) & ~jnp.isnan(logits)
            logits = jnp.where(possible, logits, -jnp.inf)
            drawn = jax.random.categorical(jax.random.fold_in(key, i), logits)
            # Outside of the support no value is better than the present one.
            somewhere = jnp.any(logits > -jnp.inf)
            drawn = jnp.where(somewhere, drawn.astype(v.dtype), v[entries[i]])
            return v.at[entries[i]].set(drawn)

        v = jax.lax.fori_loop(0, len(self.entries), draw, start)
        evaluation = target({name: v})
        info = Info(
            acceptance=jnp.ones(()),
            accepted=jnp.any(v != start),
            non_finite=jnp.zeros((), bool),
            log_reversal=jnp.asarray(jnp.nan),
            quadrature_error=jnp.zeros(()),
        )
        return KernelState({name: v}, evaluation), info


def discrete_sites(density: AnnealedDensity) -> tuple[str, ...]:
    """Return the discrete sites of a density's positions; those that are summed out are
    not among them."""
    return tuple(name for name, s in density.sites.items() if s.kind == "discrete")


def with_discrete(kernel: Kernel, density: AnnealedDensity) -> Kernel:
    """Return the kernel for the continuous sites, and after it a block that sweeps over
    the discrete ones, if there are any."""
    names = discrete_sites(density)
    if not names:
        return kernel
    continuous = []
    for name, site in density.sites.items():
        if site.kind not in ("held", "discrete"):
            continuous.append(name)
    blocks: dict[tuple[str, ...], Kernel] = {}
    if isinstance(kernel, Gibbs):
        for sites, part in zip(kernel.sites, kernel.kernels, strict=True):
            if isinstance(part, DiscreteGibbs):
                return kernel
            _check_continuous(sites, part, names)
    if continuous:
        by_sites = in_blocks(kernel, continuous)
        blocks = dict(zip(by_sites.sites, by_sites.kernels, strict=True))
    return Gibbs({**blocks, names: DiscreteGibbs()})


def _check_continuous(
    sites: tuple[str, ...], kernel: Kernel, discrete: tuple[str, ...]
) -> None:
    """Refuse a block of a user's kernel that has discrete sites."""
    for name in sites:
        if name in discrete:
            raise CapabilityError(
                f"{type(kernel).__name__} moves continuous values, and {name!r} is "
                "discrete.",
                fix=f"leave {name!r} out of the blocks: Gibbs sweeps move it after "
                "them.",
            )

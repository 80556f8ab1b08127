"""The kernel of a program whose user named none: one block of noised sites, one of latents."""

from __future__ import annotations

from collections.abc import Callable

from composeprob.density.annealed import AnnealedDensity
from composeprob.kernels import Gibbs, Kernel


def by_kind(make: Callable[[], Kernel], density: AnnealedDensity, static: Callable[[], Kernel] | None = None) -> Kernel:
    """One kernel, or `Gibbs` with one for the noised sites and one, ``static``, for the static ones where there are
    both.

    What noised sites can be moved by follows the level's noise, and for latents it does not: under one step size the
    site with the shortest length sets the pace of all.
    """
    noised, latent = (
        tuple(name for name, site in density.sites.items() if site.kind == kind) for kind in ("noised", "static")
    )
    return Gibbs({noised: make(), latent: (static or make)()}) if noised and latent else make()

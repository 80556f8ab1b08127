"""A compiled program without its observations."""

from __future__ import annotations

import dataclasses

from composeprob.compiler.check import capabilities
from composeprob.compiler.likelihood import Likelihood
from composeprob.compiler.lower import Evaluator
from composeprob.density.annealed import AnnealedDensity
from composeprob.errors import WrongTypeError
from composeprob.ir.nodes import Graph
from composeprob.ir.render import describe


def prior(density: AnnealedDensity) -> AnnealedDensity:
    """The same program without its observations and soft evidence: p(z)·F_k(x; z).

    Sampled by `infer` it gives draws from the program's prior, and `Result.predictive` of these the prior predictive.

    Args:
        density: from `compile`.

    Returns:
        A density with the same sites. It keeps the observations' statements, so that it can predict data.

    Example:
        >>> import composeprob as cp, numpyro.distributions as dist
        >>> @cp.program
        ... def weighing(f, y):
        ...     x = cp.sample("x", f)
        ...     cp.observe("y", dist.Normal(x, 0.5), y)
        >>> f = cp.Analytic(dist.Normal(0.0, 1.0), cp.Schedule.log_snr(20))
        >>> density = cp.compile(weighing, f, 3.0)
        >>> [round(float(d.score({"x": 1.0}, 0)["x"]), 1) for d in (density, cp.prior(density))]
        [7.0, -1.0]
    """
    if not isinstance(density, AnnealedDensity):
        raise WrongTypeError(
            f"prior takes a compiled density; got {type(density).__name__}.",
            fix="compile the program first: cp.prior(cp.compile(program, …)).",
        )
    graph, evaluator = density.graph, density.evaluator
    assert isinstance(graph, Graph)
    assert isinstance(evaluator, Evaluator)
    if not graph.observations:
        return density
    notes = tuple(note for note in graph.notes if note[0] != "anneal")  # of observations alone
    without = dataclasses.replace(graph, observations=(), notes=notes).noted("prior", "without observations")
    silent = dataclasses.replace(evaluator, likelihood=Likelihood(evaluator.likelihood.traced, {}))
    offered = capabilities(without)
    described = dataclasses.replace(density.described, graph=without, text=describe(without, sorted(offered)))
    return dataclasses.replace(density, evaluator=silent, capabilities=offered, described=described)

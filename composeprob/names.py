"""What others call what this library has: for a name or an argument that it lacks, what to write instead."""

from __future__ import annotations

_evaluate = (
    "a factor is evaluated in a compiled program: density = cp.compile(cp.program(lambda f: cp.sample('x', f)), f); "
    "then density.log_density({'x': point}, 0) or density.score({'x': point}, 0), or draw samples by "
    "cp.infer(density, key, num_chains=1000)."
)
MEANT: dict[str, dict[str, str]] = {
    "composeprob": {
        "dist": "import numpyro.distributions as dist.",
        "NUTS": "write cp.HMC(…), or cp.BlackJAX(blackjax.nuts); density.to_numpyro() is for NumPyro's NUTS.",
        "MCMC": "write cp.AnnealedMCMC(cp.MALA()), a sampler of cp.infer(density, key, num_chains=…, sampler=…).",
        "run": "write cp.infer(density, jax.random.key(0), num_chains=1000).",
        "deterministic": "write numpyro.deterministic(name, value).",
        "plate": "write numpyro.plate(name, size).",
        **{
            name: f"distributions are NumPyro's: import numpyro.distributions as dist, and write dist.{name}(…)."
            for name in ("Normal", "MultivariateNormal", "Uniform", "Gamma", "Beta", "HalfNormal", "Poisson")
        },
    },
    "Factor": dict.fromkeys(("log_prob", "log_density", "logpdf", "score", "sample", "draw", "infer"), _evaluate),
    "AnnealedDensity": {
        **dict.fromkeys(
            ("log_prob", "logpdf", "energy", "potential"),
            "write density.log_density({'x': point}, 0) for one chain's values at level 0, the cleanest.",
        ),
        **dict.fromkeys(
            ("sample", "samples", "infer", "run", "draw"),
            "write result = cp.infer(density, jax.random.key(0), num_chains=1000), whose samples are result['x'].",
        ),
        **dict.fromkeys(("grad", "gradient"), "write density.score({'x': point}, 0)."),
    },
    "Result": {
        **dict.fromkeys(("posterior", "get_samples", "chains"), "samples are result['x'], and result.samples."),
        **dict.fromkeys(("log_z", "logZ", "evidence"), "write result.log_evidence."),
        **dict.fromkeys(("diagnostics", "print_summary"), "write print(result.summary()), and result.status."),
        **dict.fromkeys(("std", "var", "median"), "result.summary() shows them; result.quantile(fn, 0.5) has errors."),
    },
    "arguments": {
        "obs": "data are the value of cp.observe(name, distribution, value); cp.sample takes none.",
        "num_samples": "num_chains= is the number of chains, draws= how many draws of each are kept.",
        "device": "chains go to every device of jax.devices(), or to those of mesh=.",
        "seed": "randomness comes from a key: jax.random.key(0).",
        **dict.fromkeys(
            ("minibatch", "batch_size", "subsample_size"),
            "in a program all data count at every step, as a part of them would leave noise in weights and tests; "
            "block= of cp.product and cp.factor bounds memory. In training it is cp.training.Batches(size=…).",
        ),
        "anneal": "an annealing policy belongs to cp.observe and cp.factor.",
    },
}
"""By what lacks the name (a module, a class), or ``"arguments"`` of any public call."""

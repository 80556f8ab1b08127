"""Points of two crescents, given a measurement of their height.

composeprob run program.py
"""

import network
import numpyro.distributions as dist

import composeprob as cp

model = network.model()


@cp.program
def posterior(model, height=0.2):
    """A point x of the model, its height measured with a deviation of 0.1."""
    x = cp.sample("x", model)
    cp.observe("y", dist.Normal(x[1], 0.1), height)

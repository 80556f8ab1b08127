"""Long plans from short walks: through nine rooms, with a model that knows walks of at
most a third of the way.

The model has seen walks of 24 points, given where the doors are. `cp.window` puts it on
13 stretches of a plan of 216 points that overlap, `cp.tapestry` counts every point
once, and start and goal are observed. Reverse diffusion adds up the stretches' scores
as it goes; chains that stay at every level until the stretches agree find the way.

    python examples/planning.py
    python examples/planning.py --animate
    composeprob run examples/planning.py
"""

import sys
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
from matplotlib.animation import FuncAnimation

import composeprob as cp
from composeprob.models.worlds import rooms

WINDOWS, STRIDE = 13, 16
first = STRIDE * np.arange(WINDOWS)
LENGTH = int(first[-1]) + rooms.POINTS
# The number of each coordinate in the plan.
number = np.arange(2 * LENGTH).reshape(LENGTH, 2)
stretches = number[first[:, None] + np.arange(rooms.POINTS)]

walk = cp.load("rooms")
doors_key, places_key = jax.random.split(jax.random.key(3))
doors = rooms.doors(doors_key)
start, goal = rooms.places(places_key)
num_chains = 8
levels = np.concatenate(
    [
        np.arange(-6, -2, 0.4),
        np.linspace(-2, 4, 72, endpoint=False),
        np.linspace(4, 10.5, 13),
    ]
)
kernel = cp.UHMC(lambda levels: 0.5 * levels.sigma, num_leapfrog=1, damping=0.85)
sampler = cp.AnnealedMCMC(
    kernel, steps_per_level=31, reverse_step=cp.ReverseStep(control="none")
)


@cp.program
def planning(walk, doors=doors, start=start, goal=goal):
    windows = cp.window(walk.given(doors=doors), (LENGTH, 2), over=stretches)
    x = cp.sample("x", cp.tapestry(windows))
    cp.observe("start", dist.Normal(x[0], 0.02), start)
    cp.observe("goal", dist.Normal(x[-1], 0.02), goal)


def draw(axis, plans, good):
    """The rooms, and plans in them: those that succeed in colour."""
    for left, right, below, above in rooms.rectangles(doors):
        axis.add_patch(
            plt.Rectangle((left, below), right - left, above - below, color="k")
        )
    for plan, right in zip(plans, good, strict=True):
        color = "tab:blue" if right else "tab:red"
        axis.plot(*plan.T, lw=1, color=color, alpha=0.7)
    axis.plot(*np.stack([start, goal]).T, "o", color="tab:orange")
    axis.set(xlim=(-4.7, 4.7), ylim=(-1.2, 1.2), aspect="equal", xticks=[], yticks=[])


def main(num_chains=num_chains, out="out", animate=False):
    figure, axes = plt.subplots(2, 1, figsize=(9, 5.4), layout="constrained")
    density = cp.compile(planning, walk)
    print(density)
    samplers = {"summed scores": cp.Ancestral(), "composed": sampler}
    for axis, (name, chosen) in zip(axes, samplers.items(), strict=True):
        result = cp.infer(
            density,
            jax.random.key(0),
            num_chains=num_chains,
            sampler=chosen,
            levels=levels,
        )
        good = rooms.succeeds(result["x"], doors, start, goal)
        count = f"{good.sum()} of {num_chains} plans"
        title = f"{name}: {count} reach the goal and touch no wall"
        print(title)
        axis.set_title(title)
        draw(axis, result["x"], good)
    print(result.summary())

    Path(out).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(out, "planning.png"))
    if animate:
        (walker,) = axes[1].plot([], [], "o", color="k")
        plan = np.asarray(result["x"][np.argmax(good)])

        def move(i):
            walker.set_data(plan[i : i + 1].T)

        walking = FuncAnimation(figure, move, LENGTH)
        walking.save(Path(out, "planning.gif"), fps=20, writer="pillow")
    return result


if __name__ == "__main__":
    main(animate="--animate" in sys.argv)

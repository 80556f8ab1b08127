"""The waist of the hourglass: the compiled, time-annealed density.

`AnnealedDensity` is what the compiler makes and what kernels and samplers move along.
It may import `pytree`, `errors` and `schedule`; it knows neither factors nor kernels.
"""

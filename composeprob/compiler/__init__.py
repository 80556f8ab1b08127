"""The compiler: a program becomes one time-annealed unnormalised density.

`build` traces the program into the IR; the passes `normalise`, `align`, `share`,
`grow`, `check` and `anneal` rewrite it, verified after each; `lower` makes the
`AnnealedDensity`. May import `language`, `factors`, `ir`, `density`; knows no kernel.
"""

"""The language: `@program`, `sample`, `observe`, `factor`, `annealed`.

Statements are NumPyro messages, so NumPyro's own statements and handlers work inside a
program. `interpret.run` executes a program with given values and records its
statements. May import `factors`; knows no kernel.
"""

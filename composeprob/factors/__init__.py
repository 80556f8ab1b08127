"""Factors: the densities that a program multiplies, mixes and conditions.

Leaves evaluate something (`Diffusion`, `Analytic`, `Energy`, `Classifier`); the algebra
(`Product`, `Mixture`, `Window`) only records how they combine, and the compiler reads
it. May import `schedule`, `errors`, `pytree`; knows no kernel, and no compiler.
"""

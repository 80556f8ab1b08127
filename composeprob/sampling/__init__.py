"""Samplers and the driver: how chains travel from the noisiest level to level 0.

One sampler a file (`ancestral`, `annealed_mcmc`, `smc`); `infer` drives any of them over the levels. May import
`kernels`, `density`, `result`; knows no factor and no program.
"""

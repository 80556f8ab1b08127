"""How chains travel from the noisiest level to level 0: `Ancestral`, `AnnealedMCMC`, `SMC`, one a file.

`base` says what a sampler is, `choose` which one a run gets, `transitions` moves chains at one level, `reverse` from
one level to the next; `weights`, `control`, `potentials` and `resampling` are `SMC`'s. `spread` alone knows of devices.
May import `kernels` and `density`; knows no factor and no file.
"""

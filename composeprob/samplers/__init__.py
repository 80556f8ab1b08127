"""How chains travel from the noisiest level to level 0.

`sampler` has the one sampler and its constructors; `descent` its phases around one place of evaluation, on flat vectors
by `layout`. `step` and `fit` lead from level to level, `weights` weigh, `meet` resamples or swaps, `moves` make
transitions, `closing` ends a run; `replica_exchange` is chains at all levels at once. `choose` has the defaults,
`spread` alone knows of devices. May import `kernels` and `density`; knows no factor and no file.
"""

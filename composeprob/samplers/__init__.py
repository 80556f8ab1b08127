"""Samplers: algorithms that take chains from the noisiest level to level 0.

`sampler` has the one sampler and its constructors; `descent` its phases around one
place of evaluation, on flat vectors by `layout`. `step` leads from level to level by
fits over the chains, `weights` has their importance weights, `resampling` resamples,
`moves` make transitions, `finishers` end a run; `replica_exchange` is chains at all
levels at once, which swap. `choose` has the defaults, `spread` alone knows of devices.
May import `kernels` and `density`; knows no factor and no file.
"""

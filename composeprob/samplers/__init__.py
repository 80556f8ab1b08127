"""How chains travel from the noisiest level to level 0.

`sampler` has the one sampler and its constructors; `descent` its phases around one
place of evaluation, on flat vectors by `layout`. `step` leads from level to level by
what is fitted to chains, `weights` weigh, `meet` resamples, `moves` make transitions,
`closing` ends a run; `replica_exchange` is chains at all levels at once, which swap.
`choose` has the defaults, `spread` alone knows of devices. May import `kernels` and
`density`; knows no factor and no file.
"""

"""A call of `cp.infer` around its sampler.

`infer` checks the call and carries out the attempts of its `plan`; `stages` has the
run, five stages of one state, with watchers; `progress` shows how far it is, `writer`
keeps its draws and checkpoints, `outcome` makes the result, and `own_draws` checks
scores for it. `compiled` has the executables, and networks that are sharded over
devices. `rewards`, `extend` and `next_step` go on from a result, by a `population` at
level 0, and `new_latents` proposes what is new. May import `samplers` and `results`.
"""

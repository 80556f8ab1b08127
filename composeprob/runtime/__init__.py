"""What a call of `cp.infer` does around a sampler.

`infer` checks the call; `stages` has the run, five stages of one state, with what
watches it; `progress` shows how far it is, `writer` keeps its draws and checkpoints,
`record` makes the result. `compiled` has the executables, and networks shared out over
devices. May import `samplers` and `results`.
"""

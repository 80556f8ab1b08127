"""What a call of `cp.infer` does around a sampler.

`infer` checks the call; `stages` has the run, five stages of one state; `watchers` and `progress` get its reports;
`writer` takes samples; `record` makes the result. `compiled` has the executables, `parts` networks shared out over
devices. May import `samplers` and `results`.
"""

"""What a call of `cp.infer` does around a sampler: `infer` checks it, a `Job` carries it out.

`compiled` has the executables, `descend` the loop over levels, `stay` the one at level 0, `stream` the draws, `resume`
the checkpoints, `progress` the bar, `parts` networks shared out over devices, `ended` what is said at the end. May
import `samplers` and `results`.
"""

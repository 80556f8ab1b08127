"""Models that other people trained: networks of diffusers' classes in JAX, their files,
schedulers, text and images.

`load.from_diffusers` makes a factor of a folder; `layers` is what all networks are
built of, `tensors` reads their files; `estimators` reads other packages' posteriors.
May import `factors`, `schedule`, `errors`; knows no compiler and no kernel, and never
torch.
"""

"""Models that other people trained: networks of diffusers' classes in JAX, their files,
schedulers, text and images.

`load.from_diffusers` makes a factor of a folder; `layers` has the layers of all
networks, `tensors` reads their files; `estimators` reads posteriors of other packages.
May import `factors`, `schedule`, `errors`; knows no compiler and no kernel, and never
torch.
"""

"""Worlds that models learn: scenes of shapes with their exact ground truth, captions,
digits; simulators.

Each draws with JAX, so that a recipe's ``data`` can be traced, and imports nothing of
composeprob.
"""

"""Worlds that image models learn: scenes of shapes with their exact ground truth, captions, digits.

Each draws with JAX, so that a recipe's ``data`` can be traced, and imports nothing of composeprob.
"""

"""Worlds that models learn: scenes of shapes, captions, digits, rooms, simulators.

Scenes come with their exact ground truth. Each world draws with JAX, so that a recipe's
``data`` can be traced, and imports nothing of composeprob but its errors.
"""

"""The zoo: one folder a model (its card, recipe and weights), and the network definitions that the recipes share.

Written against composeprob's public API alone, so a folder here is also an example of how to add a model of one's own.
"""

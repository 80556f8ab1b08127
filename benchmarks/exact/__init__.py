"""Programs whose answers are known exactly: the share of a mode, the probability that a
sample is valid, log Z."""

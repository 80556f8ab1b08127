"""The results of runs: `Result` with its `status`, `estimates` with standard errors,
table, pictures and files.

May import `density`; knows no sampler.
"""

"""The results of runs: `Result` with its `status` by `checks`, its `trust`,
`estimates` with standard errors, table and files.

May import `density`; knows no sampler.
"""

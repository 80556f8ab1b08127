"""What is known after a run: `Result` with its `status`, `estimates` with standard
errors, table, pictures and files.

May import `density`; knows no sampler.
"""

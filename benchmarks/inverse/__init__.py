"""Inverse problems under a learned prior: the methods of others restated, and what is
measured of samples."""

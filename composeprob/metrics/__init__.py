"""Distances between samples and closed-form targets. Imports nothing else of this library."""

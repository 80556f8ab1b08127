"""Lorenz's systems, transitions that learn them, and filters that know them."""

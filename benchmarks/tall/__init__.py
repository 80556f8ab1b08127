"""Posteriors from many observations: instances, exact draws, methods restated from
papers, distances."""

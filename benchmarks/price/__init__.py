"""What a transition costs: the densities it is measured on, the peers beside it, and
the clock. Nothing imports it but the benchmarks of cost."""

"""Cost of a transition: densities, peers and clocks of the benchmarks of cost."""

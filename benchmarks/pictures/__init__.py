"""Image models: cells of the benchmark `images`, each run by itself."""

"""Numbers that tune the defaults of metrics; see `composeprob.tuning`."""

# Standard errors by which a refined run must differ in `error_sources`.
REFINED_ERRORS = 3.0
# Rows of a kernel matrix (MMD, KSD) that are in memory at a time.
GRAM_ROWS = 1024
# Independent runs of `SMC` by which `raise_log_likelihood` estimates an evidence.
EVIDENCE_RUNS = 4
# Chains of each of these runs.
EVIDENCE_CHAINS = 1024

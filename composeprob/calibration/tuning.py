"""Numbers that tune the defaults of calibration; see `composeprob.tuning`."""

# Widest gap in log-SNR between levels that are calibrated by quadrature: the curve is
# interpolated across it.
QUADRATURE_GAP = 0.4
# Widest gap in log-SNR between levels that are calibrated by sequential Monte Carlo:
# importance weights cross it.
ANNEALED_GAP = 0.25
# HMC transitions at each level of such a calibration.
ANNEALED_MOVES = 4
# Most levels of a schedule that are calibrated separately.
CALIBRATED_LEVELS = 128
# Bins of the ranks of simulation-based calibration.
RANK_BINS = 8

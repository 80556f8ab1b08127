"""Numbers that tune what happens by default: docs/decisions.md states why each is what
it is, and what measured it.

Modules read them as ``tuning.NAME``, so that an experiment (or a test) can set one
without touching code. Numbers that belong together are one `NamedTuple`, read as
``tuning.NAME.field``. This module may import nothing of the library, and everything may
import it.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

# ── the compiler ──────────────────────────────────────────────────────────────────────
SAME_LOG_SNR = (
    1e-3  # Largest difference in log-SNR between two levels that count as one.
)
# Most numbers of a joint Gaussian mixture: components times entries, or times squared
# measurements.
LARGEST_JOINT_MIXTURE = 2**16
# Largest relative error of the score of noise at which a network fits a
# parameterization.
OUTPUT_ERROR = 0.25
# Largest standard deviation from draw to draw of an x₀ or a v at the noisiest level, of
# a right network.
OUTPUT_SPREAD = 0.05


class _Signal(NamedTuple):
    share: float = 0.02  # Largest error of a component's share.
    mean: float = 0.05  # Largest error of a mean, in standard deviations.
    variance: float = 0.1  # Largest relative error of a variance.
    hidden: float = 0.1  # Signal over noise below which the level needs no closer test.
    # Distances, in units of its noise, over which a log-density that rises all the way
    # is improper.
    radii: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)


SIGNAL = _Signal()  # What the noisiest level may still contain of the data.
# 1/s² of the bluntest instrument that powers are made for: s = 0.14 in the data's
# units.
TEMPERING_SHARPNESS = math.exp(4.0)
# Draws of the prior at which a likelihood is evaluated, under each size of noise.
TEMPERING_DRAWS = 64


class _Moments(NamedTuple):
    directions: int = 16  # Jacobian–vector products of an evaluation, at most.
    most: int = 1024  # Measurements whose eigenvectors are known, at most.
    error: float = 0.2  # Relative error of a score's Jacobian that is allowed for.
    least: float = 0.01  # Share of unit variance in the covariance, at any noise.


MOMENTS = _Moments()  # Observations that are annealed by moments.
STATIC_FULL_LOG_SNR = (
    -2.0
)  # Log-SNR from which on exact observations count in full for static sites.


# ── factors ───────────────────────────────────────────────────────────────────────────
class _Quadrature(NamedTuple):
    # Nats by which a prior's density in its coordinate falls from its top to the ends
    # of the range of the integral.
    negligible: float = 34.0
    coarse: int = 24  # Intervals of that range that show where the integrand counts.
    nodes: tuple[int, int] = (64, 256)  # There, in single and in double precision.


QUADRATURE = _Quadrature()  # Noised priors by quadrature.


# ── agreement of factors: no_overlap, out_of_training ─────────────────────────────────
class _Overlap(NamedTuple):
    slack: float = 1.5  # How many times its bound σ²‖s‖² must exceed to count as far.
    empty_share: float = 0.5  # Share of samples that must be far for `no_overlap`.
    untrained_share: float = (
        0.1  # Share of samples that must be far for `out_of_training`.
    )
    # Nats by which a divisor may vary over samples, and within the reach of noise, and
    # count as flat.
    flat: float = 0.05
    # Nats by which a factor's draws are denser, in the median, where samples are on its
    # floor.
    floor: float = math.log(2)
    levels: int = 8  # Levels to which samples are noised for these findings.
    # How many times as far as any draw of a divisor from its nearest one a sample must
    # be to count as far.
    draws_slack: float = 1.5
    # Of draws of a divisor, as many as samples in each, that are taken before anything
    # is found.
    rounds: int = 4


OVERLAP = _Overlap()  # Whether factors agree where samples are.


class _Pilot(NamedTuple):
    levels: int = 24  # That it visits.
    steps: int = 4  # At each level.
    chains: int = 16  # That it has.


PILOT = _Pilot()  # The pilot run of `density.check`.


# ── the sampler that is chosen, and where it starts ───────────────────────────────────
class _ManyChains(NamedTuple):
    # Where log-densities can be compared between modes, so that what few independent
    # shares rest on can be asked.
    compared: int = 256
    # Where nothing but weights of the way keeps the shares of modes: learned factors.
    weighed: int = 32


MANY_CHAINS = _ManyChains()  # From so many chains on a default run resamples.


class _ByScore(NamedTuple):
    nodes: int = 5  # Of Simpson's rule along a move.
    # Nats of estimated error beyond which a move is not accepted, at most: 1/√n of many
    # samples.
    tolerance: float = 0.1
    # Points between two chains at which the score is integrated for the barrier that
    # lies there.
    between: int = 39


BY_SCORE = (
    _ByScore()
)  # The line integral of moves where a density offers only its score.


class _GlobalMoves(NamedTuple):
    number: int = 20  # Of default runs whose chains are not weighed.
    of_weighed: int = 8  # Of those whose chains are.
    most_numbers: int = 20  # Numbers of a position up to which they have them.
    # Share of chains that accepted none, up to which the others count as independent of
    # one another.
    most_stuck: float = 0.1


GLOBAL_MOVES = _GlobalMoves()  # Global moves at level 0.


class _Mixture(NamedTuple):
    # Numbers of components that are tried, in this order.
    components: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    # Numbers in a row that say no more of points left out, after which no other is
    # tried.
    patience: int = 2
    # Nats below what one Gaussian says of a point, as which a worse number counts.
    most_lost: float = 10.0
    most_points: int = (
        2048  # That a mixture is fitted to, evenly spaced among those there are.
    )
    points_per_number: int = (
        4  # Points for each number of a position that a fit takes at least.
    )
    # Chains of a half that are where numbers are, below which there is nothing to fit.
    fewest_points: int = 2


MIXTURE = _Mixture()  # The Gaussian mixtures that global moves are proposed from.


class _Start(NamedTuple):
    little_signal: float = (
        -4.6
    )  # log-SNR below which a level tells nothing of the data: α/σ < 0.1.
    # Levels whose log-SNR differ by more are too distant for one reverse step: β > 0.5.
    far_apart: float = 0.7
    # Draws of the prior that a chain chooses its start from where no level is noisy.
    draws: int = 16


START = _Start()  # Where a run starts.


class _Patient(NamedTuple):
    levels: int = 300  # That it visits, where factors know any log-SNR.
    transitions: int = 1500  # Of HMC at all of them together.


# The run that takes the place of a default one whose shares of modes rest on nothing.
PATIENT = _Patient()


class _Rungs(NamedTuple):
    default: int = 24  # Rungs, or as many levels as there are.
    rounds: int = 4  # Of sweeps; after each but the last the rungs are placed anew.
    least_rejection: float = (
        0.02  # What neighbours count as refusing at least, where rungs are placed anew.
    )


RUNGS = _Rungs()  # The rungs of replica exchange.


# ── reverse steps and their fits ──────────────────────────────────────────────────────
class _Fit(NamedTuple):
    # Dimensions up to which a slope is a matrix; beyond, one number for each entry.
    full: int = 256
    per_dimension: int = 3  # Chains for each dimension that a matrix takes.
    # And for each that one of ∇log G does: what is wrong in it costs effective chains,
    # no more.
    per_bend: int = 2
    per_feature: int = (
        2  # Chains for each coefficient that a control takes, in either half.
    )
    fewest: int = 64  # Chains below which nothing is fitted.
    most: int = (
        2**26
    )  # Numbers N·d above which nothing is fitted, as every device would have to hold all of them.
    # Chains above which fits take evenly spaced ones, if these are twice what a matrix
    # of controls asks for.
    enough: int = 1024
    worth: float = (
        0.9  # The share of the potential's variance that a control may leave at most.
    )
    ridge: float = 1e-6  # What least squares are damped by, of features of unit size.


FIT = _Fit()  # The affine fits of a population.


class _Step(NamedTuple):
    least_slope: float = (
        0.01  # The least slope, in units of 1/s, that is integrated exactly.
    )
    # How much faster than s the time scale of a direction may change in one step.
    most_change: float = 16.0
    # Of the implicit midpoint rule of a backward kernel: 2e-4 of error where the
    # control moves chains by half of y.
    midpoints: int = 8
    # At most, −H of a step that is bent towards data, in units of 1/h; below 1.
    most_bend: float = 0.5


STEP = _Step()  # The closed form of a fitted step.
# M, the points at which a potential is averaged. What a hard wall loses falls as 2^−M.
POTENTIAL_POINTS = 8


class _Pace(NamedTuple):
    first: float = 0.25  # The first step, in log-SNR.
    # The longest, in log-SNR: a step's own error says little of a step that leads far
    # beyond it.
    longest: float = 1.0
    # V and E up to `few_chains`; with more E falls as 1/N and V as 1/√N, and the
    # longest step as N^−¼.
    tolerance: float = 0.04
    few_chains: int = 1000  # Chains up to which the tolerance is what it is.
    faster: float = 1.5  # How much longer than the one before a step may be.
    slower: float = 0.3  # How much shorter.


PACE = _Pace()  # The steps of a run that chooses its levels.


# ── step sizes, metrics and moves ─────────────────────────────────────────────────────
class _StepSize(NamedTuple):
    longest: float = 0.5  # Where c starts at most.
    # By p: ℓ and q of steps ℓ·d^−q that a standard normal law of d numbers accepts as
    # often as is best.
    lengths: Mapping[int, tuple[float, float]] = {1: (1.6, 1 / 4), 2: (1.17, 1 / 6)}
    acceptance_units: int = (
        1024  # Acceptances are averaged in units of 1/1024, as integers.
    )
    few_chains: int = 16  # Chains at which the gain of adaptation is halved.


STEP_SIZE = _StepSize()  # Adaptive step sizes.
# Nats, and √d more for d numbers, beyond which the kick of a step is that of one far
# too long.
DIVERGED = 100.0
NUTS_EVALUATIONS = (
    15  # That a NUTS transition is taken to need where nobody says: a tree of depth 4.
)


class _Metric(NamedTuple):
    least_eigenvalue: float = (
        1e-6  # Of a regularised correlation matrix: what float32 still inverts.
    )
    chains: int = 50  # From which on ``"auto"`` measures each coordinate's width.
    chains_per_number: int = 10  # From which on it measures correlations.
    most_numbers: int = 64  # Numbers of a position up to which it does.
    # Numbers of all chains together, up to which it measures anything: every device
    # gets those of all.
    most_of_all: int = 2**25
    # Factor by which a width may fall from level to level: too short a step does not
    # stop a chain.
    shrinks: float = 0.1
    grows: float = 3.0  # Factor by which it may grow: too long a step does.


METRIC = _Metric()  # Metrics that are measured.


class _WarmUp(NamedTuple):
    # Transitions at level 0 that adapt step sizes before draws are taken, and in each
    # block of a warm-up.
    settling: int = 50
    leapfrogs: int = 8  # Of a transition.
    transitions: int = 10  # Of one block, after those that adapt the step size.
    blocks: int = 12  # At most; two at least.
    # Change of a mean, in standard deviations, or of the logarithm of a standard
    # deviation, that is no drift.
    drift: float = 0.05
    # Correlation of a latent with where it was before the blocks up to which it counts
    # as forgotten, and 2/√N more.
    memory: float = 0.1


WARM_UP = _WarmUp()  # Transitions at level 0 before draws, and of `WarmUp`.


class _Latents(NamedTuple):
    turns: int = 2  # Moves of latents alone, by their curvature.
    singles: int = 4  # And of one coordinate after these.
    lengths: tuple[float, float] = (
        1e-3,
        2.0,
    )  # Of their steps, in unconstrained coordinates.
    joint: int = (
        1  # Moves of latents and what hangs on them together, four evaluations each.
    )
    ratios: tuple[float, float] = (
        0.5,
        50.0,
    )  # Of their length to the width of a latent given what hangs on it.
    reach: float = 1.5  # Of such a move to the width of a latent over the population.
    flat: float = 0.05  # Least curvature.
    # Numbers of all latents up to which it is the default where others would do.
    most: int = 64


LATENTS = _Latents()  # What `Interweaving` does in one transition.

# ── runs ──────────────────────────────────────────────────────────────────────────────
FINE_LEVELS = (
    1000  # Levels, at least, among which a run chooses where factors know any log-SNR.
)


class _Checkpoints(NamedTuple):
    seconds: float = 10.0  # Between two, at least.
    share: float = (
        0.02  # Of the run's time that may pass in handing over what is to be written.
    )


CHECKPOINTS = _Checkpoints()  # How often a run is written.


class _Reports(NamedTuple):
    # Between two reports where a bar is shown: compiled code is left and entered again
    # for each.
    shown_seconds: float = 0.25
    unseen_seconds: float = 1.0  # Where none is.


REPORTS = _Reports()  # How often the compiled loop is left.


class _Room(NamedTuple):
    draws_bytes: int = 2**22  # On each device, for the draws of one call.
    block_bytes: int = (
        2**24
    )  # Of a block of draws that is written at once, by each process.
    parts_bytes: int = 2**20  # Of an array from which on it is kept in parts.
    # From which on compiled code is let go: Linux allows a process 65,530, and one that
    # runs out of them dies.
    memory_maps: int = 50_000


ROOM = _Room()  # Bounds on memory.


class _Checks(NamedTuple):
    share: float = (
        0.05  # Of a run's evaluations that asking factors whether they agree may take.
    )
    # At whose positions curl is measured, and factors are asked whether they agree.
    most_chains: int = 64
    # That a run must have before it, for its user to be better warned now than at its
    # end.
    long_seconds: float = 60.0
    fewest_chosen: int = (
        24  # About as few levels does a run visit that chooses its own.
    )


CHECKS = _Checks()  # What a run finds out about itself.

# ── calibration ───────────────────────────────────────────────────────────────────────
# Widest gap in log-SNR between levels that are calibrated by quadrature: the curve
# between them is interpolated.
QUADRATURE_GAP = 0.4
# Widest gap in log-SNR between levels that are calibrated by sequential Monte Carlo:
# its weights cross it.
ANNEALED_GAP = 0.25
ANNEALED_MOVES = 4  # Transitions of HMC at each level of such a calibration.
CALIBRATED_LEVELS = 128  # Most levels of a schedule that are calibrated one by one.
RANK_BINS = 8  # Bins of the ranks of simulation-based calibration.


# ── what a result reports ─────────────────────────────────────────────────────────────
class _Errors(NamedTuple):
    # Independent ancestors that an error takes, more than: Student's t with fewer has
    # no variance.
    fewest_ancestors: float = 3.0
    # Effective families of chains under which errors read off them say little; less of
    # N where N is small.
    fewest_families: float = 12.0
    fewest_draws: int = (
        4  # Draws of a chain that ArviZ's error of autocorrelated draws needs.
    )


ERRORS = _Errors()  # What standard errors take.


class _Findings(NamedTuple):
    # A Metropolis kernel that accepts less than this at a level has hardly moved there.
    acceptance_floor: float = 0.05
    # Relative effective sample size under which a level's weights rest on too few
    # chains.
    ess_floor: float = 0.05
    # Below this share, non-finite proposals are counted but not reported: adaptation
    # overshoots now and then.
    non_finite_ceiling: float = 0.01
    # Error of the log-evidence from the levels' distance, in nats, that is worth a
    # finding beside the number.
    levels_error: float = 2.0
    curl_ceiling: float = (
        0.1  # Relative curl above which a score counts as no gradient.
    )
    # By how much the steepness of a factor's score at its own draws may be off, or its
    # shift twice.
    own_score: float = 1.0
    own_score_right: float = 0.25  # By how much at levels that are recommended.
    own_draws: int = 256  # Of a factor, at most, and at least an eighth of it.
    # Signal over noise at the noisiest level that more than `many` samples may not
    # exceed.
    far_signal: float = 1.0
    farthest_signal: float = (
        10.0  # That none may exceed: else that level cannot have been noise alone.
    )
    many: float = 0.01  # A share of the samples.


FINDINGS = _Findings()  # What a status reports.


class _Shares(NamedTuple):
    slack: float = (
        0.35  # Nats for each number of a sample that log Z_m − log Z_n may be off by.
    )
    neighbours: int = 4  # k of the estimate.
    linked: int = 10  # Nearest neighbours that a chain hangs together with.
    # Numbers of a sample up to which the distance to neighbours tells a density.
    numbers: int = 10
    most: int = 1000  # Chains that are looked at.
    # Numbers in all, of the chains that are looked at: of images fewer chains are.
    entries: int = 4_000_000
    # By how many standard deviations weights must move a mean, in the direction in
    # which they move it most.
    shift: float = 0.1
    by_chance: float = 1e-6  # How often paths of right chains may seem uneven.
    # Groups of neighbours, by k-means, whose mean log W is estimated: it need not be a
    # linear function of x.
    groups: int = 20
    fewest: int = 20  # Chains for each direction or group that is looked at.
    # The share of log-weights, at either end, that are taken for no farther out than
    # the next one.
    tail: float = 0.01
    # Standard deviations of log W, beside what 32 bits tell, by which chains that lie
    # apart weigh too little.
    lost: float = 5.0
    # By how much log π is lower between two chains that are apart, in one dimension.
    barrier: float = 5.0
    # Of the pairs of chains that are apart, above which shares of modes take something
    # to rest on.
    apart: float = 0.1
    pairs: int = 64  # That are looked at.
    # Of each chain, over which groups may hang together, beside the shortest tree.
    bridges: int = 4
    # Relative effective sample size of the paths' weights, from which on shares rest on
    # them.
    support: float = 0.1
    even: float = 0.8  # The same, from which on chains that are apart need no weights.
    # Standard deviation of the logarithms of these weights, up to which they do too.
    alike: float = 2.0
    # Times as many barriers between where chains came and where they ended as between
    # pairs, and moves have mixed.
    crossing: float = 0.5
    block: int = 256  # Positions that are evaluated in one call.
    at_once: int = 64  # Positions that are evaluated together.


# Whether chains lie in the modes in the right shares, whether they are apart, and what
# shares rest on.
SHARES = _Shares()


class _Importance(NamedTuple):
    most: int = 2048  # Draws of the program's factors, at most.
    # That are evaluated at once, and the least number; also how many chains and scouts
    # are asked for neighbours.
    block: int = 256
    # Quantile of the chains' distances to their nearest ones, beyond which a scout's is
    # far.
    far: float = 0.9
    barrier: float = 3.0  # Nats by which log π₀ falls between what is apart.
    errors: float = 5.0  # Standard errors by which shares must differ.
    least: float = 0.02  # Difference of shares that is worth a finding.
    fewest: float = (
        50.0  # Effective number of scouts below which they say nothing of shares.
    )
    cells: int = 12  # Regions by k-means, whose shares are compared.


IMPORTANCE = (
    _Importance()
)  # Draws of the program's factors that are sent where no chain may be.


class _Comparison(NamedTuple):
    most: int = 2000  # Samples of each run that are compared.
    fewest: int = 16  # Samples that a comparison takes, at least.
    permutations: int = 500  # How often labels are drawn anew.
    chance: float = 0.01  # The share of these that may show as much.
    directions: int = (
        6  # Principal components that are kept of samples with more numbers.
    )
    least: float = 0.05  # Share of samples that is worth a finding.


COMPARISON = _Comparison()  # Comparisons of two runs.


class _Summary(NamedTuple):
    # Numbers of one site that are read: of a longer run every k-th draw.
    most_numbers: int = 10_000_000
    # Sites with more numbers than this (images) get one row, over all their numbers
    # together.
    most_rows: int = 16
    largest_k: float = (
        0.7  # Pareto k̂ above which means under the weights cannot be trusted.
    )
    # R̂ above which draws depend on where their chain began.
    largest_rhat: float = 1.05


SUMMARY = _Summary()  # The table of a result.
# Standard errors beyond which a refined run differs by more than chance, in
# `composeprob trust`.
REFINED_ERRORS = 3.0

# ── metrics and training ──────────────────────────────────────────────────────────────
GRAM_ROWS = 1024  # Rows of a kernel's matrix (MMD, KSD) that are in memory at a time.
# Independent runs of `SMC` that `raise_log_likelihood` takes for a density's evidence.
EVIDENCE_RUNS = 4
EVIDENCE_CHAINS = 1024  # Chains of each of them.
TRAINING_STEPS = 256  # Most steps of training in one call of the compiled loop.
TRAINING_BINS = 16  # Bins of log-SNR in which the training loss is recorded.


class _Estimator(NamedTuple):
    width: int = 128  # Of the network's layers.
    blocks: int = 3  # Residual blocks of the network of θ.
    # The finest structure of a posterior before training, in its standard deviations.
    finest: float = 0.1
    waves: int = 32  # Sines and cosines of the log-SNR that it sees.
    periods: tuple[float, float] = (4.0, 128.0)  # The shortest and the longest of them.
    iterations: int = 20_000  # Steps of training.
    batch: int = 256  # Events of each step.
    rate: float = 1e-3  # Adam's first step size; it falls to 0 as a cosine.
    levels: int = 80  # Of the factor's schedule.
    low: float = -8.0  # Log-SNR of the noisiest level for θ of unit variance.
    high: float = 12.0  # Log-SNR of level 0 for θ of unit variance.
    # The least log-SNR of level 0 where what a linear regression leaves of θ has unit
    # variance.
    residual: float = 10.0
    # How far from the noisiest level and from level 0 the range ends that half of the
    # events are drawn from.
    focus: tuple[float, float] = (6.0, 3.0)
    held_out: int = 2000  # Pairs held out, at most; of few pairs a tenth.
    noises: int = (
        8  # Noises for each of these, in pairs ±ε, with which their loss is measured.
    )
    fewest: int = 100  # Pairs below which nothing is trained.


ESTIMATOR = _Estimator()  # The default recipe of `cp.training.estimator`.

"""Numbers that tune the defaults. docs/decisions.md states why each has its value, and
the measurement that decided it.

Those of one package of the outer ring stand in the package's own ``tuning.py``.

Modules read them as ``tuning.NAME``, so that an experiment (or a test) can set one
without touching code. Numbers that belong together are one `NamedTuple`, read as
``tuning.NAME.field``. This module may import nothing of the library, and everything may
import it.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

# ── the compiler ──────────────────────────────────────────────────────────────────────
# Largest difference in log-SNR between two levels that count as the same level.
SAME_LOG_SNR = 1e-3
# Largest size of a joint Gaussian mixture that is evaluated in closed form: components
# times entries, or components times squared measurements.
LARGEST_JOINT_MIXTURE = 2**16
# Largest relative error of a network's score of pure noise under the parameterization
# that its factor declares.
OUTPUT_ERROR = 0.25
# Largest standard deviation, from draw to draw, of a right network's x₀ or v at the
# noisiest level.
OUTPUT_SPREAD = 0.05
# Largest change of a masked network's log-probabilities by tokens that it must not see.
UNSEEN_TOKENS = 0.01
# Largest distance from 1 of a token network's outputs at noise alone that are ratios
# in place of their logarithms.
RATIO_ERROR = 0.3


class _Signal(NamedTuple):
    # Largest error of a mixture component's proportion.
    share: float = 0.02
    # Largest error of a mean, in standard deviations.
    mean: float = 0.05
    # Largest relative error of a variance.
    variance: float = 0.1
    # Signal over noise below which none of these errors can be reached.
    hidden: float = 0.1
    # Distances, in units of the noisiest level's noise: a log-density that rises over
    # all of them is improper.
    radii: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)


# How much of the data the noisiest level may still contain.
SIGNAL = _Signal()
# Precision 1/s² of the bluntest instrument that the powers of tempered observations
# allow for: s = 0.14 in the data's units.
TEMPERING_SHARPNESS = math.exp(4.0)
# Draws of the prior at which a likelihood is evaluated, under each size of noise.
TEMPERING_DRAWS = 64


class _Moments(NamedTuple):
    # Most Jacobian–vector products of one evaluation.
    directions: int = 16
    # Most measurements for which eigenvectors are computed once and kept.
    most: int = 1024
    # Relative error that is assumed of a score's Jacobian.
    error: float = 0.2
    # Least share of unit variance in the covariance, at any noise.
    least: float = 0.01


# Observations that are annealed by the first two moments of x₀ | x.
MOMENTS = _Moments()
# Log-SNR from which on exact observations count in full for static sites.
STATIC_FULL_LOG_SNR = -2.0


class _Discrete(NamedTuple):
    # Most numbers, values times entries of statements, in the sum over the values of
    # discrete latents. The sum of 4 values at 10⁵ data has a tenth of that.
    most_terms: int = 2**22
    # Most evaluations of a sweep over entries that depend on one another.
    most_evaluations: int = 4096
    # Comparisons of an entry's log p among others that differ, which tell whether
    # entries are independent as their plates say. One misses a dependence with
    # probability ½ or less.
    trials: int = 8


# Discrete latents: which are summed out, and which are swept one by one.
DISCRETE = _Discrete()


class _Centring(NamedTuple):
    # Pairs of random points at which the location of data is compared with an affine
    # function of a latent.
    trials: int = 2
    # Scale of the second point of a pair, in draws of the latent's prior.
    reach: float = 4.0


# Coordinates of latents by the location of their data.
CENTRING = _Centring()


# ── factors ───────────────────────────────────────────────────────────────────────────
class _Quadrature(NamedTuple):
    # Nats by which a prior's density in its coordinate has fallen from its maximum at
    # the ends of the integral's range.
    negligible: float = 34.0
    # Intervals of the coarse grid that locates the integrand in this range.
    coarse: int = 24
    # Nodes of the fine grid around the integrand, in single and in double precision.
    nodes: tuple[int, int] = (64, 256)


# Priors whose noised density has no closed form.
QUADRATURE = _Quadrature()
# Most combinations of its attributes that a Boolean formula is summed over.
MOST_ASSIGNMENTS = 2**16


# ── agreement of factors: no_overlap, out_of_training ─────────────────────────────────
class _Overlap(NamedTuple):
    # Multiple of the bound on σ²‖s‖² above which a sample counts as far from a factor.
    slack: float = 1.5
    # Share of samples that must be far for `no_overlap`.
    empty_share: float = 0.5
    # Share of samples that must be far for `out_of_training`.
    untrained_share: float = 0.1
    # Largest variation, in nats, of a divisor that counts as flat: over the samples,
    # and over the noise around each.
    flat: float = 0.05
    # Nats by which a factor's median log-density at its draws exceeds that at samples
    # which lie on its floor.
    floor: float = math.log(2)
    # Noise levels at which samples are compared.
    levels: int = 8
    # Multiple of the largest nearest-neighbour distance among a divisor's draws beyond
    # which a sample counts as far from them.
    draws_slack: float = 1.5
    # Rounds of draws of a divisor, each as many as there are samples, that are taken
    # before a finding is reported.
    rounds: int = 4


# Agreement of the factors at the samples.
OVERLAP = _Overlap()


class _Pilot(NamedTuple):
    # Levels of the pilot run.
    levels: int = 24
    # Transitions at each level.
    steps: int = 4
    # Chains of the pilot run.
    chains: int = 16


# The pilot run of `density.check`.
PILOT = _Pilot()


# ── the sampler that is chosen, and where it starts ───────────────────────────────────
class _ManyChains(NamedTuple):
    # Where log-densities can be compared between modes, so that mode proportions of
    # independent chains can be checked.
    compared: int = 256
    # Where only importance weights along the path keep mode proportions right: learned
    # factors.
    weighed: int = 32
    # Where chains carry log-densities, of powers and quotients of learned factors
    # alone: independent chains know nothing of their shares.
    tracked: int = 16


# Number of chains from which on a default run resamples.
MANY_CHAINS = _ManyChains()


class _Independent(NamedTuple):
    # Transitions of HMC at each level.
    transitions: int = 5
    # The same for fewer samples than `MANY_CHAINS.weighed` in programs of learned
    # factors alone.
    of_few: int = 1


# Independent chains of energies.
INDEPENDENT = _Independent()


class _ByScore(NamedTuple):
    # Quadrature nodes along a move.
    nodes: int = 5
    # Largest estimated error, in nats, of the integral of an accepted move; 1/√n for n
    # samples where that is less.
    tolerance: float = 0.1
    # Points between two chains at which the score is integrated for the barrier height
    # between them.
    between: int = 39


# Line integrals of the score, for densities that offer no log-density.
BY_SCORE = _ByScore()


class _GlobalMoves(NamedTuple):
    # Moves of a default run with independent chains.
    number: int = 20
    # Moves of a default run with importance weights.
    of_weighed: int = 8
    # Largest dimension of a position for which a default run makes them.
    most_numbers: int = 20
    # Largest share of chains without an accepted move at which the other chains count
    # as independent.
    most_stuck: float = 0.1


# Global moves at level 0.
GLOBAL_MOVES = _GlobalMoves()


class _Mixture(NamedTuple):
    # Numbers of components to try, in this order.
    components: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    # Numbers in a row that do not improve the held-out log-density, after which the
    # search ends.
    patience: int = 2
    # Nats below one Gaussian's log-density at which a held-out point's is cut off, so
    # that an outlier does not decide.
    most_lost: float = 10.0
    # Most points that a mixture is fitted to, evenly spaced among all points.
    most_points: int = 2048
    # Points that a fit needs for each dimension of a position.
    points_per_number: int = 4
    # Fewest finite chains of a half to which anything is fitted.
    fewest_points: int = 2


# Gaussian mixtures from which global moves are proposed.
MIXTURE = _Mixture()


class _Renoise(NamedTuple):
    # Proposals to each chain at level 0 where the user gives no other number.
    proposals: int = 20
    # Least distance in log-SNR of two rungs.
    spacing: float = 1.0
    # The same where scores alone make the steps, whose error no test corrects.
    spacing_by_score: float = 0.25
    # Most chains whose proposals measure acceptance and scores at every rung.
    pilots: int = 64
    # Share of turns that are spread evenly over the rungs, whatever was accepted there.
    tried: float = 0.1
    # Largest share of a chain's variance, along any direction, that a move which
    # forgets it may keep; largest number of its tokens.
    memory: float = 0.1
    # Most rungs where proposals to tokens turn.
    turns: int = 6
    # Steps of a transition at a level, up and down each.
    steps: int = 4
    # The same by scores alone.
    steps_by_score: int = 8
    # Mean acceptance that the height of a transition's turn adapts to.
    acceptance: float = 0.5
    # Greatest height of a turn above its level, in log-SNR.
    highest: float = 8.0
    # Entries of data of variance 1 beside those of a chain, whose score tells the width
    # of a step.
    pseudo_entries: int = 8


# Moves up to a level of noise and down again.
RENOISE = _Renoise()


class _Reward(NamedTuple):
    # Calls for each chain where the user gives no other number.
    calls: int = 100
    # Share of the possible chains that count after a stage.
    counting: float = 0.5
    # Most moves of a stage before the last one.
    moves: int = 5
    # Largest share of chains that have not forgotten where they began, at which a stage
    # ends.
    remembered: float = 0.05
    # Width of the wide half of each component of fitted mixtures.
    tails: float = 2.0
    # Accepted draws from fitted mixtures after which a chain has forgotten where it and
    # those that they were fitted to began.
    draws: int = 4
    # Most moves after a resampling in `Result.extend`.
    most_moves: int = 20
    # Errors beyond which moves have found more than weights predict.
    by_chance: float = 4.0
    # Least excess, in nats, that counts.
    least_excess: float = 1.2


# Criteria without a gradient.
REWARD = _Reward()


class _NextStep(NamedTuple):
    # Runs of pilots that measure the widths of a step's reverse steps.
    pilots: int = 3
    # Share of the chains that count below which data are far, and come in by powers:
    # proposals from noise alone are accepted about as often.
    far: float = 0.1


# New noised sites in `Result.extend`.
NEXT_STEP = _NextStep()


class _NewLatents(NamedTuple):
    # Share of the proposals that come from the prior.
    prior: float = 0.1
    # Rounds of Newton's method.
    rounds: int = 4
    # Shares of a step that are tried in each.
    shares: tuple[float, ...] = (1.0, 0.5, 0.1, 0.0)
    # Most numbers that are new at once: a Hessian has as many columns.
    most_numbers: int = 64
    # Least share of the chains that count by these proposals, below which the latents
    # come from their priors, and their data by powers.
    counting: float = 0.1


# New static latents in `Result.extend`.
NEW_LATENTS = _NewLatents()
# Series of random numbers of what follows a run: rewards, and further data.
SERIES_AFTER = 8


class _Start(NamedTuple):
    # Log-SNR below which a level counts as pure noise: α/σ < 0.1.
    little_signal: float = -4.6
    # Largest difference in log-SNR between levels that one reverse step may cross:
    # β ≤ 0.5.
    far_apart: float = 0.7
    # Prior draws of which a chain starts at the best, where no level is noisy.
    draws: int = 16
    # Scale of members, over the median of its prior, above which chains
    # start if they can.
    narrow: float = 0.001
    # Prior draws of which that median is taken.
    widths: int = 64
    # Nats of likelihood that outweigh such a width: more than data of a density have.
    preferred: float = 1e8


# Where a run starts.
START = _Start()


class _Patient(NamedTuple):
    # Levels of the run, where factors can be evaluated at any log-SNR.
    levels: int = 300
    # HMC transitions over all levels together.
    transitions: int = 1500


# The run that replaces a default run whose mode proportions have no support.
PATIENT = _Patient()


class _Rungs(NamedTuple):
    # Rungs of a ladder; fewer where there are fewer levels.
    default: int = 24
    # Rounds of sweeps; rungs are placed anew after each round but the last.
    rounds: int = 4
    # Least rejection rate that is assumed between neighbours when rungs are placed
    # anew.
    least_rejection: float = 0.02


# The rungs of replica exchange.
RUNGS = _Rungs()


# ── reverse steps and their fits ──────────────────────────────────────────────────────
class _Fit(NamedTuple):
    # Largest dimension in which a fitted slope is a full matrix; beyond it is diagonal.
    full: int = 256
    # Chains for each dimension that a full slope of the score needs.
    per_dimension: int = 3
    # Chains for each dimension that a full slope of ∇log G needs: its errors only cost
    # effective chains.
    per_bend: int = 2
    # Chains in either half for each coefficient of a control.
    per_feature: int = 2
    # Fewest chains to which anything is fitted.
    fewest: int = 64
    # Largest N·d that is fitted: every device holds the whole population.
    most: int = 2**26
    # Chains above which a fit uses evenly spaced ones, if twice the number that a
    # matrix control needs is no larger.
    enough: int = 1024
    # Largest share of the potential's variance that a useful control leaves.
    worth: float = 0.9
    # Ridge of the least-squares problems, for features of unit size.
    ridge: float = 1e-6


# Affine fits of a population.
FIT = _Fit()


class _Tracking(NamedTuple):
    # Largest dimension in which chains carry the log-densities of factors, or make
    # weighted reverse steps by scores without moves.
    most_numbers: int = 64
    # Groups of neighbours whose slopes are fitted one by one.
    groups: int = 3
    # Least precision of a factor at the first level, in units of 1/s.
    least_precision: float = 0.25
    # Largest slope of a factor's score where a step ends, in units of 1/h: above 1 its
    # reverse kernel has no density.
    most_upwards: float = 0.5
    # Most learned factors of a conjunction whose exponents are 1 at every level.
    most_at_once: int = 2


# Log-densities that chains carry along their paths.
TRACKING = _Tracking()


class _Step(NamedTuple):
    # Least slope, in units of 1/s, that is integrated in closed form.
    least_slope: float = 0.01
    # Largest ratio by which the time scale of a direction may change faster than s in
    # one step.
    most_change: float = 16.0
    # Steps of the implicit midpoint rule of a backward kernel: an error of 2e-4 where
    # the control moves chains by half of y.
    midpoints: int = 8
    # Largest added precision −H of a step that is bent towards data, in units of 1/h.
    # The variance of the weights is finite below 1.
    most_bend: float = 0.5


# Closed form of a fitted step.
STEP = _Step()
# Points M over which a potential is averaged; a hard wall loses 2^−M of its mass.
POTENTIAL_POINTS = 8


class _Pace(NamedTuple):
    # First step, in log-SNR.
    first: float = 0.25
    # Longest step, in log-SNR: the error estimate of a step says little about far
    # longer steps.
    longest: float = 1.0
    # Tolerance of the weights' variance V and of the step error E for up to
    # `few_chains`. With more chains E falls as 1/N, V as 1/√N and the longest step as
    # N^−¼.
    tolerance: float = 0.04
    # Chains up to which the tolerance is constant.
    few_chains: int = 1000
    # Largest ratio of a step to the one before.
    faster: float = 1.5
    # Smallest ratio of a step to the one before.
    slower: float = 0.3


# Step control of a run that chooses its levels.
PACE = _Pace()


# ── step sizes, metrics and moves ─────────────────────────────────────────────────────
class _StepSize(NamedTuple):
    # Largest initial coefficient c.
    longest: float = 0.5
    # Scale exponent p → (ℓ, q): steps ℓ·d^−q have the optimal acceptance rate for a
    # standard normal distribution in d dimensions.
    lengths: Mapping[int, tuple[float, float]] = {1: (1.6, 1 / 4), 2: (1.17, 1 / 6)}
    # Acceptance rates are summed as integers in units of 1/1024, so that the order of
    # the devices does not matter.
    acceptance_units: int = 1024
    # Chains at which the adaptation gain is halved.
    few_chains: int = 16


# Adaptive step sizes.
STEP_SIZE = _StepSize()
# Nats, and √d more in d dimensions, of a kick above which a rejected step counts as far
# too long.
DIVERGED = 100.0
# Evaluations of a NUTS transition where the algorithm reports none: a tree of depth 4.
NUTS_EVALUATIONS = 15


class _Metric(NamedTuple):
    # Least eigenvalue of a regularised correlation matrix: float32 can still invert it.
    least_eigenvalue: float = 1e-6
    # Chains from which on ``"auto"`` measures the width of each coordinate.
    chains: int = 50
    # Chains for each dimension from which on ``"auto"`` measures correlations.
    chains_per_number: int = 10
    # The same in a warm-up of latents alone.
    chains_per_latent: int = 4
    # Largest dimension in which ``"auto"`` measures correlations.
    most_numbers: int = 64
    # Largest N·d that is measured: every device gathers the whole population.
    most_of_all: int = 2**25
    # Smallest ratio of a width to that of the level before: too short a step only
    # slows a chain.
    shrinks: float = 0.1
    # Largest ratio of a width to that of the level before: too long a step stops a
    # chain.
    grows: float = 3.0


# Metrics that are measured.
METRIC = _Metric()


class _WarmUp(NamedTuple):
    # Transitions at level 0 that adapt step sizes, before draws and in each block.
    settling: int = 50
    # Leapfrog steps of a transition.
    leapfrogs: int = 8
    # Transitions of one block after its adaptation.
    transitions: int = 10
    # Most blocks; there are at least two.
    blocks: int = 16
    # Largest change between blocks that is not drift: of a mean in standard deviations,
    # or of the logarithm of a standard deviation.
    drift: float = 0.05
    # Largest correlation of a latent with its value before the warm-up that counts as
    # forgotten.
    memory: float = 0.1
    # Probability that chance alone adds more to one of them than is allowed for it.
    by_chance: float = 0.05


# Transitions at level 0 before draws, and those of `WarmUp`.
WARM_UP = _WarmUp()


class _Funnels(NamedTuple):
    # Share of the chains that carries the squared scores of a number below which a
    # density is taken for a funnel: a third of a Gaussian's do.
    carried: float = 0.12
    # Standard deviation of the logarithm of a step about that of the local width.
    spread: float = 1.5
    # Fewest rounds.
    rounds: int = 4
    # Probability that another round follows although the population does not drift.
    by_chance: float = 0.05


# Moves at level 0 into the necks of funnels.
FUNNELS = _Funnels()


class _Relaxation(NamedTuple):
    # Transitions by the kernel that came down.
    stay: int = 60
    # Most rounds of as many transitions of MALA after them.
    rounds: int = 5
    # Probability that another round follows although the samples are those of π₀.
    by_chance: float = 0.05


# Moves at level 0 after weighted chains of learned energies.
RELAXATION = _Relaxation()


class _Latents(NamedTuple):
    # Moves of latents alone, scaled by their curvature.
    turns: int = 2
    # Moves of one coordinate after these.
    singles: int = 4
    # Range of their step lengths, in unconstrained coordinates.
    lengths: tuple[float, float] = (1e-3, 2.0)
    # Joint moves of latents and their dependent sites, of four evaluations each.
    joint: int = 1
    # Range of the ratio of a joint move's length to the conditional width of a latent
    # given its dependent sites.
    ratios: tuple[float, float] = (0.5, 50.0)
    # Length of a long joint move over the width of a latent in the population.
    reach: float = 1.5
    # Smallest width, in rounding errors of a latent, to which it is standardised.
    rounding: float = 100.0
    # Width of a latent over that of its prior given others above which it is
    # standardised.
    vague: float = 0.1
    # Share of HMC's transitions in the steps of a hierarchy that are shorter than the
    # others, and by how much at most.
    short: tuple[float, float] = (0.5, 100.0)
    # Least curvature.
    flat: float = 0.05
    # Largest dimension of all latents in which this kernel is the default although
    # others are possible.
    most: int = 64


# One transition of `Interweaving`.
LATENTS = _Latents()

# ── runs ──────────────────────────────────────────────────────────────────────────────
# Fewest levels among which a run chooses its own, where factors can be evaluated at any
# log-SNR.
FINE_LEVELS = 1000


class _Reveals(NamedTuple):
    # Redraws of each chain after each reveal.
    redraws: int = 1
    # Passes at level 0, each of a redraw for every token and a remask.
    passes: int = 4
    # Power of the normalisers of hidden positions in the weights of a reveal. A product
    # of them takes positions for independent: 1 is too sure of what follows.
    look_ahead: float = 0.5


# Moves of visible tokens.
REVEALS = _Reveals()


class _Leaps(NamedTuple):
    # Redraws of each chain at each level of noise.
    redraws: int = 2
    # Passes at level 0, each of a redraw for every token.
    passes: int = 4
    # Largest share of tokens that the noisiest level of a network may keep.
    kept_at_top: float = 0.01


# Moves of tokens under uniform noise.
LEAPS = _Leaps()


class _Checkpoints(NamedTuple):
    # Least seconds between two checkpoints.
    seconds: float = 10.0
    # Largest share of the run's time that handing states to the writer may take.
    share: float = 0.02


# How often a run is written.
CHECKPOINTS = _Checkpoints()


class _Reports(NamedTuple):
    # Seconds between two reports where a bar is shown: each leaves compiled code and
    # enters it again.
    shown_seconds: float = 0.25
    # Seconds between two reports where no bar is shown.
    unseen_seconds: float = 1.0


# How often the compiled loop is left.
REPORTS = _Reports()


class _Room(NamedTuple):
    # Bytes on each device for the draws of one call.
    draws_bytes: int = 2**22
    # Bytes of a block of draws that each process writes at once.
    block_bytes: int = 2**24
    # Bytes of an array from which on a mesh with two axes shards it.
    parts_bytes: int = 2**20
    # Memory maps from which on compiled code is released: Linux allows a process
    # 65,530, and a process without any left dies.
    memory_maps: int = 50_000


# Bounds on memory.
ROOM = _Room()


class _Checks(NamedTuple):
    # Largest share of a run's evaluations that checks of its factors may take.
    share: float = 0.05
    # Most chains at whose positions curl and the factors' agreement are measured.
    most_chains: int = 64
    # Expected remaining seconds from which on a warning is worth a pilot before the
    # run ends.
    long_seconds: float = 60.0
    # Assumed number of levels of a run that chooses its own, for a bound on its cost.
    fewest_chosen: int = 24


# Checks that a run makes of itself.
CHECKS = _Checks()


# ── what a result reports ─────────────────────────────────────────────────────────────
class _Errors(NamedTuple):
    # Samples that are added to those inside of an event, and to those outside, for the
    # least error of its probability.
    added: float = 2.0
    # Independent ancestors above which a standard error is stated: Student's t with
    # fewer has no variance.
    fewest_ancestors: float = 3.0
    # Effective number of ancestors below which an error estimated from them is
    # unreliable; smaller where N is small.
    fewest_families: float = 12.0
    # Draws of a chain that ArviZ's error of autocorrelated draws needs.
    fewest_draws: int = 4


# Requirements of standard errors.
ERRORS = _Errors()


class _Findings(NamedTuple):
    # Acceptance rate below which a Metropolis kernel has hardly moved at a level.
    acceptance_floor: float = 0.05
    # Relative effective sample size of a level's weights that is too small.
    ess_floor: float = 0.05
    # Share of non-finite proposals that is not reported: adaptation sometimes
    # overshoots.
    non_finite_ceiling: float = 0.01
    # Discretisation error of the log-evidence, in nats, that is worth a finding.
    levels_error: float = 2.0
    # Relative curl above which a score is not a gradient.
    curl_ceiling: float = 0.1
    # Largest error of the steepness of a factor's score at samples of the factor, and
    # of twice its shift.
    own_score: float = 1.0
    # The same at levels that are recommended instead.
    own_score_right: float = 0.25
    # Most samples of a factor for this check; an eighth of them is required.
    own_draws: int = 256
    # Fewest levels of their reverse diffusion.
    own_path: int = 24
    # Fewest of these samples that carry the squared scores of a number at level 0.
    own_carried: float = 8.0
    # Levels to which these samples are noised, to regress their noise on the predicted.
    slope_levels: int = 8
    # The range of log-SNR of these, beside the noisiest.
    slope_log_snr: tuple[float, float] = (-5.0, 7.0)
    # The range of log-SNR in which the noise that is predicted is compared with that of
    # the next level: beyond it levels hardly differ, or steps of samples show.
    told_log_snr: tuple[float, float] = (-4.0, 2.0)
    # Relative error along the change between these levels that is tolerated.
    told_error: float = 0.1
    # Relative error of the predicted noise that is tolerated where there is little but
    # noise.
    noise_error: float = 0.035
    # Log-SNR below which that is so.
    noise_alone: float = -4.0
    # The same above, and the error of its mean that is tolerated everywhere.
    noise_error_of_both: float = 0.06
    # Log-SNR above which there is little but signal.
    signal_alone: float = 3.0
    # The relative error that is tolerated there.
    noise_error_of_signal: float = 0.1
    # Change of the log-evidence, in nats, by networks that are rounded to bfloat16.
    rounded_evidence: float = 0.25
    # Total variation between tokens at level 0 and without noise.
    noise_left: float = 0.03
    # Change of the log-evidence, in nats, between these.
    noise_left_evidence: float = 0.05
    # Signal over noise at the noisiest level that at most the share `many` of the
    # samples may exceed.
    far_signal: float = 1.0
    # Signal over noise at the noisiest level that no sample may exceed: beyond it that
    # level was not pure noise.
    farthest_signal: float = 10.0
    # Share of the samples that counts as many.
    many: float = 0.01


# Thresholds of a status.
FINDINGS = _Findings()


class _Shares(NamedTuple):
    # Tolerated error of log Z_m − log Z_n, in nats for each dimension of a sample.
    slack: float = 0.35
    # k of the nearest-neighbour density estimate.
    neighbours: int = 4
    # Nearest neighbours to which a chain is linked when chains are grouped into modes.
    linked: int = 10
    # Largest dimension of a sample in which neighbour distances estimate a density.
    numbers: int = 10
    # Most chains that are examined.
    most: int = 1000
    # Most numbers, chains times entries, that are examined: fewer chains for images.
    entries: int = 4_000_000
    # Shift of a mean by the weights that is worth a finding, in standard deviations
    # along the direction in which they shift it most.
    shift: float = 0.1
    # Probability that the path weights of right chains are flagged as uneven.
    by_chance: float = 1e-6
    # Probability that the halves of right chains, whose global moves are fitted to one
    # another, are said to differ.
    halves_by_chance: float = 1e-4
    # Groups by k-means over which mean log W is regressed: it need not be linear in x.
    groups: int = 20
    # Chains for each direction or group of this regression.
    fewest: int = 20
    # Share of log-weights at either end that is clipped to the next one.
    tail: float = 0.01
    # Standard deviations below the median log W, beside float32's resolution, at which
    # distant chains count as lost.
    lost: float = 5.0
    # Barrier height, in nats of log π and in one dimension, that separates two chains.
    barrier: float = 5.0
    # Share of separated pairs above which mode proportions need support.
    apart: float = 0.1
    # Pairs of chains that are examined.
    pairs: int = 64
    # Nearest neighbours of each chain over which groups may connect, beside the
    # shortest tree.
    bridges: int = 4
    # Widest gaps between chains in which barriers are looked for.
    gaps: int = 16
    # Effective ancestors that support the share of a group.
    fewest_ancestors: float = 8.0
    # Effective ancestors of all together below which groups need so many however small
    # they are: five miss a group of half of the mass with probability 2⁻⁵.
    fewest_in_all: float = 5.0
    # Chains for each effective ancestor from which on they are copies.
    copies: float = 2.0
    # Relative effective sample size of the path weights from which on they support mode
    # proportions.
    support: float = 0.1
    # Relative effective sample size from which on separated chains need no weights.
    even: float = 0.8
    # Standard deviation of the log path weights up to which they support mode
    # proportions too.
    alike: float = 2.0
    # Share of chains that a move carried across a barrier, over the share of separated
    # pairs, from which on moves have mixed the modes.
    crossing: float = 0.5
    # Correlation of an entry with where it was above which modes have not mixed.
    remembered: float = 0.5
    # Positions of one compiled call.
    block: int = 256
    # Positions that are evaluated together within it.
    at_once: int = 64
    # Largest number of entries of a position up to which such calls are compiled
    # without optimisation.
    in_haste: int = 64


# Mode proportions: separated modes, and the support of their proportions.
SHARES = _Shares()


class _Stein(NamedTuple):
    # Probability that samples of π are reported.
    by_chance: float = 1e-3
    # Fewest effective ancestors, and samples that carry the squared scores of a number.
    fewest: float = 8.0
    # The same as a share of the effective ancestors: a Gaussian's are a third, a box's
    # whose walls are thin next to none.
    carried: float = 0.03
    # Samples for each function that is fitted.
    samples: float = 8.0
    # Most functions that are fitted together.
    most: int = 64
    # Most samples of a run that are asked.
    chains: int = 2000
    # Fewest moves that look for edges.
    moves: int = 512
    # Their length, in widths that the scores imply.
    step: float = 0.15
    # Most numbers that move together.
    together: int = 16
    # Nats by which log π may differ from the integral of its gradient along a move.
    jump: float = 0.5
    # Share of the moves that may differ by more.
    edges: float = 0.01


# Stein's identity at level 0.
STEIN = _Stein()


class _Importance(NamedTuple):
    # Most importance samples of the program's factors.
    most: int = 2048
    # Importance samples that are evaluated at once, and their least number; also the
    # number of chains and samples whose neighbours are searched.
    block: int = 256
    # Quantile of the chains' nearest-neighbour distances beyond which an importance
    # sample is far from the chains.
    far: float = 0.9
    # Barrier height, in nats of log π₀, that separates modes.
    barrier: float = 3.0
    # Standard errors by which proportions must differ.
    errors: float = 5.0
    # Difference of proportions that is worth a finding.
    least: float = 0.02
    # Effective number of importance samples below which they say nothing about mode
    # proportions.
    fewest: float = 50.0
    # Regions by k-means whose proportions are compared.
    cells: int = 12


# Importance samples from the program's factors, which may reach modes without a chain.
IMPORTANCE = _Importance()


class _Comparison(NamedTuple):
    # Most samples of each run that are compared.
    most: int = 2000
    # Fewest samples of a comparison.
    fewest: int = 16
    # Permutations of the labels.
    permutations: int = 500
    # Share of permutations that may show as large a difference: the significance level.
    chance: float = 0.01
    # Principal components that are kept of samples with more dimensions.
    directions: int = 6
    # Share of samples that is worth a finding.
    least: float = 0.05


# Comparisons of two runs.
COMPARISON = _Comparison()


class _Summary(NamedTuple):
    # Most numbers of one site that are read: of a longer run every k-th draw.
    most_numbers: int = 10_000_000
    # Largest size of a site with one row for each entry; larger ones (images) get one
    # row over all entries.
    most_rows: int = 16
    # Most tokens of a sequence that are shown.
    most_tokens: int = 24
    # Pareto k̂ above which weighted means are unreliable.
    largest_k: float = 0.7
    # R̂ above which draws depend on the start of their chain.
    largest_rhat: float = 1.05


# The table of a result.
SUMMARY = _Summary()
# Other runs whose quantiles the error of a quantile sums over.
QUANTILE_RUNS = 32

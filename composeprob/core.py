"""The public names of the core: a program's statements, factors and their algebra,
`compile`, samplers, `infer`, results. This is the only module where both halves of the
hourglass meet, and what the outer ring imports.

Those of `__all__` are ``cp``'s too. The others, each imported ``as`` itself, are for
those who write a leaf, a training loop, a metric or a command of their own: ``from
composeprob.core import Progress``.
"""

from composeprob import errors
from composeprob.compiler.pipeline import compile, prior
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position as Position
from composeprob.density.learned_scores import Misfit as Misfit
from composeprob.density.learned_scores import curl as curl
from composeprob.density.learned_scores import fokker_planck as fokker_planck
from composeprob.density.overlap import noised as noised
from composeprob.density.points import log_densities as log_densities
from composeprob.density.reward import Reward
from composeprob.factors.algebra import condition, guide, mixture, power, product
from composeprob.factors.analytic import Analytic
from composeprob.factors.categorical import MaskedDiffusion
from composeprob.factors.classifier import Classifier
from composeprob.factors.diffusion import ENERGIES as ENERGIES
from composeprob.factors.diffusion import Diffusion
from composeprob.factors.diffusion import Encoder as Encoder
from composeprob.factors.energy import Energy
from composeprob.factors.factor import Factor
from composeprob.factors.factor import LeafFactor as LeafFactor
from composeprob.factors.factor import Traits as Traits
from composeprob.factors.factor import check_conditions as check_conditions
from composeprob.factors.networks import Network as Network
from composeprob.factors.networks import as_network as as_network
from composeprob.factors.networks import batched_linear
from composeprob.factors.networks import no_random_numbers as no_random_numbers
from composeprob.factors.uniform_diffusion import UniformDiffusion
from composeprob.factors.window import tapestry, window
from composeprob.kernels import (
    HMC,
    MALA,
    UHMC,
    ULA,
    Adaptive,
    BlackJAX,
    Gibbs,
    Kernel,
    LineIntegral,
)
from composeprob.language.decorator import Program as Program
from composeprob.language.decorator import program
from composeprob.language.decorator import single as single
from composeprob.language.policies import Policy
from composeprob.language.statements import annealed, factor, observe, sample
from composeprob.numpyro_sites import as_distribution
from composeprob.results.checks import Check
from composeprob.results.estimates import systematic as systematic
from composeprob.results.result import Result
from composeprob.results.status import Status
from composeprob.results.summary import Summary as Summary
from composeprob.results.trust import Trust
from composeprob.runtime.infer import infer
from composeprob.runtime.progress import Progress as Progress
from composeprob.runtime.writer import Checkpoint, Draws
from composeprob.samplers.finishers import GlobalMoves, WarmUp
from composeprob.samplers.leaping import TauLeaping
from composeprob.samplers.renoise_finisher import Renoise
from composeprob.samplers.replica_exchange import ReplicaExchange
from composeprob.samplers.resampling import Resample, Resampler
from composeprob.samplers.reveal import Reveal
from composeprob.samplers.sampler import SMC, Ancestral, AnnealedMCMC, Sampler
from composeprob.samplers.step import ReverseStep
from composeprob.samplers.weights import DensityRatio, FeynmanKac, Weights
from composeprob.schedule import Schedule
from composeprob.settings import cache

__all__ = [
    "HMC",
    "MALA",
    "SMC",
    "UHMC",
    "ULA",
    "Adaptive",
    "Analytic",
    "Ancestral",
    "AnnealedDensity",
    "AnnealedMCMC",
    "BlackJAX",
    "Check",
    "Checkpoint",
    "Classifier",
    "DensityRatio",
    "Diffusion",
    "Draws",
    "Energy",
    "Factor",
    "FeynmanKac",
    "Gibbs",
    "GlobalMoves",
    "Kernel",
    "LineIntegral",
    "MaskedDiffusion",
    "Policy",
    "Renoise",
    "ReplicaExchange",
    "Resample",
    "Resampler",
    "Result",
    "Reveal",
    "ReverseStep",
    "Reward",
    "Sampler",
    "Schedule",
    "Status",
    "TauLeaping",
    "Trust",
    "UniformDiffusion",
    "WarmUp",
    "Weights",
    "annealed",
    "as_distribution",
    "batched_linear",
    "cache",
    "compile",
    "condition",
    "errors",
    "factor",
    "guide",
    "infer",
    "mixture",
    "observe",
    "power",
    "prior",
    "product",
    "program",
    "sample",
    "tapestry",
    "window",
]

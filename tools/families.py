"""Families of tests beside the core, and those whose files a change touches.

    python tools/families.py    # their names, for `make test FAMILIES="pretrained …"`

`make test` runs the core: what is in no family, and of each family the cases that would
notice if it were broken. Files are compared with the main branch where this one left
it, or on the main branch with the commit before. Without a history every family counts.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CORE = "core"
"""Mark of the tests that `make test` runs."""


class Family(NamedTuple):
    """Tests of one feature that most changes do not reach.

    Attributes:
        tests: files and folders of its tests, which are a change of it too.
        sources: files and folders that it tests.
        cases: the tests that belong to the core, or classes or files of them: those
            that would notice if the family were broken, and those that must find a
            mutant.
    """

    tests: tuple[str, ...]
    sources: tuple[str, ...]
    cases: tuple[str, ...]


FAMILIES = {
    "pretrained": Family(
        tests=("tests/pretrained",),
        sources=("composeprob/pretrained", "tools/small_models.py"),
        cases=(
            "tests/pretrained/test_bad_folders.py::"
            "test_folders_that_cannot_be_loaded[cut short]",
            "tests/pretrained/test_goldens.py::"
            "test_the_score_at_level_k_is_that_of_timestep_k[ddpm]",
        ),
    ),
    "training": Family(
        tests=(
            "tests/calibration",
            "tests/networks",
            "tests/training",
            "tests/worlds",
            "tests/zoo",
        ),
        sources=(
            "composeprob/calibration",
            "composeprob/model_zoo.py",
            "composeprob/training",
            "models",
        ),
        cases=(
            "tests/calibration/test_calibrate.py::test_quadrature_is_exact[two modes]",
            "tests/training/test_cross.py::"
            "test_symmetric_similar_conditions_keep_the_optimum",
            "tests/training/test_cross.py::"
            "test_the_loss_is_least_at_the_true_normalisers",
            "tests/training/test_cross.py::"
            "test_the_loss_is_least_at_the_true_ratios_of_conditions",
            "tests/training/test_masked.py::"
            "test_the_loss_of_the_right_shares_is_their_entropy",
            "tests/training/test_train.py::"
            "test_it_starts_from_the_weights_that_are_given",
            "tests/zoo/test_zoo.py::test_every_model_is_as_good_as_its_card_says[ring2d]",
        ),
    ),
    "estimators": Family(
        tests=(
            "tests/pretrained/test_estimators.py",
            "tests/training/test_distil.py",
            "tests/training/test_estimator.py",
        ),
        sources=(
            "composeprob/pretrained/estimators.py",
            "composeprob/training/distil.py",
            "composeprob/training/estimator.py",
        ),
        cases=(
            "tests/pretrained/test_estimators.py::"
            "test_a_network_of_noise_in_the_place_of_a_score_is_found",
            "tests/training/test_estimator.py::"
            "test_the_posterior_of_a_gaussian_is_exact_in_the_units_of_theta",
        ),
    ),
    "likelihoods": Family(
        tests=("tests/metrics",),
        sources=("composeprob/metrics",),
        cases=(
            "tests/metrics/test_distances.py::test_mmd_is_the_u_statistic",
            "tests/metrics/test_likelihood.py::"
            "test_mean_of_p_hat_is_the_gaussian_that_the_sampler_draws_from",
        ),
    ),
    "processes": Family(
        tests=(
            "tests/sampling/test_devices.py",
            "tests/sampling/test_parts.py",
            "tests/sampling/test_processes.py",
        ),
        sources=(
            "composeprob/runtime/compiled.py",
            "composeprob/runtime/writer.py",
            "composeprob/samplers/spread.py",
            "tests/same_bits.py",
        ),
        cases=(
            "tests/sampling/test_devices.py::"
            "test_copies_fill_the_last_chunk_and_count_nowhere",
            "tests/sampling/test_devices.py::"
            "test_weighted_models_and_full_covariances_have_the_same_samples_on_one_and_"
            "eight",
        ),
    ),
    "tokens": Family(
        tests=(
            "tests/compiler/test_tokens.py",
            "tests/factors/test_categorical.py",
            "tests/sampling/test_leaping.py",
            "tests/sampling/test_renoise_tokens.py",
            "tests/sampling/test_reveal.py",
            "tests/sampling/test_reveal_runs.py",
        ),
        sources=(
            "composeprob/compiler/plausible_tokens.py",
            "composeprob/compiler/tokens.py",
            "composeprob/density/categorical.py",
            "composeprob/density/residual_noise.py",
            "composeprob/factors/categorical.py",
            "composeprob/factors/uniform_diffusion.py",
            "composeprob/factors/uniform_noise.py",
            "composeprob/results/checks/noise_left.py",
            "composeprob/results/token_shares.py",
            "composeprob/samplers/leaping.py",
            "composeprob/samplers/renoise_tokens.py",
            "composeprob/samplers/reveal.py",
            "composeprob/samplers/token_sampler.py",
            "composeprob/tuning.py",
            "tests/token_cases.py",
        ),
        cases=(
            "tests/compiler/test_tokens.py::test_a_program_is_printed_as_mathematics",
            "tests/factors/test_categorical.py::test_models_are_normalised",
            "tests/sampling/test_leaping.py::"
            "test_expressions_of_closed_forms_have_their_law[mixture]",
            "tests/sampling/test_leaping.py::"
            "test_mutants_fail_and_what_the_test_corrects_does_not",
            "tests/sampling/test_leaping.py::test_leaps_without_weights_fail",
            "tests/sampling/test_leaping.py::test_inverted_ratios_fail",
            "tests/sampling/test_renoise_tokens.py::"
            "test_without_the_ratio_of_the_steps_it_is_not",
            "tests/sampling/test_renoise_tokens.py::"
            "test_without_the_ratio_the_law_of_uniform_noise_is_lost",
            "tests/sampling/test_renoise_tokens.py::"
            "test_without_their_ratio_they_do_not",
            "tests/sampling/test_reveal.py::test_expressions_have_their_law[mixture]",
            "tests/sampling/test_reveal.py::test_remasks_without_a_test_fail",
            "tests/sampling/test_reveal.py::test_mutants_fail",
        ),
    ),
    "rewards": Family(
        tests=(
            "tests/sampling/test_renoise.py",
            "tests/sampling/test_renoise_kernel.py",
            "tests/sampling/test_rewards.py",
        ),
        sources=(
            "composeprob/density/reward.py",
            "composeprob/runtime/population.py",
            "composeprob/runtime/rewards.py",
            "composeprob/samplers/renoise.py",
            "composeprob/samplers/renoise_finisher.py",
            "composeprob/samplers/renoise_kernel.py",
            "composeprob/tuning.py",
        ),
        cases=(
            "tests/sampling/test_renoise.py::"
            "test_closed_forms_are_left_invariant_by_inexact_steps",
            "tests/sampling/test_renoise.py::"
            "test_without_the_ratio_of_the_steps_they_are_not",
            "tests/sampling/test_renoise.py::"
            "test_without_the_rest_of_the_density_they_are_not",
            "tests/sampling/test_renoise.py::"
            "test_with_one_way_alone_in_the_ratio_they_are_not",
            "tests/sampling/test_renoise.py::"
            "test_products_of_scores_are_weighed_by_their_rate",
            "tests/sampling/test_renoise_kernel.py::"
            "test_a_noisy_level_is_left_invariant_by_inexact_steps",
            "tests/sampling/test_renoise_kernel.py::"
            "test_steps_of_one_factor_leave_a_product_invariant",
            "tests/sampling/test_renoise_kernel.py::"
            "test_a_score_beside_a_log_density_is_weighed_by_that",
            "tests/sampling/test_renoise_kernel.py::"
            "test_powers_of_scores_turn_along_constant_exponents",
            "tests/sampling/test_rewards.py::test_a_linear_reward_moves_a_gaussian",
            "tests/sampling/test_rewards.py::"
            "test_moves_that_do_not_ask_for_it_lead_back",
            "tests/sampling/test_rewards.py::"
            "test_draws_from_mixtures_whose_density_is_left_out_are_found",
        ),
    ),
    "extension": Family(
        tests=(
            "tests/sampling/test_extend.py",
            "tests/sampling/test_next_step.py",
        ),
        sources=(
            "composeprob/runtime/extend.py",
            "composeprob/runtime/new_latents.py",
            "composeprob/runtime/next_step.py",
            "composeprob/runtime/population.py",
            "composeprob/samplers/finishers.py",
            "composeprob/tuning.py",
        ),
        cases=(
            "tests/sampling/test_extend.py::test_a_study_goes_on_datum_by_datum[2]",
            "tests/sampling/test_extend.py::"
            "test_without_the_weights_of_the_data_it_stays_where_it_was",
            "tests/sampling/test_extend.py::"
            "test_a_new_latent_whose_datum_is_far_is_proposed_near_it",
            "tests/sampling/test_next_step.py::"
            "test_without_the_weights_of_the_steps_it_does_not_see_the_data",
            "tests/sampling/test_next_step.py::"
            "test_moves_that_see_all_of_a_far_datum_at_once_are_found",
            "tests/sampling/test_next_step.py::"
            "test_a_state_may_be_a_deterministic_of_new_noise",
        ),
    ),
    "hierarchies": Family(
        tests=(
            "tests/language/test_evidence.py",
            "tests/sampling/test_plain_hierarchies.py",
        ),
        sources=(
            "composeprob/compiler/centring.py",
            "composeprob/compiler/evidence.py",
            "composeprob/samplers/finishers.py",
            "composeprob/samplers/hierarchy.py",
            "composeprob/tuning.py",
        ),
        cases=(
            "tests/language/test_evidence.py::TestDensity::"
            "test_the_site_is_noised_and_latents_get_the_score_of_its_noised_prior",
            "tests/language/test_evidence.py::TestPlates::test_scores",
            "tests/language/test_evidence.py::TestKernel",
            "tests/language/test_evidence.py::TestNested::"
            "test_without_the_change_of_coordinates_it_would_not",
            "tests/language/test_evidence.py::TestBetweenModes::"
            "test_integrals_that_nothing_bounds_would_not",
            "tests/language/test_evidence.py::test_refusals",
            "tests/sampling/test_plain_hierarchies.py::"
            "test_moves_in_standard_coordinates_leave_the_density_invariant",
            "tests/sampling/test_plain_hierarchies.py::"
            "test_moves_in_the_coordinates_of_data_leave_the_density_invariant[HMC]",
            "tests/sampling/test_plain_hierarchies.py::"
            "test_without_the_change_of_volume_they_would_not",
            "tests/sampling/test_plain_hierarchies.py::"
            "test_only_hierarchies_of_latents_alone_are_moved_in_both_coordinates",
        ),
    ),
    "discrete": Family(
        tests=("tests/language/test_discrete.py",),
        sources=(
            "composeprob/compiler/discrete.py",
            "composeprob/language/finite.py",
            "composeprob/samplers/discrete.py",
        ),
        cases=(
            "tests/language/test_discrete.py::"
            "test_a_density_is_the_sum_over_all_joint_values",
            "tests/language/test_discrete.py::"
            "test_draws_that_ignore_the_data_are_detected",
            "tests/language/test_discrete.py::"
            "test_a_sweep_leaves_exact_draws_what_they_are",
            "tests/language/test_discrete.py::test_a_sweep_of_stale_entries_is_detected",
        ),
    ),
    "findings": Family(
        tests=(
            "tests/density/test_curl.py",
            "tests/density/test_overlap.py",
            "tests/sampling/test_errors_of_means.py",
            "tests/sampling/test_level_0.py",
            "tests/sampling/test_own_draws.py",
            "tests/sampling/test_repetition.py",
            "tests/test_importance.py",
            "tests/test_path_weights.py",
            "tests/test_pictures.py",
            "tests/test_support.py",
        ),
        sources=(
            "composeprob/density/learned_scores.py",
            "composeprob/density/overlap.py",
            "composeprob/density/points.py",
            "composeprob/findings.py",
            "composeprob/results",
            "composeprob/runtime/own_draws.py",
            "composeprob/tuning.py",
        ),
        cases=(
            "tests/density/test_curl.py::test_against_the_whole_jacobian",
            "tests/density/test_overlap.py::"
            "test_boxes_that_do_not_meet_are_named_with_the_level",
            "tests/sampling/test_errors_of_means.py::"
            "test_independent_chains_have_the_textbook_error_and_copies_count_as_one",
            "tests/sampling/test_errors_of_means.py::"
            "test_few_ancestors_are_worth_more_only_if_descendants_have_forgotten_them",
            "tests/sampling/test_errors_of_means.py::"
            "test_too_few_levels_show_in_the_error_of_the_evidence",
            "tests/sampling/test_level_0.py::"
            "test_weights_do_not_see_a_level_0_that_is_not_the_limit_and_stein_does",
            "tests/sampling/test_own_draws.py::"
            "test_a_score_is_compared_with_its_own_samples",
            "tests/sampling/test_repetition.py::test_errors_of_whole_modes_are_stated",
            "tests/sampling/test_repetition.py::"
            "test_negative_control_the_spread_over_chains_does_not_show_them",
            "tests/test_importance.py::test_right_chains_have_no_finding[two modes]",
            "tests/test_importance.py::"
            "test_wrong_chains_have_the_finding[one of two modes]",
            "tests/test_importance.py::"
            "test_modes_are_taken_for_missing_only_without_the_two_corrections",
            "tests/test_path_weights.py::"
            "test_chains_of_no_weight_are_separated_ones_of_low_path_weight",
            "tests/test_path_weights.py::test_summed_scores_have_the_finding",
            "tests/test_pictures.py::test_every_kind_draws",
            "tests/test_pictures.py::test_images_are_not_inverted_in_the_dark",
            "tests/test_support.py::"
            "test_separated_chains_without_support_have_the_finding",
        ),
    ),
    "moments": Family(
        tests=("tests/language/test_moments.py",),
        sources=("composeprob/compiler/by_moments.py",),
        cases=(
            "tests/language/test_moments.py::"
            "test_it_is_the_density_of_the_value_under_a_gaussian_prior",
            "tests/language/test_moments.py::"
            "test_its_score_treats_the_covariance_as_constant",
            "tests/language/test_moments.py::"
            "test_scores_alone_take_it_by_default_and_others_if_they_ask",
        ),
    ),
    "examples": Family(
        tests=("tests/test_examples.py",),
        sources=("examples",),
        cases=(
            "tests/test_examples.py::test_every_example_is_tested",
            "tests/test_examples.py::test_examples_say_how_to_run_them",
            "tests/test_examples.py::test_exact_product",
        ),
    ),
    "replicas": Family(
        tests=("tests/sampling/test_replica_exchange.py",),
        sources=(
            "composeprob/kernels/metropolis.py",
            "composeprob/samplers/replica_exchange.py",
        ),
        cases=(
            "tests/sampling/test_replica_exchange.py::"
            "test_swaps_by_energies_leave_every_level_what_it_is",
            "tests/sampling/test_replica_exchange.py::"
            "test_without_the_law_of_the_bridge_a_swap_is_wrong",
            "tests/sampling/test_replica_exchange.py::"
            "test_path_weights_of_the_wrong_sign_are_found_out",
        ),
    ),
    "documents": Family(
        tests=(
            "tests/test_docs_public.py",
            "tests/test_notebook.py",
            "tests/test_recipes.py",
            "tests/test_site.py",
        ),
        sources=("README.md", "composeprob", "docs"),
        cases=(
            "tests/test_docs_public.py::"
            "test_public_name_is_documented_and_its_examples_show_what_comes_out",
            "tests/test_docs_public.py::"
            "test_the_reference_and_imports_of_the_pages_name_only_what_exists",
            "tests/test_docs_public.py::"
            "test_docstring_examples[composeprob.density.annealed]",
            "tests/test_docs_public.py::"
            "test_every_number_that_a_page_asks_for_is_in_the_results",
            "tests/test_docs_public.py::test_measured_numbers_are_not_typed_by_hand",
            "tests/test_recipes.py::test_the_recipe_passes_lint",
            "tests/test_recipes.py::test_the_recipe_runs[A kernel]",
            "tests/test_recipes.py::"
            "test_data_are_impossible_for_chains_that_never_moved",
            "tests/test_site.py::"
            "test_every_example_has_a_title_and_says_what_is_learned",
        ),
    ),
    "command": Family(
        tests=("tests/test_cli.py",),
        sources=("composeprob/cli", "composeprob/settings.py"),
        cases=(
            "tests/test_cli.py::test_run_prints_and_writes",
            "tests/test_cli.py::test_what_cannot_be_run_is_refused",
        ),
    ),
    "finishers": Family(
        tests=(
            "tests/sampling/test_funnels.py",
            "tests/sampling/test_global_moves.py",
            "tests/sampling/test_warm_up.py",
        ),
        sources=(
            "composeprob/runtime/outcome.py",
            "composeprob/runtime/plan.py",
            "composeprob/runtime/stages.py",
            "composeprob/samplers/choose.py",
            "composeprob/samplers/finishers.py",
            "composeprob/samplers/funnels.py",
            "composeprob/tuning.py",
        ),
        cases=(
            "tests/sampling/test_funnels.py::"
            "test_the_population_that_creeps_is_seen_and_the_one_at_rest_is_not",
            "tests/sampling/test_global_moves.py::test_a_mixture_fits_the_law_of_points",
            "tests/sampling/test_global_moves.py::"
            "test_tails_are_a_half_of_twice_the_width",
            "tests/sampling/test_global_moves.py::"
            "test_modes_get_their_shares_and_without_global_moves_they_do_not",
            "tests/sampling/test_global_moves.py::"
            "test_a_proposal_whose_density_is_left_out_is_found_out",
            "tests/sampling/test_global_moves.py::"
            "test_a_chain_that_was_left_behind_forbids_no_mixture",
            "tests/sampling/test_global_moves.py::"
            "test_chains_that_are_not_finite_are_not_fitted",
            "tests/sampling/test_global_moves.py::"
            "test_few_chains_have_the_modes_shares_by_default",
            "tests/sampling/test_global_moves.py::"
            "test_their_proposals_are_importance_samples_of_the_evidence",
            "tests/sampling/test_global_moves.py::"
            "test_importance_samples_are_of_the_density_of_x_and_not_of_x_over_alpha",
            "tests/sampling/test_warm_up.py::"
            "test_centred_and_non_centred_are_one_density",
            "tests/sampling/test_warm_up.py::"
            "test_a_warm_up_moves_a_population_that_is_not_there_yet",
        ),
    ),
    "levels": Family(
        tests=("tests/sampling/test_levels.py",),
        sources=(
            "composeprob/samplers/run.py",
            "composeprob/schedule.py",
            "composeprob/tuning.py",
        ),
        cases=(
            "tests/sampling/test_levels.py::"
            "test_a_run_that_chooses_its_levels_is_right_and_reports_the_levels_that_it_"
            "visited",
        ),
    ),
    "choice": Family(
        tests=("tests/sampling/test_choose.py",),
        sources=(
            "composeprob/runtime/plan.py",
            "composeprob/samplers/choose.py",
            "composeprob/tuning.py",
        ),
        cases=("tests/sampling/test_choose.py::test_choice_and_reason",),
    ),
    "walls": Family(
        tests=("tests/sampling/test_walls.py",),
        sources=(
            "composeprob/samplers/step.py",
            "composeprob/samplers/weights.py",
            "composeprob/tuning.py",
        ),
        cases=(
            "tests/sampling/test_walls.py::"
            "test_weights_of_averaged_potentials_are_unbiased_over_which_point_a_step_"
            "came_from",
            "tests/sampling/test_walls.py::test_a_box_is_found_from_the_noisiest_level",
            "tests/sampling/test_walls.py::"
            "test_the_backward_kernel_has_the_control_in_it",
        ),
    ),
    "benchmarks": Family(
        tests=(
            "tests/statistical",
            "tests/test_benchmarks_command.py",
            "tests/test_tpu_benchmark.py",
        ),
        sources=("benchmarks",),
        cases=(
            "tests/test_benchmarks_command.py::"
            "test_every_benchmark_is_listed_with_what_it_measures",
        ),
    ),
    "compiler": Family(
        tests=("tests/compiler",),
        sources=(
            "composeprob/compiler",
            "composeprob/density",
            "composeprob/factors",
            "composeprob/ir",
            "composeprob/language",
            "composeprob/schedule.py",
        ),
        cases=(
            "tests/compiler/test_cells.py::test_many_sets_are_the_product_of_windows",
            "tests/compiler/test_counts.py::test_one_network_is_evaluated_once",
            "tests/compiler/test_counts.py::test_new_numbers_reuse_compiled_code",
            "tests/compiler/test_exact.py::"
            "test_a_measurement_that_looks_elsewhere_than_it_did_is_seen",
            "tests/compiler/test_grow.py::"
            "test_the_power_of_a_gaussian_is_followed_exactly",
            "tests/compiler/test_linearity.py::"
            "test_every_slope_that_some_latent_makes_is_found",
            "tests/compiler/test_over.py::"
            "test_it_is_the_product_written_out[energy-2-1]",
            "tests/compiler/test_passes.py::test_normal_forms",
            "tests/compiler/test_passes.py::test_capabilities",
            "tests/compiler/test_precision.py::"
            "test_rounding_that_changes_estimates_is_found",
            "tests/compiler/test_print.py::test_a_program_reads_like_its_mathematics",
            "tests/compiler/test_rate.py::test_rate_is_the_residual[quotient-VP]",
            "tests/compiler/test_rate.py::"
            "test_rate_is_the_residual[mixture of calibrated products-VE]",
            "tests/compiler/test_rate.py::"
            "test_rate_is_the_residual[averaging window-other]",
            "tests/compiler/test_rate.py::test_rate_of_what_is_annealed_exactly",
            "tests/compiler/test_reads.py::"
            "test_a_program_compiled_again_reads_what_is_there_now[float]",
            "tests/compiler/test_refusals.py::test_the_least_precision_is_found",
            "tests/compiler/test_refusals.py::test_the_wrong_sign_is_named",
            "tests/compiler/test_refusals.py::test_the_wrong_sign_of_a_flow_is_named",
            "tests/compiler/test_tempering.py::test_powers_are_those_of_the_docs",
            "tests/compiler/test_trace.py::"
            "test_data_that_become_constants_are_named_with_their_line",
            "tests/compiler/test_verify.py::test_sound_graphs_pass",
            "tests/compiler/test_verify.py::test_broken_expressions_are_caught",
        ),
    ),
    "kernels": Family(
        tests=("tests/kernels",),
        sources=(
            "composeprob/density/evaluation.py",
            "composeprob/kernels",
            "composeprob/samplers/funnels.py",
            "tests/kernel_chains.py",
        ),
        cases=(
            "tests/kernels/test_gibbs.py::test_the_opposite_order_undoes_a_scan",
            "tests/kernels/test_invariance.py::test_a_coarse_line_integral_does_not",
            "tests/kernels/test_invariance.py::"
            "test_unadjusted_kernels_have_their_known_variance",
            "tests/kernels/test_line_integral.py::"
            "test_the_error_has_the_order_of_its_rule[simpson-4-of_a_trajectory]",
            "tests/kernels/test_metric.py::"
            "test_a_kernel_shows_its_metric_and_only_that",
            "tests/kernels/test_mutants.py",
            "tests/kernels/test_step_size.py::test_resolve",
            "tests/kernels/test_transitions.py::"
            "test_the_protocol_is_the_step[HMC, LineIntegral-two sites]",
            "tests/kernels/test_transitions.py::"
            "test_non_finite_proposals_are_rejected_and_flagged",
        ),
    ),
    "factors": Family(
        tests=("tests/factors",),
        sources=(
            "composeprob/density",
            "composeprob/factors",
            "composeprob/schedule.py",
            "tests/registry.py",
        ),
        cases=(
            "tests/factors/test_analytic.py::"
            "test_noised_densities_are_convolutions[mixture]",
            "tests/factors/test_analytic.py::"
            "test_noised_densities_are_convolutions[half-Cauchy]",
            "tests/factors/test_diffusion.py::test_parameterizations",
            "tests/factors/test_energy_classifier.py::"
            "test_condition_is_bayes_rule_to_a_power[2.5]",
            "tests/factors/test_formula.py::"
            "test_the_condition_is_the_exact_posterior_at_every_"
            "level[~(right & top) | near]",
            "tests/factors/test_registry.py",
            "tests/factors/test_refusals.py",
            "tests/factors/test_tapestry.py::"
            "test_windows_that_agree_make_the_canvas_that_they_agree_on",
        ),
    ),
    "programs": Family(
        tests=(
            "tests/language",
            "tests/density/test_numpyro.py",
            "tests/test_numpyro_sites.py",
            "tests/test_predictive.py",
        ),
        sources=(
            "composeprob/compiler",
            "composeprob/density",
            "composeprob/language",
            "composeprob/numpyro_sites.py",
            "composeprob/results/result.py",
        ),
        cases=(
            "tests/density/test_numpyro.py::"
            "test_the_gradient_is_the_score_and_samples_are_those_of_the_program",
            "tests/language/test_hierarchy.py::"
            "test_density_and_scores_are_the_models[13]",
            "tests/language/test_hierarchy.py::"
            "test_c_keeps_its_prior_and_x_has_its_law_given_c",
            "tests/language/test_hierarchy.py::"
            "test_where_the_prior_draw_would_be_wrong_the_program_is_refused",
            "tests/language/test_posteriors.py::"
            "test_a_program_without_noised_sites_is_a_bayesian_model",
            "tests/language/test_statements.py::"
            "test_the_density_of_a_program_is_the_product_of_its_statements",
            "tests/language/test_statements.py::"
            "test_level_0_is_the_posterior_whatever_a_policy_says[tempered]",
            "tests/test_numpyro_sites.py::test_inside_a_program_it_is_the_factor",
            "tests/test_predictive.py::test_predictions_have_the_programs_law",
        ),
    ),
    "samplers": Family(
        tests=("tests/sampling",),
        sources=(
            "composeprob/checkpoint.py",
            "composeprob/files.py",
            "composeprob/kernels",
            "composeprob/results/store.py",
            "composeprob/runtime",
            "composeprob/samplers",
            "composeprob/schedule.py",
            "composeprob/tuning.py",
            "tests/sampling_cases.py",
        ),
        cases=(
            "tests/sampling/test_adaptive.py::"
            "test_acceptance_is_on_target_at_every_level",
            "tests/sampling/test_counts.py::test_a_loop_has_the_network_once[SMC-None]",
            "tests/sampling/test_counts.py::"
            "test_a_loop_has_the_network_once[SMC, scores-None]",
            "tests/sampling/test_counts.py::"
            "test_evaluations_are_what_the_result_says[SMC]",
            "tests/sampling/test_driver.py::"
            "test_one_trace_for_ten_or_a_thousand_levels_and_for_rules_written_again",
            "tests/sampling/test_driver.py::"
            "test_samples_depend_on_key_and_number_of_chains_only",
            "tests/sampling/test_driver.py::test_ctrl_c_returns_what_is_done",
            "tests/sampling/test_evidence_of_data.py::"
            "test_weights_add_up_to_the_evidence_by_a_rule_of_second_order",
            "tests/sampling/test_fit.py::"
            "test_an_affine_score_is_found_wherever_the_chains_are",
            "tests/sampling/test_fit.py::"
            "test_one_level_is_exact_for_gaussians[all powers 42-3]",
            "tests/sampling/test_fit.py::test_a_wrong_control_or_slope_is_seen",
            "tests/sampling/test_laws.py",
            "tests/sampling/test_layout.py::"
            "test_an_evaluations_score_is_the_gradient_of_its_log_density[noised]",
            "tests/sampling/test_random.py",
            "tests/sampling/test_resampling.py::test_copies_are_unbiased",
            "tests/sampling/test_resampling.py::"
            "test_equal_weights_keep_every_chain_and_no_chain_of_weight_zero_is_copied",
            "tests/sampling/test_resampling.py::"
            "test_the_variance_of_the_evidence_follows_the_genealogy",
            "tests/sampling/test_resume.py::test_a_resumed_run_gives_the_same_samples",
            "tests/sampling/test_resume.py::"
            "test_the_damaged_last_checkpoint_is_passed_over",
            "tests/sampling/test_step.py::test_it_is_ddpm_and_ddim[0.5-17]",
            "tests/sampling/test_step.py::"
            "test_the_law_on_a_gaussian_follows_the_recursion",
            "tests/sampling/test_step.py::"
            "test_the_density_of_a_step_is_that_of_its_draws[fitted]",
            "tests/sampling/test_step.py::"
            "test_a_fitted_step_takes_a_gaussian_product_from_level_to_level[1.0-2.0]",
            "tests/sampling/test_step.py::"
            "test_the_second_order_keeps_the_variance_and_the_first_does_not",
            "tests/sampling/test_step.py::test_it_is_bayes_rule_for_the_step[3.0-1.0]",
            "tests/sampling/test_stream.py::"
            "test_a_stopped_run_goes_on_with_the_same_draws[True]",
            "tests/sampling/test_tracking.py::test_the_identity_is_exact_for_gaussians",
            "tests/sampling/test_tracking.py::test_mutants_do_not_know_it",
        ),
    ),
    "results": Family(
        tests=(
            "tests/density/test_fokker_planck.py",
            "tests/density/test_stein.py",
            "tests/test_comparison.py",
            "tests/test_estimates.py",
            "tests/test_result.py",
            "tests/test_shares.py",
        ),
        sources=(
            "composeprob/density",
            "composeprob/events.py",
            "composeprob/files.py",
            "composeprob/findings.py",
            "composeprob/records.py",
            "composeprob/results",
        ),
        cases=(
            "tests/density/test_fokker_planck.py::"
            "test_a_scaled_score_has_the_residual_that_it_must_have[30]",
            "tests/density/test_stein.py::"
            "test_exact_draws_satisfy_the_identity[two modes]",
            "tests/density/test_stein.py::"
            "test_samples_of_another_distribution_are_named",
            "tests/test_comparison.py::test_a_dropped_mode_of_a_fifth_has_the_finding",
            "tests/test_comparison.py::test_right_runs_raise_no_alarm",
            "tests/test_estimates.py::test_intervals_cover",
            "tests/test_result.py::test_weighted_statistics_against_repetition",
            "tests/test_result.py::test_round_trip_through_a_file",
            "tests/test_shares.py::test_right_shares_have_no_finding",
            "tests/test_shares.py::"
            "test_a_share_that_is_wrong_by_little_is_found_where_chains_are_many",
            "tests/test_shares.py::test_wrong_shares_are_found",
            "tests/test_shares.py::"
            "test_independent_chains_of_wrong_proportions_have_the_finding",
            "tests/test_shares.py::test_groups_behind_barriers_are_found_however_small",
        ),
    ),
    "mistakes": Family(
        tests=(
            "tests/test_advice.py",
            "tests/test_answers.py",
            "tests/test_malformed.py",
            "tests/test_mistakes.py",
        ),
        sources=("composeprob",),
        cases=(
            "tests/test_advice.py::test_wrong_advice_fails",
            "tests/test_advice.py::test_messages_give_code",
            "tests/test_answers.py::"
            "test_a_network_that_is_wrong_at_all_levels_is_no_network_of_too_little_"
            "noise",
            "tests/test_answers.py::test_mistakes_are_refused_in_words",
            "tests/test_malformed.py::test_the_good_ones_load",
            "tests/test_mistakes.py::test_the_place_is_a_line_of_the_program",
            "tests/test_mistakes.py::test_every_error_says_how_to_fix_it",
            "tests/test_mistakes.py::"
            "test_a_scale_that_becomes_negative_in_a_run_is_named",
        ),
    ),
    "packaging": Family(
        tests=(
            "tests/test_devices_command.py",
            "tests/test_extras.py",
            "tests/test_packaging.py",
        ),
        sources=("composeprob", "models", "tools"),
        cases=(
            "tests/test_devices_command.py::"
            "test_collectives_are_counted_where_they_start",
            "tests/test_extras.py::test_the_extras_are_those_of_the_distribution",
            "tests/test_packaging.py::test_everything_is_of_one_version",
            "tests/test_packaging.py::test_every_import_is_a_declared_dependency",
            "tests/test_packaging.py::test_few_lines_say_any",
        ),
    ),
}
EVERY = (
    ".ci",
    "Makefile",
    "constraints.txt",
    "pyproject.toml",
    "tests/conftest.py",
    "tools/families.py",
)
"""Files whose change touches every family."""


def _within(file: str, places: Iterable[str]) -> int:
    """Length of the longest of the files and folders that a file is in; 0 for none."""
    lengths = [0]
    for place in places:
        if file == place or file.startswith(f"{place}/"):
            lengths.append(len(place))
    return max(lengths)


def family_of(file: str) -> str | None:
    """Return the family of a test file; None for the core."""
    lengths = {name: _within(file, family.tests) for name, family in FAMILIES.items()}
    nearest = max(lengths, key=lambda name: lengths[name])
    return nearest if lengths[nearest] else None


def marks(test: str) -> list[str]:
    """Return the marks of a test, by its id without or with its parameters."""
    file = test.partition("::")[0]
    name = family_of(file)
    if name is None:
        return [CORE]
    function = test.partition("[")[0]
    of_class = function.rpartition("::")[0]
    if {test, function, of_class, file} & set(FAMILIES[name].cases):
        return [name, CORE]
    return [name]


def touched(files: Iterable[str]) -> list[str]:
    """Return the families whose tests or sources are among these files."""
    names = []
    files = list(files)
    if any(_within(file, EVERY) for file in files):
        return list(FAMILIES)
    for name, family in FAMILIES.items():
        own = [file for file in files if family_of(file) == name]
        if own or any(_within(file, family.sources) for file in files):
            names.append(name)
    return names


def git(root: Path, *arguments: str) -> list[str]:
    """Return the lines that git prints.

    Raises:
        OSError, subprocess.CalledProcessError: there is no git, or no such commit.
    """
    run = subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
    )
    return run.stdout.splitlines()


def base(root: Path) -> str:
    """Return the commit that the checkout is compared with: where its branch left the
    main one, or else the one before."""
    head = git(root, "rev-parse", "HEAD")
    for main in ("origin/main", "main"):
        try:
            left = git(root, "merge-base", "HEAD", main)
        except subprocess.CalledProcessError:
            continue  # there is no such branch here
        if left != head:
            return left[0]
    return "HEAD~1"


def changed(root: Path) -> list[str] | None:
    """Return the files that differ from the `base`, untracked ones too; None without a
    history."""
    try:
        differing = git(root, "diff", "--name-only", "--no-renames", base(root))
        new = git(root, "ls-files", "--others", "--exclude-standard")
    except (OSError, subprocess.CalledProcessError):
        return None
    return differing + new


def main() -> int:
    """Print the families that a change touches."""
    files = changed(ROOT)
    names = list(FAMILIES) if files is None else touched(files)
    print(*names)
    return 0


if __name__ == "__main__":
    sys.exit(main())

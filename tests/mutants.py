"""Break the code on purpose, one line at a time: each break must turn the test that guards it red.

    python tests/mutants.py [WORD ...]      only the rows that contain all of the words

Works on a copy of the tree in a temporary folder. First the named tests must be green there, unbroken. Exit status 1 if
a mutant survives, or if a row no longer fits the code.
"""

# ruff: noqa: E501  one row of the table is one line

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    """`old` stands exactly once in `file`; with `new` in its place, `test` must fail."""

    file: str
    old: str
    new: str
    test: str


LARS, FOREACH, FUSED, TENSORS = (f"dist_lars/optim/{name}.py" for name in ("lars", "foreach", "fused", "tensors"))
LAMB, GROUPS, BUILD = (f"dist_lars/optim/{name}.py" for name in ("lamb", "groups", "build"))
GOLDEN = "tests/unit/test_lars.py::test_golden_steps"
ORACLE = "tests/unit/test_lars.py::test_multi_tensor_path_equals_the_oracle"
FUSED_ORACLE = "tests/unit/test_lars.py::test_fused_path_equals_the_oracle"
ENGINE, COMM, EQUIVALENCE = "dist_lars/engine.py", "dist_lars/comm/together.py", "tests/parallel/test_equivalence.py"
BACKENDS, HOROVOD = "tests/parallel/test_backends.py", "dist_lars/comm/horovod_comm.py"
DEFECTS, TORCH = "tests/unit/test_lars_defects.py", "tests/unit/test_lars_torch.py"
STATE, STUDY = "tests/unit/test_state.py", "benchmarks/study_grid.py"
STUDY_GRID, STUDY_REPORT = (f"tests/unit/test_study_{name}.py" for name in ("grid", "report"))
DOCTOR, SBATCH = "tests/unit/test_doctor_cluster.py", "tests/unit/test_sbatch.py"
MODELS, ALEXNET = "tests/unit/test_models.py", "dist_lars/models/alexnet.py"

MUTANTS = [
    # The law.
    Mutant(FOREACH, '== "inside"', '== "outside"', GOLDEN),
    Mutant(FOREACH, '== "norm_of_sum"', '== "sum_of_norms"', GOLDEN),
    Mutant(FUSED, 'if group["lr_placement"] == "outside" else', "if True else", GOLDEN),
    Mutant(FUSED, '== "norm_of_sum"', '== "sum_of_norms"', GOLDEN),
    Mutant(LARS, '== "sum_of_norms" else 0.0', '== "" else 0.0', GOLDEN),
    Mutant(LARS, 'group["trust_coefficient"] * w_norm', "0.001 * w_norm", GOLDEN),
    Mutant(LARS, ' + group["eps"])', ")", ORACLE),
    Mutant(LARS, "(ratio / group[\"lr\"]).clamp(max=1.0)", 'ratio.clamp(max=1.0)', "tests/unit/test_lars.py::test_clip_puts_the_smaller_of_rate_and_ratio_in_place_of_their_product"),
    Mutant(LARS, '(w_norm < group["min_norm"]) | (w_norm == 0)', "(w_norm == 0)", f"{DEFECTS}::test_bolts_solo_systemds_small_norm_keeps_decay_and_moves_at_the_raw_rate"),
    Mutant(LARS, ' | (w_norm == 0) | ', " | ", f"{DEFECTS}::test_bitsandbytes_noahgolmant_tensors_that_start_at_zero_are_not_frozen"),
    Mutant(LARS, " | (x_norm == 0)", "", f"{TORCH}::test_zero_weights_and_zero_gradients_stay_finite"),
    Mutant(FOREACH, "    if vs:\n", "    if vs and group[\"momentum\"] > 0.6:\n", ORACLE),
    Mutant(FOREACH, 'vs, alpha=group["momentum"])', "vs)", ORACLE),
    Mutant(TENSORS, "        torch._foreach_neg_(ds)", "        pass", ORACLE),
    Mutant(TENSORS, "gs, ws, alpha=weight_decay", "gs, ws, alpha=2 * weight_decay", f"{DEFECTS}::test_systemds_decay_is_applied_exactly_once"),
    Mutant(FUSED, '-group["weight_decay"] if group["maximize"] else group["weight_decay"]', 'group["weight_decay"]', FUSED_ORACLE),
    Mutant(FUSED, "CANCELLED = 0.01", "CANCELLED = 0.0", "tests/unit/test_lars.py::test_norm_of_sum_keeps_its_digits_where_decay_balances_the_gradient"),
    Mutant(FUSED, 'fixed = {"weight_decay": group["weight_decay"]', 'fixed = {"weight_decay": 0.0', GOLDEN),
    Mutant(FUSED, "SMALLEST_GAIN = 2.0**-28", "SMALLEST_GAIN = 0.0", "tests/unit/test_lars.py::test_tiny_rates_keep_their_digits"),
    Mutant(FUSED, "DOT = 1 << 20", "DOT = 1 << 40", "tests/unit/test_lars.py::test_norms_of_a_large_layer_are_accurate"),
    Mutant(FUSED, "        gg += torch", "        gg = torch", "tests/unit/test_lars.py::test_large_layer_in_blocks_equals_the_oracle"),
    Mutant(TENSORS, "tensors[0].is_cpu and dtype == torch.float32", "False", "tests/unit/test_lars.py::test_norms_of_a_large_layer_are_accurate"),
    # A citizen of torch.
    Mutant("dist_lars/optim/eager.py", "zero_grad = unwrap(Optimizer.zero_grad)", "zero_grad = Optimizer.zero_grad", "tests/unit/test_optim_build.py::test_training_does_not_wait_for_the_import_of_torchs_compiler"),
    Mutant(LARS, 'if group["clip"]:', 'if group["clip"] or not bool((w_norm >= 0).all()):', f"{TORCH}::test_step_on_cuda_reads_nothing_back"),
    Mutant(LAMB, "torch.where((w_norm == 0)", "torch.where((w_norm == 0) | (float(w_norm.sum()) < 0)", f"{TORCH}::test_lamb_on_cuda_reads_nothing_back"),
    Mutant(LARS, "super().__init__(params, options)", 'super().__init__(params, {**options, "eps": 1e-9})', f"{TORCH}::test_rebuilt_from_its_groups_it_is_the_same"),
    Mutant(LARS, "_step_supports_amp_scaling = True", "_step_supports_amp_scaling = False", f"{TORCH}::test_loss_scale_changes_nothing"),
    Mutant(FOREACH, "    scale.unscale_([g_norm])\n", "", f"{TORCH}::test_loss_scale_changes_nothing"),
    Mutant(TENSORS, "                t.masked_fill_(self.overflow.to(t.device), 0.0)", "                pass", f"{TORCH}::test_overflow_changes_neither_weights_nor_momentum"),
    Mutant(TENSORS, "torch.where(self.overflow.to(like.device), 1.0, value)", "torch.where(self.overflow.to(like.device), value, value)", f"{TORCH}::test_overflow_changes_neither_weights_nor_momentum"),
    Mutant(TENSORS, "return torch.float32 if dtype in", "return dtype if dtype in", f"{TORCH}::test_half_precision_takes_its_norms_in_float32"),
    Mutant(TENSORS, "> limit and i > start", "> 2 * limit and i > start", f"{TORCH}::test_temporaries_are_at_most_one_largest_layer"),
    Mutant(TENSORS, "if g.is_sparse:", "if False:", f"{DEFECTS}::test_tensorflow_models_kozistr_sparse_gradients_are_refused_by_name"),
    Mutant(TENSORS, 'if hasattr(p, "to_local"):', "if False:", f"{DEFECTS}::test_deepspeed_490_sharded_parameters_are_refused"),
    Mutant(TENSORS, "ds = [g.to(wide(g.dtype), copy=True) for g in gs]", "ds = [g.to(wide(g.dtype)) for g in gs]", f"{DEFECTS}::test_apex_kozistr_4uiiurz1_gradients_are_never_modified"),
    Mutant(LARS, "elif not _follows(v, w):", "elif False:", f"{TORCH}::test_momentum_follows_a_model_that_changes_its_memory_format"),
    Mutant(LARS, 'if group["momentum"] and p.requires_grad:', "if False:", f"{TORCH}::test_momentum_is_allocated_with_the_group"),
    Mutant(LARS, "            with torch.enable_grad():\n                loss = closure()", "            loss = closure()", f"{DEFECTS}::test_apex_barlowtwins_moco_closure_works_with_gradients_enabled"),
    Mutant(LARS, "lr: float | Tensor = required,", "lr: float | Tensor = 1.0,", f"{DEFECTS}::test_torch_88106_learning_rate_has_no_default"),
    Mutant(LARS, "scale = LossScale.of(self)", '__import__("horovod.torch").torch.allreduce(torch.ones(1)); scale = LossScale.of(self)', "tests/parallel/test_optim_horovod.py::test_ratios_agree_without_a_collective_of_their_own[2]"),
    Mutant(FUSED, "return same_order(w, g)", "return w.stride() == g.stride()", f"{TORCH}::test_every_parameter_of_a_network_takes_the_fast_path"),
    Mutant(FUSED, "return same_order(w, g)", "return True", f"{TORCH}::test_any_layout_equals_the_oracle"),
    # LAMB.
    Mutant(LAMB, "[1 - beta1**t for t in steps]", "[1.0 for t in steps]", "tests/unit/test_lamb.py::test_first_step_by_hand"),
    Mutant(LAMB, "[1 - beta2**t for t in steps]", "[1.0 for t in steps]", "tests/unit/test_lamb.py::test_first_step_by_hand"),
    Mutant(LAMB, "(w_norm == 0) | (u_norm == 0)", "(u_norm == 0)", "tests/unit/test_lamb.py::test_zero_weights_and_zero_gradients_stay_finite_and_are_not_frozen"),
    Mutant(LAMB, 'ws, alpha=group["weight_decay"])', "ws, alpha=0.0)", "tests/unit/test_lamb.py::test_first_step_by_hand"),
    # Groups and names.
    Mutant(GROUPS, "NORMS = (_NormBase, ", "NORMS = (nn.BatchNorm1d, ", "tests/unit/test_param_groups.py::test_resnet18_counts"),
    Mutant(GROUPS, "0.0 if role in undecayed", '0.0 if role in undecayed - {"norm"}', "tests/unit/test_param_groups.py::test_batchnorm_under_a_name_without_bn_is_found_by_its_type"),
    Mutant(GROUPS, "groups[role not in unadapted,", "groups[role not in undecayed,", "tests/unit/test_param_groups.py::test_every_parameter_is_in_exactly_one_group"),
    Mutant(GROUPS, "    _refuse_shared(owned)\n", "", "tests/unit/test_param_groups.py::test_shared_parameters_are_refused_by_both_names"),
    Mutant(GROUPS, "or parameter.dim() > 1 else", "or True else", "tests/unit/test_param_groups.py::test_bare_vectors_need_a_role"),
    Mutant(BUILD, "return otherwise if value is None else value", "return value or otherwise", f"{DEFECTS}::test_mlcommons_tf2_eps_of_zero_stays_zero"),
    Mutant(BUILD, '"lr": lr * group.get("lr_scale", 1.0)', '"lr": lr', "tests/unit/test_optim_build.py::test_each_name_builds_steps_and_survives_the_rebuild"),
    # Benchmarks.
    Mutant("benchmarks/record.py", "np.asarray(values, dtype=np.float64) / np.asarray(base, dtype=np.float64)", "np.asarray(values, dtype=np.float64) / np.median(base)", "tests/unit/test_record.py::test_ratios_are_taken_round_by_round"),
    Mutant("benchmarks/record.py", "and not PRIVATE.search(k)", "", "tests/unit/test_record.py::test_record_is_read_back_and_says_where_it_was_measured"),
    # The trainer.
    Mutant(ENGINE, "        finish_queued(device)\n        before", "        before", "tests/unit/test_device.py::test_what_the_gpu_still_computes_is_a_ranks_own_work"),
    Mutant(ENGINE, "model.train(was_training)", "model.train()", "tests/unit/test_api_weights.py::test_evaluation_leaves_a_model_in_its_mode"),
    Mutant("dist_lars/guards.py", "first = 1 + start * BLOCK", "first = 1", "tests/unit/test_guards.py::test_sums_in_blocks_are_those_of_the_whole"),
    Mutant(HOROVOD, "{'.'.join(values)[:60]}", "{'.'.join(values)}", "tests/unit/test_comm.py::test_the_name_of_a_sum_is_short_however_many_ranks_report"),
    Mutant(ENGINE, "job.scaler.scale(loss / parts)", "job.scaler.scale(loss)", f"{EQUIVALENCE}::test_ranks_times_passes_do_not_matter"),
    Mutant(ENGINE, "job.comm.rank * passes + i)", "i)", f"{EQUIVALENCE}::test_ranks_times_passes_do_not_matter"),
    Mutant(ENGINE, "    job.scaler.unscale_(job.optimizer)\n", "", "tests/unit/test_guards.py::test_the_loss_scale_reaches_neither_norm_nor_clipping_nor_weights"),
    Mutant("dist_lars/data/transforms.py", "@functools.cache\ndef _mean_and_scale", "@functools.lru_cache(0)\ndef _mean_and_scale", "tests/unit/test_device.py::test_a_step_moves_its_images_to_the_gpu_and_nothing_else"),
    Mutant("dist_lars/state.py", "[torch.zeros(0)]).cpu()", "[torch.zeros(0)])", "tests/unit/test_device.py::test_what_ranks_tell_each_other_of_their_buffers_lies_on_no_gpu"),
    Mutant(COMM, "        comm.broadcast_(dict(model.named_parameters()))\n", "        pass\n", f"{EQUIVALENCE}::test_all_ranks_start_with_the_weights_of_rank_0"),
    Mutant("dist_lars/rundir.py", " or not _begun(run_dir):", ":", "tests/unit/test_api_weights.py::test_a_start_that_was_refused_leaves_no_run_behind"),
    Mutant("dist_lars/rundir.py", "(log.exists() and log.stat().st_size > 0)", "False", "tests/unit/test_checkpoint.py::test_a_run_that_was_killed_before_its_first_checkpoint_is_a_run"),
    Mutant("dist_lars/checkpoint.py", "    elif path.name in POINTERS:\n", "    elif False:\n", "tests/unit/test_api_weights.py::test_what_a_result_names_can_be_evaluated"),
    Mutant(ENGINE, "    if finite or", "    if True or", "tests/unit/test_guards.py::test_a_gradient_that_is_not_finite_changes_nothing"),
    Mutant(ENGINE, "        counts.sums.copy_(before)", "        pass", "tests/unit/test_guards.py::test_a_gradient_that_is_not_finite_changes_nothing"),
    Mutant(ENGINE, '    if values["count"] + sums["left_out"] != expected:', "    if False:", "tests/parallel/test_comm.py::test_missing_images_are_an_error"),
    Mutant(ENGINE, "(1 if job.reducer is None else job.reducer.ranks)", "1", f"{EQUIVALENCE}::test_ranks_times_passes_do_not_matter"),
    Mutant(HOROVOD, "        whole = pad(flat, (0, -flat.numel() % hvd.size()))", "        whole = pad(flat, (0, -flat.numel() % 2))", f"{BACKENDS}::test_what_the_wire_rounds"),
    Mutant(HOROVOD, "shares.float().sum(0).bfloat16()", "shares[0]", f"{BACKENDS}::test_what_the_wire_rounds"),
    Mutant("dist_lars/comm/torch_comm.py", "            flat.div_(self.size)\n", "", f"{BACKENDS}::test_the_same_weights_and_losses_as_alone"),
    Mutant("dist_lars/comm/torch_comm.py", "return dist.all_reduce(flat, async_op=True)\n", "return dist.all_reduce(flat[1:], async_op=True)\n", f"{BACKENDS}::test_the_same_weights_and_losses_as_alone"),
    Mutant("dist_lars/reducer.py", "            if bucket.missing:\n                return\n", "            if bucket.missing:\n                continue\n", "tests/unit/test_reducer.py::test_buckets_start_in_the_same_order_whatever_arrives_first"),
    Mutant("dist_lars/reducer.py", "    return len(group) == 1 and", "    return False and", "tests/unit/test_reducer.py::test_a_large_gradient_is_sent_from_where_it_lies"),
    Mutant("dist_lars/launchers.py", 'next((name for name, v in LAUNCHERS.items() if', 'next((name for name, v in reversed(LAUNCHERS.items()) if', "tests/unit/test_launchers.py::test_the_place_of_a_rank"),
    Mutant("dist_lars/continuation.py", '"comm.backend", ', "", "tests/launch/test_backends.py::test_a_run_goes_on_with_the_other_backend"),
    Mutant(COMM, '    comm.average_(mean, "buffers")\n', "", f"{EQUIVALENCE}::test_batchnorm_buffers_are_each_ranks_own_and_their_mean_evaluates"),
    Mutant(COMM, "        unpack(own, buffers)\n", "        pass\n", f"{EQUIVALENCE}::test_batchnorm_buffers_are_each_ranks_own_and_their_mean_evaluates"),
    Mutant(COMM, "    if len(set(digests)) == 1:", "    if True:", "tests/parallel/test_comm.py::test_refusals_reach_every_rank"),
    Mutant("dist_lars/comm/start.py", "    if seen != expected:", "    if False:", "tests/unit/test_comm.py::test_tasks_that_are_separate_jobs_are_stopped"),
    Mutant("dist_lars/reducer.py", "p.grad = torch.zeros_like(p)", "p.grad = torch.ones_like(p)", "tests/unit/test_reducer.py::test_a_parameter_without_gradient_counts_as_zero"),
    Mutant("dist_lars/reducer.py", "piece.as_strided(p.shape, p.stride(), piece.storage_offset())", "piece.view(p.shape)", "tests/unit/test_reducer.py::test_gradients_have_the_layout_of_their_parameters"),
    Mutant("dist_lars/reducer.py", "            if self.last_pass:", "            if True:", "tests/unit/test_reducer.py::test_passes_accumulate_and_the_last_one_starts_the_sums"),
    Mutant("dist_lars/schedule.py", "(step + 1) / rate.warmup_steps", "step / rate.warmup_steps", "tests/unit/test_schedule.py::test_rate_at_its_corners"),
    Mutant("dist_lars/data/order.py", "permutation(n, seed, epoch)[", "permutation(n, seed, 0)[", "tests/unit/test_order.py::test_another_epoch_has_another_order"),
    Mutant("dist_lars/data/order.py", "return range(n * rank // size, n * (rank + 1) // size)", "return range(-(-n // size) * rank, -(-n // size) * (rank + 1))", "tests/unit/test_order.py::test_validation_covers_every_image_once"),
    Mutant("dist_lars/checkpoint.py", "            os.fsync(f.fileno())", "            pass", "tests/unit/test_checkpoint.py::test_files_reach_the_disk_before_their_names"),
    Mutant("dist_lars/checkpoint.py", "comment == COMMENT + digest", "True", "tests/unit/test_checkpoint.py::test_every_flipped_byte_is_noticed"),
    Mutant("dist_lars/checkpoint.py", "weights_only=True)\n    except (RuntimeError", "weights_only=False)\n    except (RuntimeError", "tests/unit/test_checkpoint.py::test_a_checkpoint_cannot_run_code"),
    Mutant("dist_lars/state.py", "    _load_optimizer(job.optimizer, state[\"optimizer\"])\n", "", "tests/launch/test_train.py::test_a_killed_run_continues_to_the_same_weights"),
    Mutant("dist_lars/state.py", 'state["buffers"][rank] if same_size else None', "None", "tests/launch/test_train.py::test_a_killed_run_continues_to_the_same_weights"),
    Mutant("dist_lars/state.py", "    counts.sums.copy_(sums[rank]", "    sums.copy_(sums[rank]", f"{STATE}::test_all_of_a_run_comes_back"),
    Mutant("dist_lars/state.py", '        job.scaler.load_state_dict(state["scaler"])\n', "        pass\n", f"{STATE}::test_all_of_a_run_comes_back"),
    Mutant("dist_lars/state.py", '    if state["scaler"]:', '    if True:', f"{STATE}::test_loss_scaling_may_begin_in_the_middle_of_a_run"),
    Mutant("dist_lars/state.py", '        group.update(own)', '        pass', f"{STATE}::test_options_of_the_optimizer_that_may_differ_are_those_of_the_run_that_goes_on"),
    Mutant("dist_lars/state.py", 'not in ("params", "lr")}', 'not in ("params",)}', f"{STATE}::test_options_of_the_optimizer_that_may_differ_are_those_of_the_run_that_goes_on"),
    Mutant("dist_lars/state.py", 'state["plan"]["train_images"], job', 'job.plan.train_images, job', f"{STATE}::test_other_images_and_another_number_format_are_another_run"),
    Mutant("dist_lars/state.py", '    if "precision" in state:', '    if False:', f"{STATE}::test_other_images_and_another_number_format_are_another_run"),
    Mutant("dist_lars/state.py", '    if placements[0] != placements[1]:', '    if False:', f"{STATE}::test_a_state_that_the_new_options_cannot_continue_is_refused"),
    Mutant("dist_lars/state.py", "        if comm.rank == 0:\n            found.append(said)", "        if True:\n            found.append(said)", f"{STATE}::test_buffers_are_kept_by_the_first_rank_alone_and_come_in_pieces"),
    Mutant("dist_lars/state.py", "piece.clone()", "piece", f"{STATE}::test_buffers_are_kept_by_the_first_rank_alone_and_come_in_pieces"),
    Mutant("dist_lars/state.py", "max(1, GATHERED // comm.size)", "GATHERED", f"{STATE}::test_buffers_are_kept_by_the_first_rank_alone_and_come_in_pieces"),
    Mutant("dist_lars/state.py", "sums.sum(0) * (rank == 0)", "sums.sum(0)", f"{STATE}::test_each_rank_gets_its_own_buffers_at_the_same_size_and_their_mean_at_another"),
    Mutant("dist_lars/state.py", "buffers[rank] if same_size else None", "buffers[0]", f"{STATE}::test_each_rank_gets_its_own_buffers_at_the_same_size_and_their_mean_at_another"),
    Mutant("dist_lars/state.py", '"lr_factor": progress.lr_factor', '"lr_factor": 1.0', f"{STATE}::test_all_of_a_run_comes_back"),
    Mutant("dist_lars/run.py", 'line.get("saved", True)', "True", "tests/unit/test_run.py::test_the_best_is_a_checkpoint_that_exists"),
    Mutant("dist_lars/run.py", "save = save or last or epoch %", "save = last or epoch %", "tests/unit/test_run.py::test_any_reason_to_save_will_do"),
    Mutant("dist_lars/run.py", '            scores.pop(line["step"], None)', "            pass", "tests/unit/test_run.py::test_a_best_that_could_not_be_written_is_none"),
    Mutant("dist_lars/run.py", "self.started, **facts)", '"", **facts)', "tests/unit/test_run.py::test_a_job_that_goes_on_after_a_failure_says_so"),
    Mutant("dist_lars/rundir.py", "str(checkpoint.file_of(config.resume.start))", "config.resume.start", "tests/unit/test_run.py::test_all_ranks_continue_from_the_file_that_rank_0_found"),
    Mutant("dist_lars/api.py", "    _resume(run, config, run_dir)\n", "    write_config(config, run_dir)\n    _resume(run, config, run_dir)\n", "tests/unit/test_run.py::test_what_cannot_be_continued_leaves_the_run_as_it_was"),
    Mutant("dist_lars/checkpoint.py", "        except OSError:\n            good = False", "        except FileNotFoundError:\n            good = False", "tests/unit/test_checkpoint.py::test_the_newest_good_one_is_found"),
    Mutant("dist_lars/supervisor.py", " + self.evaluate_seconds)", ")", "tests/unit/test_guards.py::test_a_time_limit_leaves_room_for_steps_an_evaluation_and_a_save"),
    Mutant("dist_lars/supervisor.py", "        self.noted_at = time.monotonic()\n", "", "tests/unit/test_guards.py::test_a_time_limit_leaves_room_for_steps_an_evaluation_and_a_save"),
    Mutant("dist_lars/supervisor.py", "found = found or first_difference", "found or first_difference", "tests/unit/test_guards.py::test_a_sum_that_differs_names_its_tensor"),
    Mutant(ENGINE, "    elif job.ema is not None:", "    if job.ema is not None:", "tests/unit/test_guards.py::test_an_overflow_under_loss_scaling_leaves_sums_and_averages_alone"),
    Mutant(ENGINE, "waited[slowest] /", "waited[0] /", "tests/unit/test_guards.py::test_the_report_names_the_slowest_rank"),
    Mutant("dist_lars/guards.py", "key(row) != key(per_rank[0])", "False", "tests/unit/test_guards.py::test_the_first_difference_is_named"),
    Mutant("dist_lars/api.py", "    held.push(run.supervisor.leave)\n", "", "tests/unit/test_api_weights.py::test_a_run_that_was_refused_holds_neither_directory_nor_signals[resume.from]"),
    Mutant("dist_lars/api.py", "        held.enter_context(lock)\n", "        own_run_dir.kept = lock\n", "tests/unit/test_api_weights.py::test_a_run_that_was_refused_holds_neither_directory_nor_signals[resume.from]"),
    Mutant("dist_lars/stopping.py", "        if self.signal is not None:\n            os._exit(EXIT_STOPPED)\n", "", "tests/unit/test_stopping.py::test_a_signal_is_noted_and_a_second_one_ends_the_process"),
    # Networks and recipes.
    Mutant(ALEXNET, "alpha=5 * 1e-4", "alpha=1e-4", f"{MODELS}::test_response_normalisation_is_the_papers"),
    Mutant(ALEXNET, "2 if split and grouped else 1", "1", f"{MODELS}::test_the_table[alexnet-options0-1000-224-60965224-16-724406816]"),
    Mutant(ALEXNET, "eps=1e-4, affine=False)] if i < 4", "eps=1e-4, affine=False)] if i < 5", f"{MODELS}::test_where_the_normalisation_stands"),
    Mutant(ALEXNET, "bias=(0.0, 1.0, 0.0, 1.0,", "bias=(0.0, 0.0, 0.0, 1.0,", f"{MODELS}::test_alexnets_start_as_their_sources_say"),
    Mutant("dist_lars/models/resnet.py", "zero_init_residual=zero_gamma", "zero_init_residual=False", f"{MODELS}::test_zero_gamma_makes_every_block_an_identity_at_first"),
    Mutant("dist_lars/models/__init__.py", "    if idle:\n", "    if False:\n", f"{MODELS}::test_wrong_names_and_idle_options_are_refused"),
    Mutant("dist_lars/checkpoint.py", "    weights = counters | weights\n", "", f"{MODELS}::test_a_plain_state_dict_loads_even_from_an_old_pytorch"),
    Mutant("dist_lars/checkpoint.py", 'state.get("ema") or state["model"]', 'state["model"]', f"{MODELS}::test_a_checkpoint_gives_the_weights_that_it_evaluated"),
    Mutant("dist_lars/ema.py", "self.decay, step / (step + 9))", "self.decay, 1.0)", "tests/unit/test_ema.py::test_it_forgets_the_initial_weights_at_once"),
    Mutant("dist_lars/ema.py", "        finally:\n            self._swap()", "        finally:\n            pass", "tests/unit/test_ema.py::test_inside_the_model_holds_the_average_and_outside_its_own"),
    Mutant("dist_lars/metrics.py", "label_smoothing=smoothing", "label_smoothing=0.0", "tests/unit/test_ema.py::test_label_smoothing_spreads_a_share_over_all_classes"),
    Mutant("dist_lars/state.py", 'state.get("ema_buffers", state["buffers"])', 'state["buffers"]', "tests/parallel/test_models_train.py::test_a_resumed_run_has_the_same_averaged_weights"),
    Mutant("dist_lars/data/transforms.py", "    left, top = rng.randint(0, resize - size), rng.randint(0, resize - size)\n", "    left, top = 0, 0\n", "tests/unit/test_minimal.py::test_every_crop_of_the_squeezed_image_comes_up_and_half_are_mirrored"),
    Mutant("dist_lars/presets/alexnet_8k_linear.yaml", "base_lr: 0.01", "base_lr: 0.02", "tests/unit/test_presets.py::test_the_linear_rule_over_batches"),
    # Input.
    Mutant("dist_lars/data/stage.py", "with suppress(BlockingIOError), lock(place / USED):", "if True:", "tests/unit/test_shards.py::test_a_copy_that_another_job_reads_is_not_removed"),
    Mutant("dist_lars/data/stage.py", "if path.exists() and os.path.samestat(os.fstat(held.fileno()), path.stat()):", "if True:", "tests/unit/test_shards.py::test_a_job_that_waits_for_a_copy_finds_it_removed_and_makes_its_own"),
    Mutant("dist_lars/data/loader.py", 'random.Random(f"replace/{first}")', "random.Random()", "tests/unit/test_loader.py::test_skipped_files_are_replaced_alike_by_all_ranks_and_workers"),
    Mutant("dist_lars/data/loader.py", "        torch.set_num_threads(1)  # one image", "        torch.set_num_threads(2)  # one image", "tests/unit/test_loader.py::test_images_are_made_by_one_thread_and_the_trainer_keeps_its_own"),
    Mutant("dist_lars/data/loader.py", "if len(self.skipped) > self.limit:", "if False:", "tests/unit/test_loader.py::test_too_many_broken_files_stop_the_run"),
    Mutant("dist_lars/data/loader.py", "except (RuntimeError, EOFError, OSError) as e:", "except EOFError as e:", "tests/unit/test_loader.py::test_a_dead_worker_is_an_error_that_names_its_cause"),
    Mutant("dist_lars/data/loader.py", "return Flag(self)", "return super().Event()", "tests/unit/test_loader.py::test_a_worker_that_dies_with_a_lock_hangs_nobody"),
    Mutant("dist_lars/data/loader.py", "maxlen=0 if loader.pin_memory else ", "maxlen=", "tests/unit/test_loader.py::test_pinned_batches_are_not_kept"),
    Mutant("dist_lars/data/loader.py", "KEPT = PREFETCH + 2", "KEPT = PREFETCH", "tests/unit/test_loader.py::test_a_batch_holds_until_the_second_one_after_it"),
    Mutant("dist_lars/locks.py", "else fcntl.LOCK_EX)", "else fcntl.LOCK_SH)", "tests/unit/test_locks.py::test_a_lock_of_another_process_is_seen_and_ends_with_it"),
    Mutant("dist_lars/data/loader.py", "        start_server()\n", "", "tests/unit/test_loader.py::test_a_signal_to_the_whole_group_is_for_the_rank_alone"),
    Mutant("dist_lars/data/process.py", "signal.pthread_sigmask(signal.SIG_BLOCK, UNHEARD)  # again", "pass  # again", "tests/unit/test_loader.py::test_a_signal_to_the_whole_group_is_for_the_rank_alone"),
    Mutant("dist_lars/data/process.py", "signal.SIGUSR1, signal.SIGUSR2)", "signal.SIGUSR1)", "tests/unit/test_loader.py::test_a_signal_to_the_whole_group_is_for_the_rank_alone"),
    Mutant("dist_lars/data/process.py", "        self.kill()  # it does", "        super().terminate()  # it does", "tests/unit/test_loader.py::test_a_busy_worker_does_not_keep_its_rank"),
    Mutant("dist_lars/runlog.py", "self.unwritten = self.unwritten[self.file.write(self.unwritten) :]", "self.unwritten, _ = b'', self.file.write(self.unwritten)", "tests/unit/test_runlog.py::test_a_line_that_is_taken_in_parts_is_written_whole"),
    Mutant("dist_lars/runlog.py", "_missing_end(self.file), set", 'b"", set', "tests/unit/test_runlog.py::test_what_a_killed_job_left_costs_no_line_of_the_next"),
    Mutant("dist_lars/runlog.py", "        with contextlib.suppress(ValueError):\n", '        if line.endswith("}"):\n', "tests/unit/test_runlog.py::test_what_a_killed_job_left_costs_no_line_of_the_next"),
    Mutant("dist_lars/runlog.py", "    if not _failed(run_dir, started):\n", "    if True:\n", "tests/unit/test_runlog.py::test_the_first_failure_of_a_job_is_its_last_word"),
    Mutant("dist_lars/watchdog.py", "except OSError as e:  # a full", "except KeyError as e:  # a full", "tests/unit/test_stopping.py::test_a_stuck_rank_ends_with_its_message_where_nothing_can_be_written"),
    Mutant("dist_lars/data/process.py", "        wait([parent.sentinel])", "        return", "tests/unit/test_loader.py::test_workers_do_not_outlive_a_killed_rank"),
    Mutant("dist_lars/data/decode.py", 'if image.mode.startswith("I"):', "if False:", "tests/unit/test_decode.py::test_odd_files_are_decoded"),
    Mutant("dist_lars/data/decode.py", "for part in (8, 4, 2, 1) if part <=", "for part in (8, 4, 2, 1) if part / 2 <=", "tests/unit/test_decode.py::test_the_size_of_the_crop_decides_how_much_is_decoded"),
    Mutant("dist_lars/data/decode.py", "round(left / part), round(top / part)", "left, top", "tests/unit/test_decode.py::test_shrunk_jpegs_cover_the_same_scene"),
    Mutant("dist_lars/data/folder.py", 'if now != content["changed"].tolist():', "if False:", "tests/unit/test_folder.py::test_a_changed_folder_is_listed_again"),
    Mutant("dist_lars/data/folder.py", "if max(t for _, t in folders) > (began - SETTLED) * 1e9:", "if False:", "tests/unit/test_folder.py::test_a_folder_that_changes_this_second_is_not_kept"),
    Mutant("dist_lars/data/packing.py", "order[position:]", "order", "tests/unit/test_pack.py::test_an_interrupted_packing_goes_on_to_the_same_bytes"),
    Mutant("dist_lars/data/packing.py", 'or shard.stat().st_size != part["bytes"]', "", "tests/unit/test_pack.py::test_a_half_written_shard_is_written_again"),
    Mutant("dist_lars/data/packing.py", "    if old == new:", "    if True:", "tests/unit/test_pack.py::test_runs_are_not_mixed"),
    Mutant("dist_lars/data/stage.py", "if digest is not None and seen.hexdigest() != digest:", "if False:", "tests/unit/test_shards.py::test_staging_verifies"),
    Mutant("dist_lars/data/stage.py", "if size > 0.98 * free:", "if False:", "tests/unit/test_shards.py::test_staging_checks_the_room_before"),
    Mutant("dist_lars/data/shards.py", 'if size != shard["bytes"]:', "if size is None:", "tests/unit/test_shards.py::test_missing_and_short_shards_are_named"),
    Mutant("dist_lars/resources.py", "max(1, min(share, int(told)) if told else share)", "max(1, int(told) if told else share)", "tests/unit/test_resources.py::test_cores_per_rank"),
    # Errors: told once, and told at all.
    Mutant("dist_lars/cli.py", "        time.sleep(LAST_WORD)\n", "        raise SystemExit(2)\n", "tests/launch/test_failure.py::test_what_is_wrong_with_another_rank_alone_is_told"),
    Mutant("dist_lars/cli.py", "        time.sleep(LAST_WORD)\n", "", "tests/launch/test_train.py::test_no_data_says_so_soon"),
    Mutant(COMM, "        _refuse_together(comm, str(e), name)\n", "", "tests/launch/test_failure.py::test_a_file_that_one_rank_alone_cannot_read_is_told"),
    Mutant(COMM, "if told and len({s and s[0] for s in said}) == 1:", "if False:", "tests/unit/test_comm.py::test_ranks_that_say_the_same_say_it_once_and_others_are_named"),
    Mutant("dist_lars/api.py", 'ranks.on_every_rank(run.comm, read, "read weights")', "read()", "tests/launch/test_failure.py::test_a_file_that_one_rank_alone_cannot_read_is_told"),
    Mutant("dist_lars/api.py", '    ranks.assert_same(comm, "\\n".join(_lines(config)), "the configuration")  #', "    #", "tests/launch/test_failure.py::test_ranks_that_are_started_with_different_batches_are_told"),
    # Studies.
    Mutant("benchmarks/study.py", 'code == 0 and status.get("state") == "finished"', "code == 0", "tests/unit/test_study_runner.py::test_a_launcher_that_ends_with_0_has_not_finished_a_run"),
    Mutant("benchmarks/study.py", "        if self.stop:  # it came before", "        if False:  # it came before", "tests/unit/test_study_runner.py::test_a_stop_that_comes_between_two_runs_starts_none"),
    Mutant("benchmarks/study.py", "            if self.stop:  # it came since", "            if False:  # it came since", "tests/unit/test_study_runner.py::test_a_stop_that_comes_while_a_run_is_started_reaches_it"),
    Mutant("benchmarks/study_store.py", 'line["kind"] == "machine" and line.get("precision") != machine.get("precision")', "False", f"{STUDY_REPORT}::test_another_precision_is_refused"),
    Mutant(STUDY, "if key in OWN or", "if", f"{STUDY_GRID}::test_an_option_that_the_study_sets_itself_is_refused_on_the_command_line"),
    Mutant(STUDY, "scores.index(max(s for s in scores if s is not None))", "scores.index(scores[-1])", f"{STUDY_GRID}::test_the_best_rate_is_chosen_the_smaller_of_two_and_never_one_that_diverged"),
    Mutant(STUDY, "in (factors[0], factors[-1])", "in (factors[-1],)", f"{STUDY_GRID}::test_a_sweep_extends_downward_where_its_best_is_the_smallest"),
    Mutant(STUDY, "{key: _longer(tried, best[key]) for key, tried in factors.items()}", "{key: _longer(tried, best[key]) if best[key] in (tried[0], tried[-1]) else tried for key, tried in factors.items()}", f"{STUDY_GRID}::test_a_best_rate_at_the_edge_gives_every_cell_of_the_group_one_more"),
    Mutant(STUDY, "        if len(best) < len(group):", "        if False:", f"{STUDY_GRID}::test_one_half_done_sweep_of_a_group_keeps_all_of_its_finals_waiting"),
    Mutant(STUDY, '"data.hold_out": s["hold_out"], ', "", f"{STUDY_GRID}::test_a_sweep_trains_shorter_on_the_others_and_is_judged_on_those_held_out"),
    Mutant(STUDY, "        options.pop(key, None)\n", "        pass\n", f"{STUDY_GRID}::test_two_rules_that_arrive_at_one_rate_share_the_run"),
    Mutant("benchmarks/study_store.py", "        with self._lock():", "        if True:", f"{STUDY_REPORT}::test_many_writers_lose_nothing"),
    Mutant("benchmarks/study_store.py", 'line["images"] != run["images"]', "False", f"{STUDY_REPORT}::test_other_images_are_refused"),
    Mutant("benchmarks/study_store.py", "            refuse_other_files(self.path, lines, study)\n", "", f"{STUDY_REPORT}::test_as_many_images_of_other_names_are_refused"),
    Mutant("benchmarks/study_store.py", " and not _other_files(a, b)", "", "tests/unit/test_study_runner.py::test_records_of_other_files_are_not_taken"),
    Mutant("benchmarks/study_report.py", "                tests[row[\"runs\"]] = less.p\n", "                tests[*row[\"runs\"], str(rows)] = tests[row[\"runs\"]] = less.p\n", f"{STUDY_REPORT}::test_losses_are_corrected_for_the_number_of_their_tests"),
    Mutant("benchmarks/study_report.py", '"" if all(map(results.trained, cells)) else ', '"" if cells else ', f"{STUDY_REPORT}::test_a_sweep_that_learned_nothing_has_chosen_nothing"),
    Mutant("benchmarks/study_report.py", "equal_var=False", "equal_var=True", f"{STUDY_REPORT}::test_welch_is_that_of_the_textbook"),
    Mutant("benchmarks/study_report.py", '100 / run["classes"] if run["state"] == "diverged" else ', "", f"{STUDY_REPORT}::test_a_run_that_diverged_counts_as_guessing_and_is_told"),
    Mutant("dist_lars/locks.py", "else fcntl.LOCK_EX)", "else fcntl.LOCK_SH)", "tests/launch/test_study.py::test_tasks_of_an_array_share_the_work"),
    Mutant("benchmarks/study.py", "                process_group=0,", "               ", "tests/launch/test_study.py::test_a_terminals_ctrl_c_saves_the_run"),
    Mutant("benchmarks/study_store.py", "    if (len(train), len(val)) != ", "    if False and (len(train), len(val)) != ", f"{STUDY_REPORT}::test_files_are_known_by_their_names_packed_or_not"),
    Mutant("benchmarks/study_report.py", "    if records and not {run.id for run in study_grid.runs(study, records)} & set(records):", "    if False:", "tests/unit/test_study_runner.py::test_runs_with_other_options_are_no_report"),
    Mutant("benchmarks/study.py", "        store.make()\n", "", "tests/unit/test_study_runner.py::test_folders_that_cannot_be_written_are_refused_before_any_run[--records]"),
    Mutant("benchmarks/study.py", "                pass_fds=[self.mine[run.id].fileno()],\n", "", "tests/launch/test_study.py::test_a_study_that_is_killed_goes_on_to_the_same_records"),
    Mutant("dist_lars/data/sets.py", "train.subset(np.sort(order[held:]))", "train", "tests/unit/test_hold_out.py::test_both_parts_are_the_whole"),
    # The cluster: who is named, and what is launched.
    Mutant("dist_lars/doctor_verdict.py", "if slow[i - 1] and slow[i]]", "if slow[i - 1] or slow[i]]", DOCTOR),
    Mutant("dist_lars/doctor_verdict.py", "2 * (size - 1) / size * bytes_", "2 * bytes_", DOCTOR),
    Mutant("dist_lars/doctor_verdict.py", "if len(common) == 1:", "if len(common) <= 2:", DOCTOR),
    Mutant("dist_lars/doctor_roll.py", "few = silent or min(stages, key=len)", "few = min(stages, key=len)", DOCTOR),
    Mutant("slurm/common.sh", "RANKS=$((NODES * PER_NODE))", "RANKS=$NODES", SBATCH),
    Mutant("slurm/common.sh", "    export DIST_LARS_RANKS=$RANKS\n", "", SBATCH),
    Mutant("slurm/common.sh", "then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi", "then :; fi", SBATCH),
    Mutant("slurm/common.sh", '--world_size "$RANKS" || exit $?', '--world_size "$RANKS" || true', SBATCH),
    Mutant("slurm/resnet18_8k.sbatch", "#SBATCH --nodes=4\n", "#SBATCH --nodes=3\n", SBATCH),
    Mutant("dist_lars/doctor_roll.py", "if importing and not silent:", "if not importing and not silent:", DOCTOR),
    Mutant("slurm/common.sh", "        unset SRUN_CPUS_PER_TASK\n", "", SBATCH),
    Mutant("slurm/common.sh", '[ -e "$RUN_DIR/preflight/importing" ]', "false", SBATCH),
    Mutant("slurm/common.sh", '[ "$other" != "$JOB" ] && ', "", SBATCH),
    Mutant("slurm/common.sh", "    claim\n", '    mkdir -p "$RUN_DIR"\n', SBATCH),
    Mutant("slurm/common.sh", "import dist_lars.cli", "import sys", SBATCH),
    Mutant("dist_lars/doctor_roll.py", "(self.roll.folder.parent / SLOW).touch()", "pass", "tests/parallel/test_doctor.py::test_a_slow_import_is_no_fault"),
    Mutant("slurm/common.sh", '--data.stage "$STAGE"', '--data.stage "$(eval echo "$STAGE")"', SBATCH),
    Mutant("slurm/site.example.sh", "#LAUNCHER=srun MPI_TYPE=", "#LAUNCHER=srun MPI=", SBATCH),
]  # fmt: skip


def copy_tree(target: Path) -> None:
    """Everything that git knows or would take, so that neither environments nor runs come along."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    ).stdout.decode()
    for name in filter(None, names.split("\0")):
        source = ROOT / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)


def run_tests(tree: Path, tests: Iterable[str]) -> subprocess.CompletedProcess[str]:
    """pytest in the tree, which comes first on the path: an installed copy of the package is not meant."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    # No marker is left out: some rows name tests of make test-studies.
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "", *tests]
    return subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True, timeout=600)


def verdict(tree: Path, mutant: Mutant) -> str:
    """Say "red" if the test found the break; anything else is a fault of the row, the test or the code."""
    path = tree / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        return f"STALE: the old text stands {text.count(mutant.old)} times in the file"
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        done = run_tests(tree, [mutant.test])
    finally:
        path.write_text(text, encoding="utf-8")
    # 1 means that a test failed; a mutant that cannot be imported (2) or a test that is not there (4) proves nothing.
    return {0: "SURVIVED", 1: "red"}.get(done.returncode, f"BROKEN: pytest ended with {done.returncode}")


def main(words: list[str]) -> int:
    chosen = [m for m in MUTANTS if all(word in " ".join(m) for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        unbroken = run_tests(tree, dict.fromkeys(m.test for m in chosen))
        if unbroken.returncode != 0:
            print(
                f"the tests are not green before anything is broken:\n{unbroken.stdout[-3000:]}{unbroken.stderr[-1000:]}"
            )
            return 1
        failed = 0
        for number, mutant in enumerate(chosen, 1):
            result = verdict(tree, mutant)
            failed += result != "red"
            change = f"{mutant.old.strip()!r} -> {mutant.new.strip()!r}"
            print(f"{number:3}/{len(chosen)} {result:9} {mutant.file}: {change}\n{'':17}{mutant.test}", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} mutants turned their test red")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Bugs in what a call leaves behind, and in the checks that refuse a model."""

from __future__ import annotations

from mutants.bug import Bug

FORWARD, RANDOMNESS, GRAPH, PROBES = "forward.py", "randomness.py", "graph.py", "probes.py"
NO_TRACE = "test_state.py::test_a_successful_call_leaves_no_trace test_state.py"

BUGS = [
    Bug(
        "torch's random state not restored",
        "the random state of the process stays as it was",
        "test_state.py::test_the_random_states_of_torch_and_python_stay_as_they_were",
        RANDOMNESS, "        torch.set_rng_state(before[0])\n", "",
    ),
    Bug(
        "Python's random state not restored",
        "the random state of the process stays as it was",
        "test_state.py::test_the_random_states_of_torch_and_python_stay_as_they_were",
        RANDOMNESS, "        random.setstate(before[2])\n", "",
    ),
    Bug(
        "chance inside the model not noticed",
        "a forward that draws with dropout='off' is refused",
        "test_trust.py::test_chance_inside_the_model_is_named",
        RANDOMNESS, "if seed is None and not _same(before, _state(device)):", "if seed is not None and before is None:",
        PROBES, "target[:1]), 0.0):", "target[:1]), float('inf')):",
    ),
    Bug(
        "training modes and attributes not restored",
        "modes and attributes of modules stay as they were",
        "test_state.py::test_a_successful_call_leaves_no_trace[vit_dropout-loop-fused]",
        FORWARD,
        "                vars(module).clear()\n                vars(module).update(before)\n",
        "                pass\n",
    ),
    Bug(
        "attributes that a forward adds not removed",
        "modes and attributes of modules stay as they were",
        "test_trust.py::test_attributes_that_a_forward_sets_are_as_they_were",
        FORWARD, "                vars(module).clear()\n", "",
    ),
    Bug(
        "attention's fast path left off",
        "torch's flags stay as they were",
        "test_state.py::test_a_successful_call_leaves_no_trace[vit_dropout-loop-fused]",
        FORWARD, "            torch.backends.mha.set_fastpath_enabled(fastpath)\n", "            pass\n",
    ),
    Bug(
        "mkldnn left off",
        "torch's flags stay as they were",
        "test_state.py::test_a_successful_call_leaves_no_trace[lstm-loop-fused]",
        FORWARD, "        torch._C._set_mkldnn_enabled(mkldnn)\n", "",
    ),
    Bug(
        "autocast left off",
        "the caller's autocast region goes on",
        "test_precision.py::test_our_forward_in_the_users_autocast_region_costs_no_gradient"
        " test_wrapper.py::test_autocast_around_the_whole_step"
        " test_state.py",
        "comparison.py",
        "torch.autocast(pairs.device.type, enabled=False),",
        "suppress(torch.set_autocast_enabled(pairs.device.type, False) or ValueError),",
    ),
    Bug(
        "hooks of the observer left behind",
        "no hook stays in the model",
        "test_wrapper.py::test_observing_leaves_no_trace",
        "observation.py", "for hook in self._hooks:", "for hook in self._hooks[:1]:",
    ),
    Bug(
        "replaced forwards left behind",
        "modes and attributes of modules stay as they were",
        "test_layer_rules.py::test_a_rule_that_fails_leaves_no_trace test_layer_rules.py test_ghost_boundaries.py",
        "engines/ghost/layers.py", '            vars(layer).pop("forward", None)\n', "            pass\n",
    ),
    Bug(
        "captures kept alive",
        "nothing outlives a call",
        "test_ghost_boundaries.py::test_nothing_outlives_a_call_even_without_the_garbage_collector test_state.py",
        "engines/ghost/seen.py", "            capture.release()\n", "            pass\n",
    ),
    Bug(
        "the user's tensor hooks run inside the call",
        "a hook on a parameter runs once, in the user's backward",
        "test_trust.py::test_tensor_hooks_of_the_user_run_once_in_the_users_backward",
        "comparison.py",
        "{name: parameter.view_as(parameter) for name, parameter in options.trainable.items()}",
        "dict(options.trainable)",
    ),
    Bug(
        "once_differentiable not noticed",
        "a function without a second derivative is refused",
        "test_graph.py::test_a_function_without_a_second_derivative_is_refused",
        GRAPH,
        'if node.name() in ("torch::autograd::Error", "Error", "DelayedError", "NotImplemented"):',
        'if node.name() == "NotImplemented":',
    ),
    Bug(
        "reentrant checkpoints not noticed",
        "parameters inside a reentrant checkpoint are not read as zero",
        "test_graph.py::test_reentrant_checkpointing_is_refused",
        GRAPH, "if \"CheckpointFunctionBackward\" in names_of_nodes:", "if \"Checkpoint\" in names_of_nodes:",
    ),
    Bug(
        "another learnable tensor gets no gradient",
        "fused=True refuses what it has no gradient for",
        "test_graph.py::test_a_learnable_loss_needs_an_ordinary_graph",
        GRAPH, "if foreign and fused:", "if foreign and not fused and fused:",
    ),
    Bug(
        "parameters used past their module not noticed",
        "a parameter that cannot be followed is refused",
        "test_trust.py::test_a_parameter_used_past_its_module_is_refused",
        GRAPH, "        if name is not None:\n", "        if name is not None and not own:\n",
    ),
    Bug(
        "neighbours not noticed",
        "a sample's output that depends on its neighbours is refused",
        "test_errors.py::test_a_model_that_mixes_samples_is_refused[loop]",
        PROBES,
        "if _differ(alone, [part[:1] for part in together], _rounding(forward, alone)):",
        "if _differ(alone, alone, 0.0):",
    ),
    Bug(
        "a loss that mixes the batch not noticed",
        "a sample's loss that depends on its neighbours is refused",
        "test_trust.py::test_a_loss_that_mixes_the_batch_is_refused",
        PROBES, "return [losses] if logits is None or not logits.is_floating_point() else [logits, losses]",
        "return [losses] if logits is None or not logits.is_floating_point() else [logits]",
    ),
    Bug(
        "identical samples settle independence",
        "two equal samples cannot tell whether neighbours matter",
        "test_trust.py::test_identical_first_views_do_not_settle_independence",
        PROBES, "        other = _first_different(everything)\n        if other is None:\n            return False\n",
        "        other = min(1, len(pairs) - 1)\n",
    ),
    Bug(
        "what was found out outlives a change of mode",
        "a module that changes its mode is tried again",
        "test_trust.py::test_a_module_that_changes_its_mode_is_tried_again",
        PROBES, "tuple((id(module), module.training) for module", "tuple(id(module) for module",
    ),
    Bug(
        "a refusal holds for one call only",
        "what failed is tried again on every call",
        "test_trust.py::test_a_refusal_holds_on_every_call",
        PROBES, "    fact = Probed.fact(\"forward\", forward.model)\n    if fact not in probed.passed:\n",
        '    fact = Probed.fact("forward", forward.model)\n    if fact not in probed.passed and not '
        "probed.passed.add(fact):\n",
    ),
    Bug(
        "a class beyond the model's taken for the last",
        "a target outside the classes is refused",
        "test_errors.py::test_inputs",
        PROBES,
        "if target.dim() == 1 and int(target.max()) >= classes:",
        "if target.dim() == 1 and int(target.min()) >= classes:",
        "default_loss.py",
        "logits.gather(1, target.unsqueeze(1))",
        "logits.gather(1, target.clamp(max=logits.shape[1] - 1).unsqueeze(1))",
    ),
    Bug(
        "probabilities need not sum to 1",
        "a target that is no distribution is refused",
        "test_errors.py::test_inputs",
        "validation.py", " or bool(((total - 1).abs() > tolerance).any())", "",
    ),
    Bug(
        "NaN gradients count as degenerate",
        "a gradient that is not finite is an error, not a pair less",
        "test_errors.py::test_22_nan_in_a_parameter",
        "comparison.py",
        "if culprit is not None or not self.drop_non_finite:",
        "if culprit is not None and self.drop_non_finite:",
    ),
    Bug(
        "overflow in float16 hides broken parameters",
        "only an overflow may leave a pair out",
        "test_trust.py::test_float16_overflow_does_not_hide_broken_parameters",
        "comparison.py", "if culprit is not None or not self.drop_non_finite:", "if not self.drop_non_finite:",
    ),
    Bug(
        "raw DDP accepted",
        "a model whose second forward would be counted is refused",
        "test_errors.py::test_43_raw_ddp_is_refused",
        "guards.py",
        '    "torch.nn.parallel.distributed.DistributedDataParallel": (\n',
        '    "DistributedDataParallel": (\n',
    ),
    Bug(
        "Embedding(scale_grad_by_freq=True) accepted",
        "a gradient that depends on the rest of the batch is refused",
        "test_errors.py::test_refused_modules",
        "guards.py",
        "if isinstance(module, nn.Embedding) and module.scale_grad_by_freq:",
        "if isinstance(module, nn.EmbeddingBag) and module.scale_grad_by_freq:",
        "forward.py", "    if scale_grad_by_freq:\n", "    if scale_grad_by_freq is None:\n",
    ),
]  # fmt: skip

"""Bugs in the forward: BatchNorm's constants, replaced formulas, dropout, autocast."""

from __future__ import annotations

from mutants.bug import Bug

NORM, FORWARD, COMPARISON = "_forward/batchnorm.py", "_forward/per_sample.py", "_consistency/comparison.py"
OPERATORS = "_forward/exact_operators.py"
OBSERVER, STATISTICS = "_forward/observer.py", "_forward/statistics.py"
THROUGH_TEST = "forward/test_through_statistics.py"
JOINT = "forward/test_normalization.py::test_batchnorm_options forward/test_normalization.py"
RANDOM = 'randomness="different" if problem.random'

BUGS = [
    Bug(
        "statistics of the chunk",
        "BatchNorm's statistics are joint over all pairs, whatever the chunk size",
        "forward/test_normalization.py::test_batchnorm_options[cnn_batchnorm_train-auto-loop]",
        COMPARISON,
        "                terms, losses = self._terms(problem, index[rows], weight[rows])\n",
        "                if self.batchnorm.recorded and self.options.statistics is None:\n"
        "                    part = problem.take(index[rows])\n"
        "                    take_statistics(self.forward, part.weak, part.strong)\n"
        "                terms, losses = self._terms(problem, index[rows], weight[rows])\n",
    ),
    Bug(
        "statistics of the weak view",
        "BatchNorm's statistics are joint over both views",
        "forward/test_normalization.py::test_batchnorm_options[cnn_batchnorm_train-auto-loop]",
        STATISTICS,
        "forward.output(concatenate(weak, strong), record=True)",
        "forward.output(concatenate(weak, weak), record=True)",
    ),
    Bug(
        "statistics of the compared pairs",
        "pairs of weight 0 count in the statistics",
        "forward/test_normalization.py::test_weight_zero_pairs_count_in_the_statistics",
        COMPARISON,
        "views = self.pairs.weak, self.pairs.strong\n",
        "views = self.pairs.weak[self.selection.index], self.pairs.strong[self.selection.index]\n",
    ),
    Bug(
        "statistics of the sample itself",
        "BatchNorm's statistics are those of the batch",
        "engines/test_ghost.py::test_the_defaults_and_measure_are_exact[cnn_batchnorm_train]",
        NORM, "self._of_view(self.recorded[self._position])", "batch_statistics(x)",
    ),
    Bug(
        "statistics of the first BatchNorm for all",
        "each BatchNorm call has its own statistics",
        "engines/test_ghost.py::test_the_defaults_and_measure_are_exact[cnn_batchnorm_train]",
        NORM, "self._of_view(self.recorded[self._position])", "self._of_view(self.recorded[0])",
    ),
    Bug(
        "statistics with gradient",
        "BatchNorm's statistics are constants",
        "engines/test_ghost.py::test_the_defaults_and_measure_are_exact[cnn_batchnorm_train]",
        STATISTICS, "with torch.no_grad(), _InParts():", "with _InParts():",
    ),
    Bug(
        "no part of the gradient by the statistics",
        "through_statistics follows the statistics to the parameters",
        THROUGH_TEST,
        COMPARISON, "buffer.add_through(path.again())", "path.again()",
    ),
    Bug(
        "variances not followed",
        "through_statistics follows means and variances",
        THROUGH_TEST,
        STATISTICS, "variance=each.variance.detach().requires_grad_()", "variance=each.variance.detach()",
        STATISTICS, "for part in (each.mean, each.variance)]", "for part in (each.mean,)]",
    ),
    Bug(
        "the statistics through the chunks' stand-ins",
        "a sample's gradient holds the statistics constant",
        THROUGH_TEST,
        STATISTICS, "self._forward.parameters = self._stand_ins()", "self._forward.parameters = dict(own)",
    ),
    Bug(
        "another forward's statistics followed",
        "the statistics that are followed are those that were used",
        THROUGH_TEST,
        STATISTICS, " or not all(map(_about_equal, now, before)):", ":",
    ),
    Bug(
        "statistics of the weak views followed",
        "the statistics that are followed are those that were used",
        THROUGH_TEST,
        STATISTICS, "concatenate(*self._inputs)", "concatenate(self._inputs[0], self._inputs[0])",
    ),
    Bug(
        "unbiased variance",
        "a forward in train mode normalises by the biased variance",
        "test_wrapper.py::test_observed_statistics_are_those_of_each_views_own_forward",
        NORM, "squares / (x.numel() // x.shape[1])", "squares / (x.numel() // x.shape[1] - 1)",
    ),
    Bug(
        "running statistics in train mode",
        "batchnorm='auto' uses batch statistics in train mode",
        "engines/test_ghost.py::test_the_defaults_and_measure_are_exact[cnn_batchnorm_train]",
        NORM, 'return self.policy == "batch" or (self.policy != "running" and training)',
        'return self.policy == "batch"',
    ),
    Bug(
        "batchnorm='running' ignored",
        "'running' forces the running statistics",
        "forward/test_normalization.py::test_batchnorm_options[cnn_batchnorm_train-running-loop]",
        NORM, '(self.policy != "running" and training)', "training",
    ),
    Bug(
        "eps left out",
        "scale = gamma / sqrt(var + eps)",
        "engines/test_ghost.py::test_the_defaults_and_measure_are_exact[cnn_batchnorm_eval]",
        NORM, "scale = torch.rsqrt(statistics.variance + eps)", "scale = torch.rsqrt(statistics.variance)",
    ),
    Bug(
        "mean folded into the shift",
        "a large mean does not cancel in float32",
        "engines/test_ghost_rules.py::test_affine_maps_center_before_they_scale",
        NORM,
        "return scaled(centered, scale, bias, 1).to(x.dtype)",
        "return scaled(x, scale, (0.0 if bias is None else bias) - statistics.mean * scale, 1).to(x.dtype)",
    ),
    Bug(
        "mean folded into the shift where statistics are taken",
        "a large mean does not cancel in float32",
        "engines/test_ghost_rules.py::test_affine_maps_center_before_they_scale",
        NORM,
        "    y = centered.mul_(scale.view(shape))\n",
        "    y = x * scale.view(shape) - (statistics.mean * scale).view(shape)\n",
    ),
    Bug(
        "buffers updated",
        "the model's buffers stay as they are",
        "test_state.py::test_a_successful_call_leaves_no_trace[cnn_batchnorm_cumulative-loop]",
        FORWARD, "copied(dict(self._both.named_buffers()))", "dict(self._both.named_buffers())",
    ),
    Bug(
        "observed statistics of whichever forward came last",
        "'observed' takes the constants of each view's own forward",
        "test_wrapper.py::test_observed_statistics_are_those_of_each_views_own_forward[fixmatch_split-loop]",
        OBSERVER,
        "    if not own or not all(_same_statistics",
        "    own = [found[-1].statistics]\n    if not own or not all(_same_statistics",
    ),
    Bug(
        "observed statistics of the first of several forwards that hold a view",
        "'observed' refuses where it is not clear which forward was a view's",
        "test_wrapper.py::test_observing_needs_one_forward_of_each_view[twice]",
        OBSERVER, "if not own or not all(", "if not own or False and not all(",
    ),
    Bug(
        "the views' observed statistics exchanged",
        "'observed' takes the constants of each view's own forward",
        "test_wrapper.py::test_observed_statistics_are_those_of_each_views_own_forward[fixmatch_split-loop]",
        OBSERVER, "else (weak, strong)", "else (strong, weak)",
    ),
    Bug(
        "a single observed forward taken for both views",
        "'observed' takes the constants of each view's own forward",
        "test_wrapper.py::test_observing_needs_one_forward_of_each_view[weak]",
        OBSERVER,
        "for forward in found if forward.holds(view)]",
        "for forward in found if len(found) == 1 or forward.holds(view)]",
    ),
    Bug(
        "a forward of as many samples taken for weight standardisation",
        "BatchNorm's statistics are constants for a single sample, too",
        "test_wrapper.py::test_observed_statistics_of_one_pair[loop]",
        NORM, "self._samples != statistics.samples and", "",
    ),
    Bug(
        "ghost: weak constants for both views",
        "where the views have constants of their own, each sample has those of its view",
        "test_wrapper.py::test_observed_statistics_are_those_of_each_views_own_forward[fixmatch_split-ghost]",
        "engines/ghost/engine.py", "torch.tensor([WEAK, STRONG]", "torch.tensor([WEAK, WEAK]",
    ),
    Bug(
        "BatchNorms outside the model observed",
        "'observed' takes the calls of the compared model, not those of another module",
        "test_wrapper.py::test_observed_statistics_are_those_of_each_views_own_forward[own_batchnorm-loop]",
        OBSERVER,
        "if self._inside and func",
        "if self._forwards and func",
    ),
    Bug(
        "LayerNorm with the unbiased variance",
        "LayerNorm divides by sqrt(biased var + eps)",
        "engines/test_ghost.py::test_the_defaults_and_measure_are_exact[mlp_layernorm]",
        "engines/ghost/pointwise.py",
        "y, _, r = torch.native_layer_norm(x, x.shape[1:], None, None, eps)",
        "r = torch.rsqrt(x.var(1, keepdim=True) + eps)\n        y = (x - x.mean(1, keepdim=True)) * r",
    ),
    Bug(
        "LayerNorm with the unbiased variance in the loop",
        "LayerNorm divides by sqrt(biased var + eps)",
        "test_exactness.py::test_engines_agree_with_the_oracle[mlp_layernorm-loop]",
        NORM, "centered.square().mean(last, keepdim=True) + eps", "x.var(last, keepdim=True) + eps",
    ),
    Bug(
        "LayerNorm with eps outside the root",
        "LayerNorm divides by sqrt(var + eps)",
        "engines/test_ghost.py::test_the_defaults_and_measure_are_exact[mlp_layernorm]",
        "engines/ghost/pointwise.py",
        "y, _, r = torch.native_layer_norm(x, x.shape[1:], None, None, eps)",
        "r = 1.0 / (x.std(1, correction=0, keepdim=True) + eps)\n        y = (x - x.mean(1, keepdim=True)) * r",
    ),
    Bug(
        "LayerNorm without its bias",
        "y = ... * weight + bias",
        "engines/test_ghost.py::test_the_defaults_and_measure_are_exact[mlp_layernorm]",
        OPERATORS,
        "return scaled(y, weight, bias, y.dim() - 1).view(input.shape)",
        "return scaled(y, weight, None, y.dim() - 1).view(input.shape)",
    ),
    Bug(
        "GroupNorm without its bias",
        "y = ... * weight + bias",
        "engines/test_ghost.py::test_every_model_is_exact_in_every_form[cnn_groupnorm]",
        "engines/ghost/operators.py",
        "return self._scaled(y, weight, bias, 1).to(input.dtype)",
        "return self._scaled(y, weight, None, 1).to(input.dtype)",
    ),
    Bug(
        "torch's own LayerNorm under vmap",
        "the second derivative goes through mean and variance",
        "test_exactness.py::test_engines_agree_with_the_oracle[mlp_layernorm-vmap]",
        OPERATORS, "    F.layer_norm: _layer_norm,\n    torch.layer_norm: _layer_norm,\n", "",
    ),
    Bug(
        "torch's own weight_norm",
        "the second derivative of weight_norm is that of v g / |v|",
        "engines/test_ghost.py::test_the_defaults_and_measure_are_exact[weight_norm]",
        OPERATORS, "    torch._weight_norm: _weight_norm,\n", "",
    ),
    Bug(
        "one dropout mask for both views",
        "dropout='on' draws independently for each view and sample",
        "engines/test_ghost_hazards.py::test_dropout_on[dropout-auto]",
        "engines/ghost/layer_gradients.py", RANDOM, 'randomness="same" if problem.random',
    ),
    Bug(
        "one dropout mask for all samples",
        "dropout='on' draws independently for each view and sample",
        "forward/test_normalization.py::test_dropout_on_draws_for_each_sample[vmap]",
        "engines/vmap.py", RANDOM, 'randomness="same" if problem.random',
    ),
    Bug(
        "dropout on inside a module that runs sample by sample",
        "dropout='off' holds everywhere, as do the formulas for LayerNorm and weight_norm",
        "engines/test_ghost_boundaries.py::test_the_rules_of_the_comparison_hold_inside_a_looped_module",
        "engines/ghost/capture.py", "for mode in modes:\n", "for mode in [mode for mode in modes if mode is self]:\n",
    ),
    Bug(
        "the user's autocast ignored",
        "the forward computes in the dtype of the caller's region",
        "forward/test_precision.py::test_autocast_does_compute_in_half[loop]",
        FORWARD, "if self.autocast is not None:", "if self.autocast is None:",
        FORWARD, "device, dtype = self.autocast\n", 'device, dtype = "cpu", torch.float32\n',
    ),
    Bug(
        "float16's loss scale left in the products",
        "norms are in units of the loss",
        "forward/test_precision.py::test_float16_autocast_neither_underflows_nor_leaves_its_scale_behind[loop]",
        COMPARISON, "part / scale**2 for part in", "part / scale for part in",
    ),
    Bug(
        "sums in half precision",
        "products and norms are summed in float32 at least",
        "forward/test_precision.py::test_bfloat16_parameters",
        "engines/base.py", "product = wide(a) * b.to(wide_dtype(a))", "product = a * b",
    ),
    Bug(
        "Gram matrices in half precision",
        "products and norms are summed in float32 at least",
        "engines/test_ghost_rules.py::test_grams_are_float32_at_least",
        "engines/ghost/gram.py",
        "[wide(part.reshape(part.shape[0] // 2, 2, -1)) for part",
        "[part.reshape(part.shape[0] // 2, 2, -1) for part",
    ),
    Bug(
        "float16: pairs of large gradients left out",
        "a pair beyond float16 at the usual loss scale is compared at a smaller one",
        "numerics/test_float16.py::test_gradients_that_are_large_are_compared_too[3000.0-loop-fused]",
        COMPARISON, "if scale > _FLOAT16_LEAST_SCALE:", "if scale < 0:",
    ),
    Bug(
        "float16: a smaller loss scale forgotten in the products",
        "products are those of the unscaled loss",
        "numerics/test_float16.py::test_gradients_that_are_large_are_compared_too[3000.0-loop-fused]",
        COMPARISON, "part / scale**2 for part in", "part / self.scale**2 for part in",
    ),
]  # fmt: skip

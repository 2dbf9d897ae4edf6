"""Bugs in what follows from three inner products: cosine, degenerate pairs, weights, reduction, chunks, selection."""

from __future__ import annotations

from mutants.bug import Bug

SIMILARITY, COMPARISON, FUSED, LOSS, CALL = (
    "_consistency/similarity.py",
    "_consistency/comparison.py",
    "_consistency/gradient_buffer.py",
    "loss.py",
    "_consistency/call.py",
)
SUBSET = "_inputs/chosen_pairs.py"
VALUE = "value = cross / weak.sqrt() / strong.sqrt()"
TERMS = "return weight * self.options.criterion.terms(products, similarity, degenerate)"

BUGS = [
    Bug(
        "chunks added into memory that parameters share",
        "the gradient is the sum over chunks, for each parameter",
        "consistency/test_gradient_buffer.py",
        FUSED, "elif position in self._sums:", "elif total is not None:",
    ),
    Bug(
        "eps on the product of the norms",
        "GC = <g_w, g_s> / (|g_w| |g_s|), at any scale of the loss",
        "test_loss.py::test_the_degenerate_do_not_spread_through_extreme_scales",
        SIMILARITY, VALUE, "value = cross / (weak * strong + 1e-8).sqrt()",
    ),
    Bug(
        "one root of the product of the squared norms",
        "the product of squared norms over- and underflows where the norms do not",
        "test_loss.py::test_the_degenerate_do_not_spread_through_extreme_scales",
        SIMILARITY, VALUE, "value = cross / (weak * strong).sqrt()",
    ),
    Bug(
        "min_norm on the weak view only",
        "a pair is degenerate where either norm is at most min_norm",
        "test_loss.py::test_min_norm_is_a_floor_on_each_norm[loop]",
        SIMILARITY, " | (products.strong.detach().sqrt() <= min_norm)", "",
    ),
    Bug(
        "min_norm against the squared norm",
        "min_norm is in units of the norm",
        "test_loss.py::test_min_norm_is_a_floor_on_each_norm[loop]",
        SIMILARITY, "(products.weak.detach().sqrt() <= min_norm)", "(products.weak.detach() <= min_norm)",
    ),
    Bug(
        "degenerate pairs masked only after the division",
        "no NaN in the gradient of a degenerate pair",
        "test_loss.py::test_every_pair_degenerate_is_a_zero_with_a_graph[fused-loop]"
        " numerics/test_extremes.py::test_n05_saturation_is_monotone",
        SIMILARITY, "strong = torch.where(degenerate, one, products.strong)", "strong = products.strong",
    ),
    Bug(
        "no clamp",
        "-1 <= GC <= 1",
        "test_loss.py::test_rounding_does_not_leave_the_bounds_of_a_cosine",
        SIMILARITY, "return value + (value.clamp(-1.0, 1.0) - value).detach()", "return value",
    ),
    Bug(
        "degenerate pairs keep their weight",
        "a degenerate pair has weight 0",
        "test_loss.py::test_a_target_equal_to_the_own_prediction_is_degenerate[fused-loop]",
        SIMILARITY, "(1.0 - similarity).masked_fill(degenerate, 0.0)", "1.0 - similarity",
    ),
    Bug(
        "masked pairs are not counted",
        "the mean runs over all pairs of the call, weight 0 included",
        "test_loss.py::test_reductions[mean-fused-loop]",
        SUBSET, "scale /= len(pairs)", "scale /= int((pairs.weight != 0).sum())",
    ),
    Bug(
        "degenerate pairs are not counted",
        "the mean runs over all pairs of the call, degenerate ones included",
        "test_loss.py::test_a_target_equal_to_the_own_prediction_is_degenerate[fused-loop]",
        COMPARISON, TERMS, TERMS + " * len(index) / max(1, int((~degenerate).sum()))",
    ),
    Bug(
        "the sum is divided too",
        "reduction='sum' does not divide",
        "test_loss.py::test_reductions[sum-fused-loop]",
        SUBSET, 'if reduction == "mean":', 'if reduction != "none":',
    ),
    Bug(
        "weights outside the sum",
        "each term is multiplied by its own weight before the sum",
        "test_loss.py::test_reductions[mean-fused-loop]",
        COMPARISON, TERMS, TERMS.replace("weight", "weight.mean()", 1),
    ),
    Bug(
        "soft weights count as 1",
        "a weight is a factor and not a mask",
        "test_loss.py::test_reductions[mean-fused-loop]",
        SUBSET, "pairs.weight[index].to(", "(pairs.weight[index] > 0).to(",
    ),
    Bug(
        "max_pairs without rescaling",
        "the expectation over subsets is the full sum",
        "test_loss.py::test_max_pairs_is_unbiased[mlp-loop]",
        SUBSET, "scale = len(index) / max_pairs", "scale = 1.0",
    ),
    Bug(
        "max_pairs rescales by the whole batch",
        "the expectation over subsets is the full sum, masked pairs being no part of it",
        "test_loss.py::test_max_pairs_is_unbiased[mlp-loop]",
        SUBSET, "scale = len(index) / max_pairs", "scale = len(pairs) / max_pairs",
    ),
    Bug(
        "max_pairs takes the first ones",
        "every subset is as likely as any other",
        "test_loss.py::test_max_pairs_is_unbiased[mlp-loop]",
        SUBSET,
        "order = torch.randperm(len(index), generator=generator, device=generator.device)",
        "order = torch.arange(len(index))",
    ),
    Bug(
        "terms in the rows of other pairs",
        "reduction='none' returns each pair's own term",
        "test_loss.py::test_reduction_none_has_a_graph_for_each_pair[loop]",
        COMPARISON,
        "total.index_add(0, index[rows], terms)",
        "total.index_add(0, torch.arange(start, start + len(terms)), terms)",
    ),
    Bug(
        "the last incomplete chunk is dropped",
        "the result does not depend on the chunk size",
        "test_exactness.py::test_many_pairs_in_odd_chunks[loop]",
        COMPARISON,
        "while start < len(index):",
        "while start == 0 or start + size <= len(self.selection.index):",
    ),
    Bug(
        "chunks averaged as if they were equally long",
        "the result does not depend on the chunk size",
        "test_loss.py::test_reductions[mean-fused-loop]",
        COMPARISON, "            return terms.sum()\n", "            return terms.mean() * len(self.selection.index)\n",
    ),
    Bug(
        "only the first chunk's value",
        "value and gradient belong to the same sum",
        "test_loss.py::test_reductions[mean-fused-loop]",
        FUSED, "else self._value + loss.detach()", "else self._value",
    ),
    Bug(
        "only the last chunk's gradient",
        "value and gradient belong to the same sum",
        "test_loss.py::test_reductions[mean-fused-loop]",
        FUSED, "= total + part", "= part.clone()",
    ),
    Bug(
        "a chunk that failed counts twice",
        "an out-of-memory error in a derivative leaves the sum as it was",
        "test_trust.py::test_out_of_memory_in_the_derivative_counts_nothing_twice",
        FUSED,
        "        if loss.requires_grad:  # else",
        "        self._value = loss.detach() if self._value is None else self._value + loss.detach()\n"
        "        if loss.requires_grad:  # else",
        FUSED,
        "        self._value = loss.detach() if self._value is None else self._value + loss.detach()\n"
        "        self._accumulate(parts)\n",
        "        self._accumulate(parts)\n",
    ),
    Bug(
        "the fused backward ignores the upstream gradient",
        "backward() scales the buffered gradient, by a weight or by a GradScaler",
        "test_loss.py::test_backward_scales_with_the_cotangent[fused]",
        FUSED, "torch._foreach_mul(own, factor)", "[part.clone() for part in own]",
    ),
    Bug(
        "the fused backward cuts a large upstream gradient",
        "backward() scales the buffered gradient, by a weight or by a GradScaler",
        "test_wrapper.py::test_grad_scaler",
        FUSED, "torch._foreach_mul(own, factor)", "torch._foreach_mul(own, factor.clamp(max=100.0))",
    ),
    Bug(
        "the fused backward scales its buffer in place",
        "a second backward, or one of another sum, gives the same gradient",
        "test_loss.py::test_a_second_backward_of_one_loss_gives_the_same_gradient[fused]",
        FUSED, "torch._foreach_mul(own, factor)", "[part.mul_(factor) for part in own]",
    ),
    Bug(
        "a third derivative reads zero",
        "the fused gradient is a constant, and says so when it is differentiated",
        "test_loss.py::test_a_third_derivative_beside_another_term_is_refused",
        FUSED, "        if ctx.nothing:\n            return", "        if ctx.nothing or True:\n            return",
    ),
    Bug(
        "a third derivative reads zero beside another term",
        "the fused gradient is a constant, and says so when it is differentiated",
        "test_loss.py::test_a_third_derivative_beside_another_term_is_refused",
        FUSED, "*_Scaled.apply(upstream, gradients, ctx.nothing, *ctx.parameters)",
        "*(None if part is None else upstream.to(part.dtype) * part for part in gradients)",
    ),
    Bug(
        "parameters replaced by detached copies",
        "fused=False: an ordinary graph down to the parameters",
        "test_loss.py::test_reductions[mean-graph-loop]",
        "_forward/sparse.py", "else parameter.view_as(parameter)\n", "else parameter.detach().requires_grad_()\n",
    ),
    Bug(
        "a tied embedding's gradient handed over as sparse",
        "a gradient has the layout of torch's own",
        "forward/test_sparse.py",
        "_consistency/trial.py", 'used_otherwise(loss, embedded, "EmbeddingBackward0")', "set()",
    ),
    Bug(
        "the joint statistics send on a dense gradient",
        "a gradient has the layout of torch's own",
        "forward/test_sparse.py",
        COMPARISON, "partial(aliases, options.trainable, self.sparse)", "partial(aliases, options.trainable, ())",
    ),
    Bug(
        "frozen parameters are compared",
        "E holds trainable parameters only",
        "test_exactness.py::test_frozen_parameters_are_not_compared[vmap]",
        "engines/vmap.py",
        "            gradients, losses = per_sample(dict(problem.parameters), target, *columns)",
        "            own = dict(problem.model.named_parameters())\n"
        "            frozen = {n: p for n, p in own.items() if not p.requires_grad}\n"
        "            every = {**problem.parameters, **frozen}\n"
        "            gradients, losses = per_sample(every, target, *columns)",
    ),
    Bug(
        "everything is compared, whatever the encoder",
        "E is what the encoder names",
        "test_exactness.py::test_what_is_compared_and_what_is_differentiated[loop]",
        "_inputs/parameters.py",
        "        chosen = {name: parameter for name, parameter in trainable.items() if name in names}",
        "        chosen = trainable",
    ),
    Bug(
        "L_g is differentiated for the encoder only",
        "L_g is differentiated for every trainable parameter",
        "test_exactness.py::test_what_is_compared_and_what_is_differentiated[loop]",
        CALL, "return trainable_parameters(self.settings.model)", "return self.compared",
    ),
    Bug(
        "stop_gradient on the other view",
        "stop_gradient='weak' makes the weak view's gradient a constant",
        "test_loss.py::test_stop_gradient[mlp-weak-loop]",
        CALL, "else (self.settings.stop_gradient,)",
        'else ({"weak": "strong", "strong": "weak"}.get(str(self.settings.stop_gradient)),)',
    ),
    Bug(
        "stop_gradient ignored",
        "stop_gradient='weak' makes the weak view's gradient a constant",
        "test_loss.py::test_stop_gradient[mlp-weak-loop]",
        CALL, "else (self.settings.stop_gradient,)", "else (None,)",
    ),
    Bug(
        "generator ignored",
        "the caller's generator is the source of every draw of the call",
        "test_loss.py::test_max_pairs_is_unbiased[mlp-loop]"
        " test_loss.py::test_max_pairs_has_a_generator_of_its_own"
        " engines/test_ghost_hazards.py::test_dropout_on[dropout-auto]",
        LOSS, "source = generator or self._generator", "source = self._generator",
    ),
    Bug(
        "monitoring draws from training's generator",
        "measure() does not change what training draws next",
        "test_trust.py::test_monitoring_draws_nothing_from_training",
        LOSS, "generator.set_state(self._generator.get_state())", "generator = self._generator",
    ),
    Bug(
        "generator's state not restored",
        "a resumed run draws the same subsets",
        "test_loss.py::test_max_pairs_has_a_generator_of_its_own"
        " test_wrapper.py::test_a_resumed_run_continues_bitwise",
        "_consistency/own_state.py", 'restore_generator(self._generator, state["generator"])', "",
    ),
    Bug(
        "the chunk that fitted is forgotten",
        "a chunk that was out of memory is not tried again",
        "test_loss.py::test_a_chunk_that_fitted_is_remembered_and_part_of_the_state",
        COMPARISON, "self.options.probed.fitted = (size + 1) // 2", "self.options.probed.fitted = None",
    ),
    Bug(
        "chunks as large as the call",
        "a chunk's graph keeps limited memory",
        "test_loss.py::test_automatic_chunks_follow_the_memory_of_a_pair[0-2-12-6-options0]",
        COMPARISON, "wanted = min(limit, max(", "wanted = max(limit, max(",
    ),
    Bug(
        "target not detached",
        "the target is a constant",
        "test_loss.py::test_a_target_with_a_graph_is_a_constant",
        "_inputs/pairs.py", "if target.is_inference() else target.detach()", "if target.is_inference() else target",
    ),
    Bug(
        "mappings paired by order",
        "tensors of two views belong together by their key",
        "test_exactness.py::test_views_are_paired_by_key_in_whatever_order_they_were_built[ghost-None]",
        "_inputs/pairs.py", "strong = in_order_of(weak, strong)", "strong = dict(strong)",
    ),
    Bug(
        "soft targets normalised by their largest entry",
        "a probability is used as it is",
        "engines/test_ghost.py::test_the_defaults_and_measure_are_exact[mlp_soft_target]",
        "_inputs/cross_entropy.py",
        "target = target.to(logits.dtype)",
        "target = target.to(logits.dtype) / target.amax(1, keepdim=True)",
    ),
    Bug(
        "soft targets hardened",
        "only a row that is one class exactly is treated as a class",
        "engines/test_ghost.py::test_the_defaults_and_measure_are_exact[mlp_soft_target]"
        " test_oracle.py",
        "_inputs/cross_entropy.py", "target.amax(1) == 1", "target.amax(1) > 0.5",
    ),
    Bug(
        "a target of one's own is rounding noise",
        "a target equal to the view's own prediction has gradient zero",
        "test_loss.py::test_a_target_equal_to_the_own_prediction_is_degenerate_in_float32[loop]",
        "_inputs/cross_entropy.py",
        "F.cross_entropy(torch.where(own, logits.detach(), logits), target",
        "F.cross_entropy(logits, target",
    ),
    Bug(
        "softmax minus one-hot",
        "the direction of a confident sample's gradient keeps its digits in float32",
        "test_loss.py::test_a_confident_gradient_keeps_its_direction_in_float32[13.0-loop]",
        "_inputs/cross_entropy.py",
        "return F.softplus(others - logits.gather(1, target.unsqueeze(1)).squeeze(1))",
        'return F.cross_entropy(logits, target, reduction="none")',
    ),
    Bug(
        "loss in half precision",
        "losses are computed in float32 at least",
        "forward/test_precision.py::test_the_default_loss_of_half_logits_is_that_of_their_values",
        "_inputs/cross_entropy.py", "    logits = wide(logits)\n", "",
    ),
    Bug(
        "degenerate cosines recorded as 0",
        "the record has NaN where there is no cosine, so that means leave it out",
        "test_loss.py::test_a_target_equal_to_the_own_prediction_is_degenerate[fused-loop]",
        COMPARISON, "similarity.detach().masked_fill(degenerate, torch.nan)", "similarity.detach()",
    ),
]  # fmt: skip

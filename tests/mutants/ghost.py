"""Bugs in the engines: which uses are found, which graph is kept, how grams are added and differentiated."""

from __future__ import annotations

from mutants.bug import Bug

ENGINE, GRAM, SEEN, PIXEL = (f"engines/ghost/{name}.py" for name in ("engine", "gram", "layer_gradients", "pixel"))
EVERY_FORM = "engines/test_ghost.py::test_every_model_is_exact_in_every_form"
PIXELS = "engines/test_ghost_rules.py::test_pixel_and_patch_form_against_unfolded_patches"
BUGS = [
    Bug(
        "strong view detached in the loop",
        "both views' gradients keep their graph",
        "test_loss.py::test_reductions[mean-fused-loop]",
        "engines/loop.py", "STRONG, problem.graph_strong)", "STRONG, False)",
    ),
    Bug(
        "strong view detached under vmap",
        "both views' gradients keep their graph",
        "test_loss.py::test_reductions[mean-fused-vmap]",
        "engines/vmap.py",
        "problem.strong, problem.target, STRONG, problem.graph_strong)",
        "problem.strong, problem.target, STRONG, False)",
    ),
    Bug(
        "strong norm detached",
        "the cosine is differentiated through both norms",
        "test_loss.py::test_reductions[mean-fused-ghost]",
        ENGINE, "total[:, 1, 1], total", "total[:, 1, 1].detach(), total",
    ),
    Bug(
        "the mean of the losses is differentiated",
        "norms are those of a sample's own loss, whatever the chunk",
        "engines/test_ghost.py::test_every_model_is_exact_in_every_form[mlp]",
        SEEN, "torch.autograd.grad(losses.sum(), wanted", "torch.autograd.grad(losses.mean(), wanted",
    ),
    Bug(
        "tied weights without cross terms",
        "the products of a parameter with several uses are those of the sum of its gradients",
        "engines/test_ghost.py::test_every_model_is_exact_in_every_form[shared]"
        " engines/test_ghost.py::test_every_model_is_exact_in_every_form[conv_twice]"
        " engines/test_ghost.py::test_every_model_is_exact_in_every_form[tied_embedding]",
        ENGINE,
        "                parts.add_gradients(seen.gradient(name))",
        "                for use, d in seen.of(name):\n"
        "                    parts.add_gradients(use.rule.gradients(use.input, d))\n"
        "                parts.add_gradients(seen.rows.get(name))",
    ),
    Bug(
        "a linear layer that is used again counts once",
        "the products of a parameter with several uses are those of the sum of its gradients",
        "engines/test_ghost.py::test_every_model_is_exact_in_every_form[reused_linear]"
        " engines/test_ghost.py::test_every_model_is_exact_in_every_form[reused_linear]",
        ENGINE, "*joined(products)", "*joined(products[:1])",
    ),
    Bug(
        "a word's place in a tied table is another's",
        "W[id_t] adds d_t to row id_t",
        "engines/test_ghost.py::test_every_model_is_exact_in_every_form[text_negative_padding_tied]",
        "engines/ghost/rules.py",
        "F.one_hot(ids.long(), self.shape[0])",
        "F.one_hot(ids.long().flip(1), self.shape[0])",
    ),
    Bug(
        "any layer that is used again counts once",
        "the products of a parameter with several uses are those of the sum of its gradients",
        "engines/test_ghost.py::test_every_model_is_exact_in_every_form[reused_linear]"
        " engines/test_ghost.py::test_every_model_is_exact_in_every_form[conv_twice]",
        SEEN, "if use.parameter == name]", "if use.parameter == name][:1]",
    ),
    Bug(
        "uses without a rule are dropped beside a layer's",
        "what has no rule is added to what has one",
        "engines/test_ghost.py::test_every_model_is_exact_in_every_form[bare_and_ruled]"
        " engines/test_ghost.py::test_every_model_is_exact_in_every_form[bare_and_ruled]",
        ENGINE, "if name in seen.rows or not uses:", "if not uses:",
    ),
    Bug(
        "uses of a weight without a rule are dropped from the sum",
        "what has no rule is added to what has one",
        "engines/test_ghost.py::test_every_model_is_exact_in_every_form[bare_and_ruled]"
        " engines/test_ghost.py::test_every_model_is_exact_in_every_form[bare_and_ruled]",
        SEEN,
        "parts += [self.rows[name]] if name in self.rows else []",
        "parts += [self.rows[name]] if name in self.rows and not parts else []",
    ),
    Bug(
        "weights of the second derivative left out",
        "only the first derivative is for layer outputs alone",
        "engines/test_ghost.py::test_every_model_is_exact_in_every_form[cnn_batchnorm_train]",
        SEEN, "    stage.outputs_only = False\n", "",
    ),
    Bug(
        "constant view with a graph in its rule",
        "a constant view contributes no derivative",
        "test_loss.py::test_stop_gradient[mlp-weak-ghost]"
        " engines/test_ghost.py::test_views_of_different_lengths",
        SEEN, "inputs=tuple(x.detach() for x in use.inputs)", "inputs=use.inputs",
    ),
    Bug(
        "inputs of one view for both",
        "each view's gradients belong to its own inputs",
        "test_loss.py::test_stop_gradient[mlp-weak-ghost]",
        ENGINE, "else interleaved(x, y)", "else interleaved(x, x)",
    ),
    Bug(
        "in-place version check skipped",
        "an input that was overwritten after its layer is refused",
        "engines/test_ghost_hazards.py::test_a_layer_input_that_is_overwritten_later[linear]",
        "engines/ghost/coverage.py", "if tuple(x._version for x in use.inputs) != use.versions:",
        "if len(use.inputs) != len(use.versions):",
    ),
    Bug(
        "coverage accepts a use whose gradient never came",
        "a use that the losses depend on has the gradient of its output, or the model is refused",
        "engines/test_ghost_hazards.py::test_a_use_whose_gradient_never_came_is_refused",
        "engines/ghost/coverage.py", "        if use.own in reached:\n", "        if use.own is None:\n",
    ),
    Bug(
        "in-place ReLU out of place",
        "a tensor that the model overwrites is overwritten",
        "engines/test_ghost_hazards.py::test_an_activation_in_place_whose_result_nobody_takes",
        "engines/ghost/operators.py", "return F.relu(input, inplace=True) if inplace else self._leaky_relu(input, 0.0)",
        "return self._leaky_relu(input, 0.0)",
    ),
    Bug(
        "in-place leaky ReLU out of place",
        "a tensor that the model overwrites is overwritten",
        "engines/test_ghost_hazards.py::test_an_activation_in_place_whose_result_nobody_takes",
        "engines/ghost/operators.py", "return F.leaky_relu(input, negative_slope, inplace=True)", "inplace = False",
    ),
    Bug(
        "second half of the Gram's derivative missing",
        "d <a, a> = 2 <a, da>",
        "engines/test_ghost.py::test_every_model_is_exact_in_every_form[mlp]",
        GRAM, "both = (cotangent + cotangent.transpose(1, 2))", "both = cotangent",
    ),
    Bug(
        "only the same positions of both views",
        "every position of one view meets every position of the other",
        "engines/test_ghost_rules.py::test_position_and_pair_gram_against_loops",
        GRAM,
        "gram = products.view(n, 2, positions, 2, positions).sum((2, 4))\n    if positions",
        "gram = products.view(n, 2, positions, 2, positions).diagonal(dim1=2, dim2=4).sum(3)\n    if positions",
    ),
    Bug(
        "cancellation of positions not noticed",
        "a form that would lose the digits of float32 gives way",
        "engines/test_ghost_hazards.py::test_positions_that_cancel_in_float32",
        GRAM, "if positions > 1:", "if positions > 10**9:",
    ),
    Bug(
        "cancellation of pixels not noticed",
        "a form that would lose the digits of float32 gives way",
        "engines/test_ghost_hazards.py::test_positions_that_cancel_in_float32",
        PIXEL, "    doubt(doubts, gram, uncancelled)\n", "",
    ),
    Bug(
        "border of the box sum",
        "outside the image there are zeros",
        PIXELS,
        PIXEL, "total = p.new_zeros(", "total = p.new_ones(",
    ),
    Bug(
        "box sum one offset short",
        "K[t, t'] sums over all kernel offsets",
        PIXELS,
        PIXEL, "for offset in range(kernel[axis])]", "for offset in range(max(1, kernel[axis] - 1))]",
    ),
    Bug(
        "box sum without dilation",
        "offsets are dilated",
        PIXELS,
        PIXEL, "p.shape[row], dilation[axis]", "p.shape[row], 1",
    ),
    Bug(
        "pixel Gram over all groups at once",
        "channels of different groups do not meet",
        PIXELS,
        PIXEL, "tensor.reshape(len(tensor), geometry.groups, -1, math.prod(tensor.shape[2:]))",
        "tensor.reshape(len(tensor), 1, -1, math.prod(tensor.shape[2:]))",
    ),
    Bug(
        "the cross block of the pixel Gram's derivative transposed",
        "the derivative for the strong view uses the weak view's positions",
        PIXELS,
        PIXEL, "torch.cat([ws, ss], 2)", "torch.cat([ws.transpose(2, 3), ss], 2)",
    ),
    Bug(
        "the own blocks of the pixel Gram's derivative once",
        "d <a, a> = 2 <a, da>",
        PIXELS,
        PIXEL, "[both[:, 0, 0], both", "[cotangent[:, 0, 0], both",
    ),
    Bug(
        "third derivative of the pixel Gram without its blocks",
        "a derivative of the derivative is right, or an error",
        "engines/test_ghost_hazards.py::test_third_derivatives_are_right_or_an_error",
        PIXEL, "if torch.is_grad_enabled():  # a derivative of this one", "if False:  # a derivative of this one",
    ),
    Bug(
        "transposed convolutions in the pixel form",
        "the pixel form is for plain convolutions",
        "engines/test_ghost_rules.py::test_where_only_gradients_give_the_products",
        PIXEL, "not geometry.transposed and set(geometry.stride) == {1}", "set(geometry.stride) == {1}",
    ),
    Bug(
        "an engine that serves two models takes one for the other",
        "what was found out about a model is about that model",
        "engines/test_ghost_boundaries.py::test_an_engine_that_serves_two_models_keeps_them_apart",
        ENGINE, "return _Known() if problem.model is None else self._models.setdefault(problem.model, _Known())",
        "return next(iter(self._models.values()), None) or self._models.setdefault(problem.model, _Known())",
    ),
    Bug(
        "the first sample answers for all",
        "every sample gets the answer that it would have got alone",
        "engines/test_conditions.py::test_every_answer_is_that_of_the_sample_alone[ghost-two_ways]",
        "engines/conditions.py", "if any(answer != found[0] for answer in found):", "if not found:",
    ),
    Bug(
        "groups are not put back in order",
        "a pair's products stay with the pair",
        "engines/test_conditions.py::test_groups_are_put_back_in_order",
        "engines/conditions.py", "[back.to(parts[0].device)]", "",
    ),
    Bug(
        "views that answer differently run together",
        "a group that runs again must agree on what it disagreed on",
        "engines/test_conditions.py::test_as_few_batches_as_there_are_answers",
        ENGINE, "together=alike[int(rows[0])]", "together=False",
    ),
]  # fmt: skip

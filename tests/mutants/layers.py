"""Bugs in single layers: convolutions, biases, embeddings, recurrent layers, activations, registered rules."""

from __future__ import annotations

from mutants.bug import Bug

CONV, OPERATORS, RULES, POINTWISE, DECOMPOSED, LAYERS = (
    f"engines/ghost/{name}.py" for name in ("conv", "operators", "rules", "pointwise", "decomposed", "registered")
)
EXACT = "_forward/exact_operators.py"
EVERY_FORM = "engines/test_ghost.py::test_every_model_is_exact_in_every_form"
FUNCTIONS = "engines/test_ghost_rules.py::test_the_three_convolution_functions engines/test_ghost_rules.py"
NORMAL_FORM = "engines/test_ghost_rules.py::test_the_normal_form_of_a_call " + EVERY_FORM
EMBEDDING = "engines/test_ghost_rules.py::test_embedding_against_dense_one_hot " + EVERY_FORM
AFFINE = "engines/test_ghost.py::test_every_model_is_exact_in_every_form[mlp_layernorm]"

BUGS = [
    Bug(
        "bias of linear layers dropped",
        "every compared parameter is compared",
        "engines/test_ghost.py::test_every_model_is_exact_in_every_form[mlp]",
        OPERATORS, "            self._note(bias_name, b, Bias(-1, x.shape[1:-1].numel()), (), y)\n", "",
    ),
    Bug(
        "bias of convolutions dropped",
        "every compared parameter is compared",
        "engines/test_ghost.py::test_every_model_is_exact_in_every_form[conv2d_stride_bias]",
        OPERATORS, "                self._note(bias_name, b, Bias(2, x.shape[1]), (), y)\n", "",
    ),
    Bug(
        "bias averaged over positions",
        "the gradient of a bias is a sum over positions",
        "engines/test_ghost.py::test_every_model_is_exact_in_every_form[cnn_batchnorm_train]",
        RULES, ".flatten(1, -2).sum(1)", ".flatten(1, -2).mean(1)",
    ),
    Bug(
        "dilation ignored",
        "a convolution has the geometry of its call",
        "engines/test_ghost_rules.py::test_the_normal_form_of_a_call",
        CONV, "return input, Geometry(stride, _ints(padding, dims), dilation, transposed",
        "return input, Geometry(stride, _ints(padding, dims), (1,) * dims, transposed",
    ),
    Bug(
        "stride ignored",
        "a convolution has the geometry of its call",
        "engines/test_ghost.py::test_every_model_is_exact_in_every_form[conv2d_stride_bias]",
        CONV, "return input, Geometry(stride, ", "return input, Geometry((1,) * dims, ",
    ),
    Bug(
        "padding of the first axis for all",
        "a convolution has the geometry of its call",
        "engines/test_ghost_rules.py::test_the_normal_form_of_a_call",
        CONV, "return tuple(value) * (dims if len(value) == 1 else 1)", "return (value[0],) * dims",
    ),
    Bug(
        "'same' padded on the wrong side",
        "an odd padding goes to the end",
        "engines/test_ghost_rules.py::test_the_normal_form_of_a_call",
        CONV, "for side in (0, t % 2)]", "for side in (t % 2, 0)]",
    ),
    Bug(
        "output padding ignored",
        "a transposed convolution has the geometry of its call",
        "engines/test_ghost.py::test_every_model_is_exact_in_every_form[transposed2d_output_padding]",
        CONV,
        "_ints(padding, dims), dilation, transposed, output_padding, groups)",
        "_ints(padding, dims), dilation, transposed, (0,) * dims, groups)",
    ),
    Bug(
        "a group's channels in the order of another",
        "groups are neighbouring channels",
        "engines/test_ghost_rules.py::test_sample_gradients_and_per_sample_convolution",
        CONV, "return gradient.view(n, *shape)", "return gradient.view(shape[0], n, *shape[1:]).transpose(0, 1)",
    ),
    Bug(
        "weight gradient without its derivative for the output gradient",
        "the three convolution functions are each other's derivatives",
        "engines/test_ghost_rules.py::test_the_three_convolution_functions",
        CONV, "return g_x, g_gy, None, None", "return g_x, None, None, None",
    ),
    Bug(
        "input gradient without its derivative for the weight",
        "the three convolution functions are each other's derivatives",
        "engines/test_ghost_rules.py::test_the_three_convolution_functions",
        CONV, "return g_gy, g_w, None, None", "return g_gy, None, None, None",
    ),
    Bug(
        "padding row counted",
        "the row of the padding index has no gradient",
        "test_hazards.py::test_operators_as_an_exported_model_calls_them",
        EXACT, "return torch.where(padding, y.detach(), y)", "return y",
    ),
    Bug(
        "negative padding index taken as it is",
        "padding_idx=-1 is the last row",
        "test_hazards.py::test_operators_as_an_exported_model_calls_them",
        EXACT, "(input == padding_idx + (len(weight) if padding_idx < 0 else 0))", "(input == padding_idx)",
    ),
    Bug(
        "padding of a table that differs between samples left to torch",
        "under vmap torch ignores the padding index of a table with one row per sample",
        "test_hazards.py::test_operators_as_an_exported_model_calls_them",
        EXACT, "    torch.embedding: _torch_embedding,\n", "",
    ),
    Bug(
        "select_scatter left to torch",
        "its derivative for what is written is wrong under vmap",
        "test_hazards.py::test_operators_as_an_exported_model_calls_them",
        EXACT, "    **dict.fromkeys((torch.select_scatter, Tensor.select_scatter), _select_scatter),\n", "",
    ),
    Bug(
        "a product with the weight on the right as one with its transpose",
        "y = x W has the gradient sum over positions of x_t d_t^T",
        "engines/test_operators.py::test_operators[matrix_products-ghost]",
        RULES, "return (d, a) if self.transposed else (a, d)", "return (a, d)",
    ),
    Bug(
        "patches of another stride",
        "U holds the patches at the outputs' positions",
        "engines/test_ghost_rules.py::test_pixel_and_patch_form_against_unfolded_patches",
        "engines/ghost/pixel.py", "F.unfold(image, size, dilation, padding, stride)",
        "F.unfold(image, size, dilation, padding, stride).flip(2)",
    ),
    Bug(
        "a constant view gets the other view's derivative",
        "each view's derivative is its own",
        "engines/test_ghost_rules.py::test_position_and_pair_gram_against_loops",
        "engines/ghost/gram.py", "zip(both.unbind(1), ctx", "zip(both.flip(1).unbind(1), ctx",
    ),
    Bug(
        "different tokens meet",
        "only positions with the same id share a row",
        "engines/test_ghost_rules.py::test_embedding_against_dense_one_hot",
        RULES, "row_gram(rows).masked_fill(~same, 0.0)", "row_gram(rows)",
    ),
    Bug(
        "tokens of one sample in the rows of another",
        "each sample has its own rows",
        "engines/test_ghost_rules.py::test_embedding_against_dense_one_hot",
        RULES,
        "rows.index_add(0, (ids + start).flatten(), d.flatten(0, 1))",
        "rows.index_add(0, (ids + start.flip(0)).flatten(), d.flatten(0, 1))",
    ),
    Bug(
        "affine map without the shift's second derivative",
        "gx = gy scale, g_scale = sum gy (x - mean), g_shift = sum gy",
        AFFINE,
        POINTWISE, ".addcmul_(v_x, _column(scale)).add_(_column(v_shift))", ".addcmul_(v_x, _column(scale))",
    ),
    Bug(
        "affine map without the scale's second derivative",
        "gx = gy scale, g_scale = sum gy x, g_shift = sum gy",
        "engines/test_ghost.py::test_every_model_is_exact_in_every_form[cnn_batchnorm_train]",
        POINTWISE,
        "return g_gy, gy * _column(v_scale), (v_x * gy).sum((1, 3))",
        "return g_gy, gy * _column(v_scale), None",
    ),
    Bug(
        "scale's gradient averaged over positions",
        "gx = gy scale, g_scale = sum gy x, g_shift = sum gy",
        "engines/test_ghost.py::test_every_model_is_exact_in_every_form[cnn_batchnorm_train]",
        POINTWISE, "(x * gy).sum((1, 3)), gy.sum((1, 3))", "(x * gy).mean((1, 3)), gy.sum((1, 3))",
    ),
    Bug(
        "normalisation with its root as a constant",
        "d x = r (d y - m(d y) - y m(y d y)) - r^2 y d r / M",
        "engines/test_ghost.py::test_the_defaults_and_measure_are_exact[mlp_layernorm]",
        POINTWISE, "return v_x, None, g_y, v_r", "return v_x, None, g_y, None",
    ),
    Bug(
        "normalisation without half of its output's second derivative",
        "the second derivative of <v, S(gy)> for y has a part with gy and one with v",
        "engines/test_ghost.py::test_the_defaults_and_measure_are_exact[mlp_layernorm]",
        POINTWISE, ".addcmul_(gy, v_gr)\n", "\n",
    ),
    Bug(
        "normalisation without what comes back for its root",
        "d x = r (d y - m(d y) - y m(y d y)) - r^2 y d r / M",
        "engines/test_ghost.py::test_the_defaults_and_measure_are_exact[mlp_layernorm]",
        POINTWISE, "return gx if gr is None else gx.addcmul_(y, -r.square() * gr / y.shape[1])", "return gx",
    ),
    Bug(
        "leaky ReLU without its mask in the second derivative",
        "the second derivative for gy passes the mask",
        "engines/test_ghost_rules.py::test_leaky_relu",
        POINTWISE, "gradient: Tensor = _LeakyReluGradient.apply(v, x, ctx.slope)", "gradient: Tensor = v.clone()",
    ),
    Bug(
        "gates of an LSTM in another order",
        "gates come as input, forget, cell, output",
        "engines/test_ghost.py::test_every_model_is_exact_in_every_form[lstm]",
        DECOMPOSED, "i, f, g, o = (x + hidden(h)).chunk(4, -1)", "f, i, g, o = (x + hidden(h)).chunk(4, -1)",
    ),
    Bug(
        "reset gate of a GRU before the product",
        "n = tanh(x_n + r * (W h + b))",
        "engines/test_ghost.py::test_every_model_is_exact_in_every_form[gru]",
        DECOMPOSED, "n = torch.tanh(x_n + r * h_n)", "n = torch.tanh(r * (x_n + h_n))",
    ),
    Bug(
        "recurrent steps are indexed",
        "the work grows with the length, not with its square",
        "engines/test_ghost_rules.py::test_recurrent_dropout_lies_between_layers_and_nowhere_else",
        DECOMPOSED, "F.linear(x, w_ih, b_ih).unbind()", "[F.linear(x, w_ih, b_ih)[t] for t in range(len(x))]",
    ),
    Bug(
        "the backward direction left in its own order",
        "outputs of both directions are at the same time step",
        "engines/test_ghost.py::test_every_model_is_exact_in_every_form[lstm_deep]"
        " engines/test_ghost.py::test_every_model_is_exact_in_every_form[gru_deep]",
        DECOMPOSED, "torch.stack(outputs[::-1] if reverse else outputs)", "torch.stack(outputs)",
    ),
    Bug(
        "dropout after the last recurrent layer too",
        "dropout lies between layers",
        "engines/test_ghost_rules.py::test_recurrent_dropout_lies_between_layers_and_nowhere_else",
        DECOMPOSED, "if dropout and train and layer < num_layers - 1:", "if dropout and train:",
    ),
    Bug(
        "a registered rule's maps averaged",
        "a sample's gradient is the sum over its maps",
        "engines/test_layer_rules.py",
        LAYERS,
        "return gradient.unflatten(0, (-1, self.call.maps)).sum(1)",
        "return gradient.unflatten(0, (-1, self.call.maps)).mean(1)",
    ),
    Bug(
        "a constant view's registered rule with a graph",
        "a constant view contributes no derivative",
        "engines/test_layer_rules.py::test_a_registered_rule_is_exact_in_a_model",
        LAYERS,
        "inputs = tuple(x.detach() for x in self.call.inputs)\n        return",
        "inputs = self.call.inputs\n        return",
    ),
]  # fmt: skip

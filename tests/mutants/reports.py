"""Bugs in the diagnostics: a report that says that all is well."""

from __future__ import annotations

from mutants.bug import Bug

DIFFERENCES, ROUTES, RULES = (f"diagnostics/{name}.py" for name in ("verify", "check", "check_rule"))
VERIFY, CHECK = "diagnostics/test_verify.py", "engines/test_layer_rules.py::test_the_routes engines/test_layer_rules.py"

BUGS = [
    Bug(
        "verify accepts any error",
        "a wrong second derivative is reported",
        "diagnostics/test_verify.py::test_it_fails_on_a_small_error",
        DIFFERENCES, "return self.worst <= self.tolerance", "return self.worst <= 1e3 * self.tolerance",
    ),
    Bug(
        "verify looks at the best direction",
        "one direction that disagrees is enough",
        "diagnostics/test_verify.py::test_one_direction_that_disagrees_is_enough",
        DIFFERENCES,
        "return max(direction.error for direction in self.directions)",
        "return min(direction.error for direction in self.directions)",
    ),
    Bug(
        "verify's error relative to 1",
        "errors are relative to the size of the derivative",
        "diagnostics/test_verify.py::test_it_fails_on_a_term_that_is_small_as_a_whole",
        DIFFERENCES, "max(abs(value), usual, _FLOOR)", "max(abs(value), usual, 1.0)",
    ),
    Bug(
        "verify lets BatchNorm's statistics move",
        "the statistics are held at their values in theta",
        "diagnostics/test_verify.py::test_it_passes_with_both_engines[loop]",
        DIFFERENCES,
        "return self._loss.measure(*self._arguments, statistics=self._statistics, generator=_same_draws())",
        "return self._loss.measure(*self._arguments, generator=_same_draws())",
    ),
    Bug(
        "verify forgets the weights",
        "weights are part of what is verified",
        "diagnostics/test_verify.py::test_weights_and_options_are_part_of_what_is_verified",
        DIFFERENCES, "            terms = terms * self._weight\n", "            pass\n",
    ),
    Bug(
        "verify names no suspects",
        "a failing direction names the parameters that disagree",
        "diagnostics/test_verify.py::test_the_parameters_that_disagree_are_named",
        DIFFERENCES,
        "suspects = [entry for entry in alone if not entry.error <= tolerance]",
        "suspects = [entry for entry in alone if entry.error < 0]",
    ),
    Bug(
        "check reports the other form",
        "the route is the one that is taken",
        "engines/test_layer_rules.py::test_the_form_of_a_route_is_the_one_that_runs",
        "engines/ghost/engine.py",
        "        form = \"gradient\"\n        if single is not None and paired:\n            form = chosen(",
        "        form = \"gradient\"\n        if single is None and paired:\n            form = chosen(",
    ),
    Bug(
        "check reports parameters outside the encoder as compared",
        "what is not compared is said not to be",
        "engines/test_layer_rules.py::test_the_report_lists_every_parameter[mlp_encoder-ghost]",
        ROUTES, "if name not in compared:", "if not compared:",
    ),
    Bug(
        "check reports frozen parameters as compared",
        "what is not compared is said not to be",
        "engines/test_layer_rules.py::test_the_report_lists_every_parameter[frozen_subset-ghost]",
        ROUTES,
        "    if not parameter.requires_grad:\n        return \"frozen: neither compared nor differentiated for\"\n",
        "",
    ),
    Bug(
        "check keeps the fallback to itself",
        "the reason why another engine runs is told",
        "engines/test_layer_rules.py::test_the_report_lists_every_parameter[data_dependent-auto]",
        "engines/auto.py", "        self.reason = str(error)\n", "",
    ),
    Bug(
        "check takes a refused model",
        "ok is False for a refused model",
        "engines/test_layer_rules.py::test_a_model_that_nothing_takes",
        ROUTES,
        "return self.refusal is None",
        "return not self.rows or self.refusal is None or bool(self.engine or True)",
    ),
    Bug(
        "check reports running statistics where it takes joint ones",
        "the notes say which statistics are used",
        "engines/test_layer_rules.py::test_the_notes_say_which_statistics_are_held",
        ROUTES,
        'joint = batchnorm == "batch" or (batchnorm == "auto" and',
        'joint = batchnorm == "batch" or (batchnorm == "batch" and',
    ),
    Bug(
        "check_rule without a second use",
        "a transposed gradient is noticed",
        "engines/test_layer_rules.py::test_a_wrong_rule_is_caught",
        RULES, "for shared in (False, True):", "for shared in (False, False):",
    ),
    Bug(
        "check_rule does not look at the gradient of L_g",
        "a rule that hides its derivative is noticed",
        "engines/test_layer_rules.py::test_a_wrong_rule_is_caught",
        RULES,
        'return {"inner products": products, "gradient of L_g": torch.cat(parts)}',
        'return {"inner products": products}',
    ),
    Bug(
        "means over degenerate pairs in the summary",
        "the mean cosine is over the pairs that have one",
        "test_loss.py::test_summary",
        "types.py", "float(self.cosine.nanmean())", "float(self.cosine.nan_to_num(0.0).mean())",
    ),
    Bug(
        "verify looks at derivatives only",
        "a wrong value with the right derivative is found, too",
        "diagnostics/test_verify.py::test_it_fails_where_only_the_value_is_wrong",
        "diagnostics/verify.py",
        "return self.worst <= self.tolerance and self.value_error <= self.tolerance",
        "return self.worst <= self.tolerance",
    ),
    Bug(
        "L computed from rounding",
        "an L that is all rounding is refused",
        "diagnostics/test_bound.py::test_views_whose_gradients_agree_up_to_rounding_are_refused",
        "diagnostics/bound.py", "_ROUNDING = 1e-11", "_ROUNDING = 0.0",
    ),
]  # fmt: skip

"""Bugs in the diagnostics: a report that says that all is well."""

from __future__ import annotations

from mutants.bug import Bug

DIFFERENCES, ROUTES, RULES = (f"diagnostics/{name}.py" for name in ("differences", "routes", "rules"))
VERIFY, CHECK = "test_diagnostics.py", "test_layer_rules.py::test_the_routes test_layer_rules.py"

BUGS = [
    Bug(
        "verify accepts any error",
        "a wrong second derivative is reported",
        VERIFY,
        DIFFERENCES, "return self.worst <= self.tolerance", "return self.worst <= 1e3 * self.tolerance",
    ),
    Bug(
        "verify looks at the best direction",
        "one direction that disagrees is enough",
        VERIFY,
        DIFFERENCES,
        "return max(direction.error for direction in self.directions)",
        "return min(direction.error for direction in self.directions)",
    ),
    Bug(
        "verify's error relative to 1",
        "errors are relative to the size of the derivative",
        VERIFY,
        DIFFERENCES, "max(abs(value), usual, floor)", "max(abs(value), usual, 1.0)",
    ),
    Bug(
        "verify lets BatchNorm's statistics move",
        "the statistics are held at their values in theta",
        VERIFY,
        DIFFERENCES,
        "record = self._loss.measure(*self._arguments, statistics=self._statistics)",
        "record = self._loss.measure(*self._arguments)",
    ),
    Bug(
        "verify forgets the weights",
        "weights are part of what is verified",
        VERIFY,
        DIFFERENCES, "            terms = terms * self._weight\n", "            pass\n",
    ),
    Bug(
        "verify names no suspects",
        "a failing direction names the parameters that disagree",
        VERIFY,
        DIFFERENCES,
        "suspects = [entry for entry in alone if entry.error > tolerance]",
        "suspects = [entry for entry in alone if entry.error < 0]",
    ),
    Bug(
        "check reports the other form",
        "the route is the one that is taken",
        CHECK,
        "engines/ghost/engine.py",
        "        form = \"gradient\"\n        if single is not None and paired:\n            form = chosen(",
        "        form = \"gradient\"\n        if single is None and paired:\n            form = chosen(",
    ),
    Bug(
        "check reports parameters outside the encoder as compared",
        "what is not compared is said not to be",
        CHECK,
        ROUTES, "if name not in compared:", "if not compared:",
    ),
    Bug(
        "check reports frozen parameters as compared",
        "what is not compared is said not to be",
        CHECK,
        ROUTES,
        "    if not parameter.requires_grad:\n        return \"frozen: neither compared nor differentiated for\"\n",
        "",
    ),
    Bug(
        "check keeps the fallback to itself",
        "the reason why another engine runs is told",
        "test_layer_rules.py",
        ROUTES, "        self.reason = str(error)\n", "",
    ),
    Bug(
        "check takes a refused model",
        "ok is False for a refused model",
        "test_layer_rules.py",
        ROUTES,
        "return self.refusal is None",
        "return not self.rows or self.refusal is None or bool(self.engine or True)",
    ),
    Bug(
        "check reports running statistics where it takes joint ones",
        "the notes say which statistics are used",
        "test_layer_rules.py",
        ROUTES,
        'joint = batchnorm == "batch" or (batchnorm == "auto" and',
        'joint = batchnorm == "batch" or (batchnorm == "batch" and',
    ),
    Bug(
        "check_rule without a second use",
        "a transposed gradient is noticed",
        "test_layer_rules.py::test_a_wrong_rule_is_caught",
        RULES, "for shared in (False, True):", "for shared in (False, False):",
    ),
    Bug(
        "check_rule does not look at the gradient of L_g",
        "a rule that hides its derivative is noticed",
        "test_layer_rules.py::test_a_wrong_rule_is_caught",
        RULES,
        'return {"inner products": products, "gradient of L_g": torch.cat(parts)}',
        'return {"inner products": products}',
    ),
    Bug(
        "check_rule looks at the gradient of L_g only",
        "a rule with a wrong scale is noticed",
        "test_layer_rules.py::test_a_wrong_rule_is_caught",
        RULES,
        'return {"inner products": products, "gradient of L_g": torch.cat(parts)}',
        'return {"gradient of L_g": torch.cat(parts)}',
    ),
    Bug(
        "means over degenerate pairs in the summary",
        "the mean cosine is over the pairs that have one",
        "test_loss.py::test_summary",
        "types.py", "float(self.cosine.nanmean())", "float(self.cosine.nan_to_num(0.0).mean())",
    ),
]  # fmt: skip

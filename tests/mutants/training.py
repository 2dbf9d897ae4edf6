"""Bugs in schedules, the wrapper and FixMatch: the right term at the wrong step, or with the wrong weight."""

from __future__ import annotations

from mutants.bug import Bug

WRAPPER, SCHEDULES = "wrapper.py", "_inputs/schedules.py"
FIXMATCH, METHOD, FAMILY = (f"methods/{name}.py" for name in ("fixmatch", "base", "weak_to_strong"))
RESUME = "test_wrapper.py::test_a_resumed_run_continues_bitwise test_wrapper.py"
EVERY = "test_wrapper.py::test_the_weight_of_each_step"
PSEUDO_CODE = "methods/test_fixmatch.py"

BUGS = [
    Bug(
        "every k-th step without the factor k",
        "the mean of the term over the steps does not depend on `every`",
        EVERY,
        WRAPPER, "return self.every * warmup_then_ramp(", "return warmup_then_ramp(",
    ),
    Bug(
        "every k-th step counted from the first",
        "the term is there from the warm-up's end on",
        EVERY,
        WRAPPER, "(self.step - self.warmup_steps) % self.every", "self.step % self.every",
    ),
    Bug(
        "warm-up one step longer",
        "lambda is 0 while t < warmup_steps",
        "test_wrapper.py::test_the_weight_of_each_step",
        SCHEDULES, "if step < warmup_steps:", "if step <= warmup_steps:",
    ),
    Bug(
        "ramp from 0",
        "the first step after the warm-up has a share of the weight",
        "test_wrapper.py::test_the_weight_of_each_step",
        SCHEDULES, "linear_ramp(step - warmup_steps + 1, ramp_steps)", "linear_ramp(step - warmup_steps, ramp_steps)",
    ),
    Bug(
        "ramp over the warm-up too",
        "the ramp begins at the warm-up's end",
        "test_wrapper.py::test_the_weight_of_each_step",
        SCHEDULES, "linear_ramp(step - warmup_steps + 1, ramp_steps)", "linear_ramp(step + 1, ramp_steps)",
    ),
    Bug(
        "full weight while it ramps",
        "loss = base + lambda(t) * L_g",
        "test_wrapper.py::test_the_weight_of_each_step",
        WRAPPER, "base.loss + weight * term", "base.loss + self.weight * term",
    ),
    Bug(
        "the term in eval mode",
        "in eval mode the method runs alone",
        "test_wrapper.py::test_eval_mode_adds_nothing_and_counts_nothing",
        WRAPPER, "if not self.training or (self.step", "if (self.step",
    ),
    Bug(
        "steps counted in eval mode",
        "only a step of training counts",
        "test_wrapper.py::test_eval_mode_adds_nothing_and_counts_nothing",
        WRAPPER,
        "        if self.training:  # last, so that failed steps do not count\n            self.step += 1\n",
        "        self.step += 1\n",
    ),
    Bug(
        "a step that failed counts",
        "a step counts when it is done",
        "test_trust.py::test_the_wrapper_counts_no_step_that_failed_and_takes_no_other_model test_wrapper.py",
        WRAPPER,
        "        if self.training:  # last, so that failed steps do not count\n            self.step += 1\n",
        "",
        WRAPPER,
        "        base = as_step_output(output)\n",
        "        base = as_step_output(output)\n        self.step += self.training\n",
    ),
    Bug(
        "the pair of the step before",
        "the term compares this step's views",
        "test_wrapper.py::test_a_resumed_run_continues_bitwise[plain]"
        " test_wrapper.py",
        WRAPPER,
        "        pair = self._pair(args, kwargs, output, base) if weight > 0 else None\n",
        "        pair = self._pair(args, kwargs, output, base) if weight > 0 else None\n"
        '        vars(self)["before"], pair = pair, vars(self).get("before", pair)\n',
    ),
    Bug(
        "the method's mask ignored",
        "gate='method' weights pairs as the method did",
        "test_wrapper.py::test_loss_and_gradient_are_base_plus_weight_times_term"
        " test_wrapper.py::test_logs",
        WRAPPER, 'if self.gate == "method" else pair._replace', 'if self.gate == "none" else pair._replace',
    ),
    Bug(
        "gate='all' ignored",
        "gate='all' weights pairs 1",
        "test_wrapper.py::test_gate_all_compares_every_pair",
        WRAPPER, 'return pair if self.gate == "method" else pair._replace(weight=None)', "return pair",
    ),
    Bug(
        "step counter not saved",
        "a resumed run continues bitwise",
        "test_wrapper.py::test_a_resumed_run_continues_bitwise",
        WRAPPER, '{"step": self.step, "consistency"', '{"step": 0, "consistency"',
    ),
    Bug(
        "the loss's generator not restored by the wrapper",
        "a resumed run continues bitwise",
        "test_wrapper.py::test_a_resumed_run_continues_bitwise",
        WRAPPER, '        self.consistency.load_state_dict(state["consistency"])\n', "",
    ),
    Bug(
        "the state of a method that is no module not restored",
        "a resumed run continues bitwise",
        "test_wrapper.py::test_the_state_of_a_method_that_is_no_module_comes_back",
        WRAPPER, 'self.method.load_state_dict(state["method"])', 'dict(state["method"])',
    ),
    Bug(
        "another model than the method's",
        "the term differentiates what the optimizer holds",
        "test_wrapper.py test_trust.py",
        WRAPPER,
        "if isinstance(method, nn.Module) and not holds(method, trained):",
        "if method is None and not holds(method, trained):",
    ),
    Bug(
        "threshold excluded",
        "mask = 1[max p >= threshold]",
        "methods/test_fixmatch.py::test_the_mask_counts_the_threshold_itself",
        FIXMATCH, "(confidence >= self.threshold)", "(confidence > self.threshold)",
    ),
    Bug(
        "L_u over the confident images only",
        "the mean runs over all unlabeled images, masked or not",
        PSEUDO_CODE,
        FAMILY, "(weight * F.cross_entropy(strong, target, reduction=\"none\")).mean()",
        "(weight * F.cross_entropy(strong, target, reduction=\"none\")).sum() / weight.sum().clamp(min=1)",
    ),
    Bug(
        "pseudo-labels from the strong view",
        "p = softmax f(weak)",
        PSEUDO_CODE,
        FAMILY, "self._targets(weak, batch)", "self._targets(strong.detach(), batch)",
    ),
    Bug(
        "weak and strong logits exchanged",
        "p = softmax f(weak)",
        PSEUDO_CODE,
        FAMILY, "labeled, weak, strong = self._joint_logits(batch.x, batch.weak, batch.strong)",
        "labeled, strong, weak = self._joint_logits(batch.x, batch.weak, batch.strong)",
    ),
    Bug(
        "the pair without its mask",
        "the pair carries the confidence mask",
        PSEUDO_CODE,
        METHOD, "ViewPair(batch.weak, batch.strong, target, weight)", "ViewPair(batch.weak, batch.strong, target)",
    ),
    Bug(
        "views of the pair exchanged",
        "the pair is (weak, strong)",
        PSEUDO_CODE,
        METHOD,
        "ViewPair(batch.weak, batch.strong, target, weight)",
        "ViewPair(batch.strong, batch.weak, target, weight)",
    ),
    Bug(
        "squared error averaged over classes",
        "the squared error is summed over classes",
        PSEUDO_CODE,
        FIXMATCH, ".square().sum(1).mean()", ".square().mean(1).mean()",
    ),
    Bug(
        "confidence in half precision",
        "probabilities and losses are in float32 at least",
        PSEUDO_CODE,
        METHOD, "return list(wide(self._logits(output, sum(sizes)))", "return list((self._logits(output, sum(sizes)))",
    ),
    Bug(
        "FixMatch's ramp starts anew after a resume",
        "a resumed run continues bitwise",
        "methods/test_methods.py",
        METHOD, "self.step = step", "self.step = 0",
    ),
]  # fmt: skip

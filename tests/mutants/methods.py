"""Bugs in the methods beside FixMatch: the formula at the wrong moment, of the wrong quantity, over the wrong set."""

from __future__ import annotations

from mutants.bug import Bug

FLEX, FREE, SOFT, UDA = (f"methods/{name}.py" for name in ("flexmatch", "freematch", "softmatch", "uda"))
MIX, TEACHER, PI, TEMPORAL, PSEUDO = (
    f"methods/{name}.py" for name in ("mixmatch", "meanteacher", "pimodel", "temporalensembling", "pseudolabel")
)
BASE, PROCESSES = "methods/base.py", "methods/processes.py"
ENSEMBLES = "methods/test_ensembles.py"

BUGS = [
    Bug(
        "FlexMatch without its warm-up",
        "samples without a label count in the denominator",
        "methods/test_flexmatch.py",
        FLEX, "if self.threshold_warmup:", "if not self.threshold_warmup:",
    ),
    Bug(
        "FlexMatch selects by the class's threshold",
        "selection is by the fixed threshold",
        "methods/test_flexmatch.py",
        FLEX, "torch.where(confidence >= self.threshold,", "torch.where(confidence >= thresholds[target],",
    ),
    Bug(
        "FlexMatch's thresholds without the convex map",
        "T(c) = threshold * beta / (2 - beta)",
        "methods/test_flexmatch.py",
        FLEX, "return self.threshold * beta / (2 - beta)", "return self.threshold * beta",
    ),
    Bug(
        "FreeMatch's fairness loss with the other sign",
        "L_f is sum a log b",
        "methods/test_freematch.py",
        FREE, "return self.fairness_weight * fairness,", "return -self.fairness_weight * fairness,",
    ),
    Bug(
        "FreeMatch's fairness over unmasked samples",
        "masked samples only",
        "methods/test_freematch.py",
        FREE, "self._fairness(strong.softmax(1)[weight > 0])", "self._fairness(strong.softmax(1))",
    ),
    Bug(
        "FreeMatch's own gradient not multiplied by the processes",
        "two processes equal one",
        "methods/test_several_processes.py",
        FREE, "processes * (own - own.detach())", "(own - own.detach())",
    ),
    Bug(
        "SoftMatch's label from aligned probabilities",
        "the alignment decides the weight only",
        "methods/test_softmatch.py",
        SOFT, "return probability.argmax(1)", "return self._aligned(probability).argmax(1)",
    ),
    Bug(
        "SoftMatch's biased variance",
        "the unbiased variance",
        "methods/test_softmatch.py",
        SOFT, "confidence.var()", "confidence.var(correction=0)",
    ),
    Bug(
        "SoftMatch's statistics of one process",
        "statistics are those of all processes",
        "methods/test_several_processes.py",
        SOFT, "self._update(gather(probability))", "self._update(probability)",
    ),
    Bug(
        "UDA's mask of the sharpened target",
        "the mask looks at p before sharpening",
        "methods/test_uda.py",
        UDA, "mask = (weak.softmax(1).amax(1)", "mask = ((weak / self.temperature).softmax(1).amax(1)",
    ),
    Bug(
        "UDA divides by all labeled samples",
        "L_s divides by the samples kept",
        "methods/test_uda.py",
        UDA, "(keep * losses).sum() / count.clamp(min=1)", "(keep * losses).mean()",
    ),
    Bug(
        "MixMatch's share below one half",
        "l = max(b, 1 - b)",
        "methods/test_mixmatch.py",
        MIX, "share = torch.maximum(share, 1 - share)", "share = torch.minimum(share, 1 - share)",
    ),
    Bug(
        "MixMatch's guess recorded in the running statistics",
        "guessing leaves no trace",
        "methods/test_mixmatch.py",
        MIX, "with kept_running_statistics(self.model):\n            one, two", "if True:\n            one, two",
    ),
    Bug(
        "MixMatch's generator not in the state",
        "a resumed run continues bitwise",
        "methods/test_methods.py",
        MIX, 'self._random = state["generator"].cpu()', 'state["generator"].cpu()',
    ),
    Bug(
        "the teacher's average without its quick start",
        "a = min(1 - 1 / (t + 1), ema_decay)",
        ENSEMBLES,
        TEACHER, "decay = min(1 - 1 / (self.step + 1), self.ema_decay)", "decay = self.ema_decay if self.step else 0.0",
    ),
    Bug(
        "the student compared with itself",
        "the target is the teacher's",
        ENSEMBLES,
        TEACHER, "_without_graph(batch.weak, self.teacher)", "_without_graph(batch.weak)",
    ),
    Bug(
        "labeled inputs with constants of their own",
        "what is forwarded as one batch has the same constants",
        "methods/test_methods.py::test_bad_inputs_of_several_members",
        "methods/checks.py", 'check_alike("batch.x", labeled, name,', 'check_alike("batch.x", view, name,',
    ),
    Bug(
        "one pass of the Pi-model held constant",
        "gradients go through both passes",
        ENSEMBLES,
        PI, "(one - two).square().mean()", "(one.detach() - two).square().mean()",
    ),
    Bug(
        "the ensemble without its correction",
        "target = Z / (1 - a^v)",
        ENSEMBLES,
        TEMPORAL, "self.ensemble[index] / correction[:, None]", "self.ensemble[index]",
    ),
    Bug(
        "the ensemble updated in eval mode",
        "eval mode changes no state",
        "methods/test_methods.py",
        TEMPORAL, "if self.training:\n            self._visit", "if True:\n            self._visit",
    ),
    Bug(
        "pseudo-labels with a gradient through the strong view",
        "target and prediction come from one view",
        "methods/test_pseudolabel.py",
        PSEUDO, "_joint_logits(batch.x, batch.weak)", "_joint_logits(batch.x, batch.strong)",
    ),
    Bug(
        "state narrowed with the model",
        "state stays in float32 at least",
        "methods/test_methods.py::test_half_precision_narrows_the_model_and_not_the_state",
        BASE, "self._buffers[name] = old.to(new.device)", "self._buffers[name] = new",
    ),
    Bug(
        "the first of repeated samples counts",
        "the last one counts",
        "methods/test_flexmatch.py methods/test_several_processes.py",
        PROCESSES, 'positions, "amax", include_self=True', 'positions, "amin", include_self=False',
    ),
]  # fmt: skip

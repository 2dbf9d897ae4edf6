"""Bugs in one pass for both losses: the unlabeled loss with other pairs, factors or conditions."""

from __future__ import annotations

from mutants.bug import Bug

COMPARISON, SHARING, WRAPPER = "_consistency/comparison.py", "_consistency/sharing.py", "wrapper.py"
STEPS = "test_sharing.py::test_every_method_takes_the_same_steps[fixmatch-ghost-True]"
UDA = "test_sharing.py::test_every_method_takes_the_same_steps[uda-ghost-True]"
REFUSED = "test_sharing.py::test_what_would_change_the_step_is_not_shared"
GIVEN = "test_sharing.py::test_with_losses_is_l_g_and_the_strong_losses[False-ghost]"

BUGS = [
    Bug(
        "a compiled method leaves the strong views out",
        "inductor gives the labeled loss of such a step no graph",
        "test_sharing.py::test_compiled_parts_take_the_same_steps",
        SHARING, 'hasattr(method, "_orig_mod") or getattr(method, "_compiled_call_impl", None) is not None', "False",
    ),
    Bug(
        "attributes that switch a layer are not looked at",
        "the step is shared only while the model computes the same in both",
        "test_sharing.py::test_a_switch_that_is_turned_later_is_noticed",
        SHARING, "demanded, state.attributes", "demanded",
    ),
    Bug(
        "attributes that a forward changes are not looked at",
        "a model with a memory takes other steps when it has other forwards",
        f"{REFUSED}[counter]",
        SHARING, "remembers = memory.changed(kept)", "remembers = False",
    ),
    Bug(
        "the weak view's losses",
        "the unlabeled loss is the strong views'",
        f"{STEPS} {GIVEN}",
        "engines/ghost/engine.py", "seen.losses[STRONG::2]", "seen.losses[WEAK::2]",
    ),
    Bug(
        "degenerate pairs leave the unlabeled loss",
        "a pair without a direction still has a loss",
        "test_sharing.py",
        COMPARISON,
        "degenerate), products.losses",
        "degenerate), None if products.losses is None else products.losses.masked_fill(degenerate, 0.0)",
    ),
    Bug(
        "the factors of the first pairs for every chunk",
        "each loss has its own pair's weight",
        STEPS,
        COMPARISON, "(blend.losses[index] * losses).sum()", "(blend.losses[: len(index)] * losses).sum()",
    ),
    Bug(
        "the divergence without its constant",
        "UDA's loss is a KL divergence",
        UDA,
        WRAPPER, "base.loss + found.loss + unlabeled.factor * unlabeled.constant", "base.loss + found.loss",
    ),
    Bug(
        "mu left out of the shared step",
        "the unlabeled loss has the factor mu(t)",
        STEPS,
        WRAPPER, "Blend(weight, unlabeled.factor * factors)", "Blend(weight, factors)",
    ),
    Bug(
        "a model that draws random numbers is shared",
        "the shared step is the ordinary one to rounding",
        f"{REFUSED}[dropout]",
        SHARING, "            if demanded and dropout:\n", "            if True:\n",
    ),
    Bug(
        "a model that computes something else in train mode is shared",
        "the shared step is the ordinary one to rounding",
        REFUSED,
        SHARING, "other = not torch.allclose(own, ours, tolerance, tolerance)", "other = False",
    ),
    Bug(
        "a masked class hides other logits",
        "the shared step is the ordinary one to rounding",
        REFUSED,
        SHARING, "wide(own[:_FEW]).log_softmax(1), wide(ours).log_softmax(1)\n",
        "wide(own[:_FEW]), wide(ours)\n    tolerance *= float(own.abs().amax())\n",
    ),
]  # fmt: skip

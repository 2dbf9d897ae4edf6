"""Bugs in the regularisers, in SAM, and in the diagnostics of flatness and cost."""

from __future__ import annotations

from mutants.bug import Bug

SIMILARITY, JACOBIAN, SAM = "_consistency/similarity.py", "regularizers/jacobian.py", "optim/sam.py"
FLATNESS, LANDSCAPE, BOUND, MEMORY = (f"diagnostics/{name}.py" for name in ("flatness", "landscape", "bound", "memory"))

BUGS = [
    Bug(
        "one view's norm only",
        "the penalty is that of both views",
        "regularizers/test_gradient_norm.py::test_value_and_gradient[mlp-fused-loop]",
        SIMILARITY, "0.5 * products.weak + 0.5 * products.strong", "1.0 * products.weak",
    ),
    Bug(
        "the estimate is not scaled by the number of outputs",
        "projections are unbiased",
        "regularizers/test_jacobian.py::test_projections_are_unbiased_in_value_and_gradient",
        JACOBIAN, "width / self.projections", "1 / self.projections",
    ),
    Bug(
        "projections that are no unit vectors",
        "projections are unbiased",
        "regularizers/test_jacobian.py::test_one_output_needs_one_projection",
        JACOBIAN, "list(drawn / torch.linalg.vector_norm(drawn, dim=-1, keepdim=True))", "list(drawn)",
    ),
    Bug(
        "SAM climbs whatever the base optimizer does",
        "what is maximised is worst where it is smallest",
        "optim/test_sam.py::test_to_maximise_is_to_minimise_the_negative",
        SAM, 'alpha=-1 if group.get("maximize") else 1', "alpha=1",
    ),
    Bug(
        "a norm for each parameter",
        "the ball is one of all parameters",
        "optim/test_sam.py::test_six_steps_with_groups[False-False]",
        SAM, "/ norm.to(direction.device))", "/ direction.norm())",
    ),
    Bug(
        "the weights are moved back by subtraction",
        "the weights come back bitwise",
        "optim/test_sam.py::test_the_weights_come_back_bitwise_and_the_norm_is_returned",
        SAM, "parameter.copy_(value)", "parameter.sub_((parameter - value) * 1.000001)",
    ),
    Bug(
        "a step from the moved weights",
        "the base optimizer steps from the weights themselves",
        "optim/test_sam.py::test_six_steps_with_groups[True-False]",
        SAM,
        "        self.restore()\n        self.base.step()\n",
        "        self.base.step()\n        self._before.clear()\n",
    ),
    Bug(
        "the second forward updates running statistics",
        "running statistics are those of the first forward",
        "optim/test_sam.py::test_running_statistics_are_those_of_the_first_forward[True]",
        SAM, "module._buffers[name] = buffer.clone()", "module._buffers[name] = buffer",
    ),
    Bug(
        "the mean of chunks is not that of samples",
        "the result does not depend on the chunk size",
        "diagnostics/test_flatness.py::test_one_ascent_step_is_sams[mlp-True]",
        LANDSCAPE, "yield losses.sum() / size", "yield losses.mean() * self._chunk / size",
    ),
    Bug(
        "the ascent leaves the ball",
        "no point of the ascent is outside of the ball",
        "diagnostics/test_flatness.py::test_more_steps_stay_in_the_ball_and_find_no_less",
        FLATNESS, "offset = offset * min(1.0, rho / max(float(offset.norm()), 1e-30))", "pass",
    ),
    Bug(
        "the largest absolute eigenvalue",
        "the top eigenvalue is the largest one",
        "diagnostics/test_flatness.py::test_the_largest_and_not_the_largest_absolute",
        FLATNESS, "in zip(vectors[:, -1]", "in zip(vectors[:, int(values.abs().argmax())]",
    ),
    Bug(
        "the residual is the recurrence's",
        "the residual is computed from a product of its own",
        "diagnostics/test_flatness.py::test_too_few_steps_say_so",
        FLATNESS, "residual = error / abs(value) if value else error", "residual = 0.0",
    ),
    Bug(
        "secants over the whole distance on parts of it",
        "L is the largest secant between neighbours",
        "diagnostics/test_bound.py::test_both_sides_by_hand[3]",
        BOUND, " * segments / distance)", " / distance)",
    ),
    Bug(
        "every does not spread the seconds",
        "seconds are those of an average step",
        "diagnostics/test_memory.py::test_rows_and_the_models_state",
        MEMORY, "else row.seconds / every)", "else row.seconds)",
    ),
]  # fmt: skip

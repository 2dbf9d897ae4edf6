"""Bugs in projections: their matrices, what is projected by which, and what of them is kept."""

from __future__ import annotations

from mutants.bug import Bug

PROJECTION, SKETCH, LOSS = "engines/projection.py", "engines/ghost/sketch.py", "loss.py"
UNBIASED = "engines/test_projection.py::test_inner_products_are_unbiased"
ORACLE = "engines/test_projected_engines.py::test_engines_agree_with_the_projected_oracle"
GEOMETRY = "engines/test_projected_engines.py::test_factors_of_convolutions_against_formed_gradients"

BUGS = [
    Bug(
        "projection: another matrix for the strong view",
        "both views meet the same matrix",
        "properties/test_projections.py::test_p13_identical_views[vmap]",
        "engines/vmap.py", "problem.projection.sketches(weak), problem.projection.sketches(strong)",
        "problem.projection.sketches(weak), type(problem.projection)(problem.projection.kind, problem.projection.dim,"
        " (*problem.projection.key, 1)).sketches(strong)",
    ),
    Bug(
        "projection: factors without their scale",
        "E[P^T P] = I",
        f"{UNBIASED}[kronecker]",
        PROJECTION, "signs / math.sqrt(self.dim)", "signs",
    ),
    Bug(
        "projection: normal numbers without their scale",
        "E[P^T P] = I",
        f"{UNBIASED}[gaussian]",
        PROJECTION, 'device="cpu") / math.sqrt(self.dim)', 'device="cpu")',
    ),
    Bug(
        "projection: one factor for both sides",
        "the two factors are independent",
        f"{UNBIASED}[kronecker]",
        PROJECTION, "_generator(*self.key, start, side)", "_generator(*self.key, start)",
    ),
    Bug(
        "projection: a weight's uses without cross terms",
        "the sketch of a parameter is that of the sum of its uses",
        f"{ORACLE}[tied_embedding-ghost] {ORACLE}[reused_linear-ghost]",
        SKETCH, "torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]", "parts[0]",
    ),
    Bug(
        "projection: parameters without cross terms in a flat sketch",
        "a flat sketch is that of all parameters together",
        f"{ORACLE}[wrn_slice-ghost] {ORACLE}[mlp-ghost]",
        SKETCH, 'found[""] = found[""] + part if found else part', "found[name] = part",
    ),
    Bug(
        "projection: one block of columns for all parameters",
        "each entry of the gradient has a column of its own",
        f"{UNBIASED}[gaussian]",
        PROJECTION, "_generator(*self.key, start)\n", "_generator(*self.key)\n",
    ),
    Bug(
        "projection: columns of the first parameter for all",
        "each entry of the gradient has a column of its own",
        f"{ORACLE}[mlp-ghost] {ORACLE}[wrn_slice-ghost]",
        SKETCH, "        start += parameter.numel()\n", "",
    ),
    Bug(
        "projection: groups of a convolution meet",
        "the rows of a group see the inputs of that group",
        f"{GEOMETRY}[groups]",
        SKETCH, "channels = left.view(k, groups, -1).transpose(0, 1)",
        "channels = left.view(k, groups, -1).transpose(0, 1).flip(0)",
    ),
    Bug(
        "projection: a transposed convolution as a plain one",
        "inputs and output gradients change places",
        f"{GEOMETRY}[transposed]",
        SKETCH, "(x.flatten(0, 1), d) if rule.geometry.transposed else (d, x.flatten(0, 1))",
        "(d, x.flatten(0, 1)) if rule.geometry.transposed else (d, x.flatten(0, 1))",
    ),
    Bug(
        "projection: the same block for all columns in the derivative",
        "the derivative of g -> P g is v -> P^T v",
        "engines/test_projection.py::test_blocks_do_not_show",
        PROJECTION, "result[:, place] = x @ block", "result[:, place] = x @ next(blocks(x))[1][:, : block.shape[1]]",
    ),
    Bug(
        "projection: never drawn anew",
        "resample_every=k gives new matrices every k calls",
        "engines/test_projection.py::test_resampling_and_measuring[kronecker]",
        PROJECTION, "draw = call // self.resample_every if self.resample_every else 0", "draw = 0",
    ),
    Bug(
        "projection: the number of calls not restored",
        "a resumed run goes on with the same matrices",
        "engines/test_projection.py::test_a_resumed_loss_goes_on_with_the_same_matrices"
        " test_wrapper.py::test_a_resumed_run_continues_bitwise[kronecker]",
        "_consistency/own_state.py", '        self._calls = int(numbers.get("calls", 0))\n', "",
    ),
    Bug(
        "projection: ignored by an engine that does not know it",
        "what is not projected is refused, and not compared exactly",
        "engines/test_projection.py::test_an_engine_that_would_ignore_the_projection_is_refused",
        "engines/__init__.py", 'if projection is not None and not getattr(engine, "projects", False):', "if False:",
    ),
    Bug(
        "projection: dropped where the views are seen one by one",
        "a constant view is projected like the other",
        f"{ORACLE}[vit-ghost] {ORACLE}[conv_depthwise-ghost]",
        "engines/ghost/engine.py", "for name in {**mine, **other}:", "for name in {}:",
    ),
]  # fmt: skip

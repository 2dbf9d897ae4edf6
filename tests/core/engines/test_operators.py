"""What torch.nn offers beside layers, whole models, and derivatives for the inputs, against the oracle.

Every row, engine and precision: tests/slow/matrix.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradconsist import GradientConsistencyLoss, ViewPair
from gradconsist._forward.observer import Observer
from gradconsist.diagnostics import check
from gradconsist.errors import UnsupportedModuleError
from support import compare
from support.models import Layers
from support.operator_zoo import OPERATOR_CASES, REFUSED
from support.oracle import tree_cat, tree_leaves
from support.whole_models import PAIRS as WHOLE_PAIRS
from support.whole_models import WHOLE_CASES, installed, needs
from support.zoo import CASES, PAIRS, Case

ENGINES = pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch, of vmap


def _check(case: Case, engine: str, *, pairs: int = PAIRS) -> None:
    """All five quantities of one call whose inputs require grad."""
    problem = case.problem(pairs=pairs)
    verdict = case.verdict(pairs=pairs, inputs=True)
    inputs = [x for view in problem.views[:2] for x in tree_leaves(view) if x.is_floating_point()]
    for x in inputs:
        x.requires_grad_()
    gc = GradientConsistencyLoss(
        problem.model, encoder=case.encoder, loss_fn=case.loss_fn, engine=engine, fused=False, chunk_size=2
    )
    compare.assert_exact(gc, problem.views, verdict)
    assert len(verdict.inputs) == len(inputs)
    for x, expected in zip(inputs, verdict.inputs, strict=True):
        assert compare.relative(x.grad, expected) <= 1e-8


@ENGINES
@pytest.mark.parametrize("name", OPERATOR_CASES)
def test_operators(name: str, engine: str) -> None:
    case = OPERATOR_CASES[name]
    if name in REFUSED or getattr(case, engine, "exact") == "refused":
        problem = case.problem()
        with pytest.raises(UnsupportedModuleError, match=REFUSED.get(name, "loop")):
            GradientConsistencyLoss(problem.model, engine=engine)(*problem.views)
        return
    _check(case, engine)


def test_matrix_products_are_compared_as_linear_layers() -> None:
    problem = OPERATOR_CASES["matrix_products"].problem()
    rows = check(GradientConsistencyLoss(problem.model, engine="ghost"), *problem.views).rows
    routes = {row.parameter: row.route.replace("gram", "gradient") for row in rows}
    one = "linear, gradient form"
    assert routes.pop("shift") == "bias, gradient form"
    assert {routes.pop(name) for name in ("level", "base", "named")} == {"per-sample gradient"}
    assert routes == {"square": f"{one} (3 uses as one)", "wide": one, "back": one, "head": one}


@pytest.mark.parametrize("engine", ["vmap", "ghost"])
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if any(x.is_floating_point() for x in tree_leaves(
    c.inputs(torch.Generator())))])  # fmt: skip
def test_derivatives_for_the_inputs(name: str, engine: str) -> None:
    """L_g moves the views too, where the graph form is asked for it."""
    if getattr(CASES[name], engine, "exact") == "refused":
        pytest.skip(f"{engine} refuses the model")
    _check(CASES[name], engine)


QUICK = [
    "wrn-10-1", "language_model", "language_model_sequence", "torchvision/convnext", "torchvision/vit",
    "torchvision/efficientnet", "torchvision/densenet",
    "timm/resnetv2_weight_standardised", "timm/nfnet_weight_standardised", "timm/vit_gap_qknorm", "timm/mixer",
]  # fmt: skip


@pytest.mark.parametrize("name", QUICK)
def test_whole_models(name: str) -> None:
    package = needs(name)
    if package is not None and installed(package) is not None:
        pytest.skip(f"{package} cannot be used here")
    _check(WHOLE_CASES[name], "ghost", pairs=WHOLE_PAIRS)


@pytest.mark.parametrize("name", ["language_model", "language_model_sequence"])
@pytest.mark.parametrize("engine", ["loop", "vmap", "auto"])
def test_language_models(name: str, engine: str) -> None:
    _check(WHOLE_CASES[name], engine, pairs=WHOLE_PAIRS)


# -- standardised parameters -------------------------------------------------------------------------------------------


@ENGINES
@pytest.mark.parametrize("pairs", [1, 5])
@pytest.mark.parametrize("name", ["standardised_kernels", "standardised_columns"])
def test_statistics_of_a_parameter_have_a_graph(name: str, pairs: int, engine: str) -> None:
    """`F.batch_norm` on a kernel: no batch, so no constants, whatever the number of pairs."""
    _check(OPERATOR_CASES[name], engine, pairs=pairs)


@ENGINES
def test_observed_statistics_of_a_parameter_have_a_graph(engine: str) -> None:
    """Also where the method's own forward told the statistics; those of BatchNorm stay constant."""
    case = OPERATOR_CASES["standardised_kernels"]
    problem = case.problem()
    problem.model.insert(3, nn.BatchNorm2d(4).double())
    judge = problem.judge()
    with Observer(problem.model) as observer:
        problem.model(tree_cat(problem.weak, problem.strong))
    gc = GradientConsistencyLoss(problem.model, engine=engine, batchnorm="observed")
    loss = gc.evaluate(*problem.views, statistics=observer.observed(ViewPair(*problem.views)))
    gradient = compare.gradient_of(loss, problem.model)
    compare.assert_agrees(gc.last, loss, gradient, judge.verdict(), dtype=torch.float64)


# -- which engine runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "batched"), [("loop", False), ("vmap", True), ("ghost", True)])
def test_an_engine_runs_what_its_name_says(engine: str, batched: bool) -> None:
    """With one pair at a time, loop and vmap may be bitwise equal: equal numbers are no sign of a mix-up."""
    problem = CASES["mlp"].problem()
    levels: set[int] = set()
    problem.model[2].register_forward_hook(
        lambda module, args, output: levels.add(torch._C._functorch.maybe_get_level(output))
    )
    GradientConsistencyLoss(problem.model, engine=engine, chunk_size=1)(*problem.views).backward()
    assert (max(levels) > 0) == batched


# -- what neighbours do, and what rounding does ------------------------------------------------------------------------


def amplified(factor: float, *, mixing: bool = False) -> nn.Module:
    """Rounding errors that grow until a sample seems to depend on its batch, as in a deep model that is not trained.

    With `mixing` a sample sees its neighbours, in any precision.
    """

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x - x.mean(0, keepdim=True) if mixing else x)
        noise = 1e-6 * len(x) if x.dtype != torch.float64 else 0.0  # as a kernel for another batch size would round
        return m.head(torch.tanh(x + factor * noise))

    return Layers(forward, stem=nn.Linear(64, 64), head=nn.Linear(64, 3))


@pytest.mark.parametrize("engine", ["loop", "auto"])
def test_rounding_is_not_taken_for_neighbours(engine: str) -> None:
    views = torch.randn(2, 4, 64)
    target = torch.arange(4) % 3
    assert GradientConsistencyLoss(amplified(1e5), engine=engine)(*views, target).isfinite()
    with pytest.raises(UnsupportedModuleError, match="changes with the other samples"):
        GradientConsistencyLoss(amplified(0.0, mixing=True), engine=engine)(*views, target)


def test_the_look_at_rounding_counts_no_batch() -> None:
    """BatchNorm counts its batches in whole numbers, which are not copied by making them float64."""
    model = nn.Sequential(nn.BatchNorm1d(64), amplified(1e5))
    GradientConsistencyLoss(model)(*torch.randn(2, 4, 64), torch.arange(4) % 3)
    assert int(model[0].num_batches_tracked) == 0

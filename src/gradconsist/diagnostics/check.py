"""`check`: runs the loss once to find out how it handles each parameter of a model."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gradconsist._forward.batchnorm import BatchNormPolicy
from gradconsist._inputs.parameters import compared_parameters
from gradconsist.diagnostics.same_loss import unobserved
from gradconsist.engines import AutoEngine, Engine, GhostEngine, LoopEngine
from gradconsist.engines.base import Problem
from gradconsist.engines.projection import RandomProjection
from gradconsist.errors import GradConsistError
from gradconsist.loss import GradientConsistencyLoss
from gradconsist.types import GradProducts, Inputs


@dataclass(frozen=True)
class CheckRow:
    """How the loss handles one parameter.

    Attributes:
        module: path of its module; empty for the model itself.
        kind: the module's class.
        parameter: full name.
        size: number of entries.
        route: how its per-sample gradients are compared, or why they are not.
    """

    module: str
    kind: str
    parameter: str
    size: int
    route: str


@dataclass(frozen=True)
class CheckReport:
    """How the loss handles a model.

    Attributes:
        rows: one row per parameter, in the model's order.
        notes: how modules with special treatment are handled, keyed by path.
        engine: the engine that ran.
        fallback: why another engine replaced the first one; None if the first one ran.
        refusal: the error message, with its remedy; None if the loss accepts the model.
        projection: the projection whose sketches are compared; None if the gradients themselves are.
        looped: modules that run sample by sample, which costs time.
        untested: registered rules, and custom autograd code whose second derivative could not be tested.
    """

    rows: list[CheckRow]
    notes: dict[str, str] = field(default_factory=dict)
    engine: str = ""
    fallback: str | None = None
    refusal: str | None = None
    projection: RandomProjection | None = None
    looped: list[str] = field(default_factory=list)
    untested: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the loss accepts the model."""
        return self.refusal is None

    def __str__(self) -> str:
        how = "exact" if self.projection is None else f"inner products unbiased by {self.projection}"
        lines = [f"REFUSED: {self.refusal}"] if self.refusal else [f"{how}, by {self.engine}"]
        if self.looped:
            lines.insert(0, f"SLOW: run sample by sample (reasons below): {', '.join(map(repr, self.looped))}")
        if self.fallback and not self.refusal:
            lines.insert(0, "SLOW: the per-sample loop replaces the fast engine (reason below)")
        if self.untested:
            lines.insert(0, f"UNPROVEN: {', '.join(self.untested)}: test it with diagnostics.verify")
        if self.fallback:
            lines.append(f"the fast engine was not used because: {self.fallback}")
        columns = [("parameter", "in", "entries", "compared by")]
        columns += [(row.parameter, row.kind, f"{row.size:,}", row.route) for row in self.rows]
        widths = [max(len(column[i]) for column in columns) for i in range(3)]
        for name, kind, size, route in columns:
            lines.append(f"  {name:{widths[0]}}  {kind:{widths[1]}}  {size:>{widths[2]}}  {route}".rstrip())
        lines += [f"  {path}: {note}" for path, note in self.notes.items()]
        return "\n".join(lines)


def check(consistency: GradientConsistencyLoss, weak: Inputs, strong: Inputs, target: Tensor) -> CheckReport:
    """Shows how a loss handles each parameter of its model, by evaluating it and its gradient on two pairs.

    The route of a parameter is one of these:

    - a rule and the form chosen for it ("linear, gram form");
    - "per-sample gradient" if there is no rule, so that the gradient of each sample is formed. That is exact, and fine
      for small parameters. A large one costs its size times the samples of a chunk; to avoid that, add a rule with
      `gradconsist.engines.register_rule`;
    - the engine that replaces the fast one;
    - the reason why the parameter is not compared.

    With a projection, the route also says what is projected: the "factors" before the gradient is formed, or the
    "gradient" after it. Neither the loss nor its model changes. `weak`, `strong` and `target` are those of a call;
    BatchNorm's statistics come from all of them. ``batchnorm="observed"`` is tried with joint statistics, since there
    is no method here to observe.

    Returns:
        The report; ``print(report)`` shows it as a table. The first line is the most serious finding. An error of the
        loss, or of the model inside it, is the report's `refusal`.

    Raises:
        ConfigError: `consistency` is not a GradientConsistencyLoss.
    """
    own = unobserved(consistency)
    model, projection = own.model, own.projection
    engine = copy.deepcopy(own.engine)
    auto = engine if isinstance(engine, AutoEngine) else None
    witness = _Witness(engine if auto is None else auto.engine)
    if auto is not None:
        auto.engine = witness
    loss = consistency.with_options(engine=auto or witness, batchnorm=own.batchnorm, max_pairs=None)
    try:
        weight = target.new_zeros(len(target), dtype=next(model.parameters()).dtype)
        weight[:2] = 1
        with torch.inference_mode(False), torch.enable_grad():
            loss(weak, strong, target, weight)
    except GradConsistError as error:
        rows = _rows(model, {}, set(), "refused")
        return CheckReport(rows, refusal=str(error), projection=projection)
    changed = auto is not None and auto.engine is not witness  # to the loop, which has no routes
    running = LoopEngine() if changed else witness.engine
    routes = {} if changed else witness.routes
    notes = _notes(model, own.batchnorm, own.dropout)
    looped = running.looped(model) if isinstance(running, GhostEngine) else {}
    notes |= {
        path: f"runs sample by sample, since torch refused it in one batch: {why}" for path, why in looped.items()
    }
    untested = [name for name, tested in loss._probed.functions.items() if not tested]
    for name in loss._probed.functions:
        how = "NOT tested: see diagnostics.verify" if name in untested else "tested on one sample"
        notes[f"custom autograd code {name}"] = f"second derivative {how}"
    rows = _rows(model, routes, set(compared_parameters(model, own.encoder)), repr(running))
    untested += sorted({f"registered rule of {row.kind}" for row in rows if row.route.startswith("registered rule")})
    return CheckReport(
        rows, notes, repr(running), auto.reason if auto else None, None, projection, list(looped), untested
    )


class _Witness:
    """An engine that also asks the ghost engine for its routes."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.projects = getattr(engine, "projects", False)
        self.most_pairs = getattr(engine, "most_pairs", None)
        self.routes: dict[str, str] = {}

    def products(self, problem: Problem) -> GradProducts:
        products = self.engine.products(problem)  # first, because its errors explain themselves
        self.routes = self.engine.routes(problem) if isinstance(self.engine, GhostEngine) else {}
        return products

    def __repr__(self) -> str:
        return repr(self.engine)


def _rows(model: nn.Module, routes: dict[str, str], compared: set[str], engine: str) -> list[CheckRow]:
    rows = []
    for name, parameter in model.named_parameters():
        path = name.rpartition(".")[0]
        kind = type(model.get_submodule(path)).__name__
        rows.append(CheckRow(path, kind, name, parameter.numel(), _route(name, parameter, routes, compared, engine)))
    return rows


def _route(name: str, parameter: Tensor, routes: dict[str, str], compared: set[str], engine: str) -> str:
    if not parameter.requires_grad:
        return "frozen: neither compared nor differentiated for"
    if engine == "refused":
        return engine
    if name not in compared:
        return "not compared; L_g is differentiated for it"
    if not routes:
        return f"per-sample gradient, by {engine}"
    return routes.get(name) or "the loss does not depend on it: its gradient is zero"


def _notes(model: nn.Module, batchnorm: BatchNormPolicy, dropout: str) -> dict[str, str]:
    notes = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            joint = batchnorm == "batch" or (batchnorm == "auto" and (module.training or module.running_mean is None))
            source = "joint statistics of both views" if joint else "running statistics"
            notes[path] = f"{type(module).__name__} with {source}, held constant"
        elif isinstance(module, nn.modules.dropout._DropoutNd) and module.training:
            how = "off inside the comparison" if dropout == "off" else "with a draw for each view and sample"
            notes[path] = f"{type(module).__name__}, {how} (dropout={dropout!r})"
        elif isinstance(module, nn.RNNBase):
            notes[path] = f"{type(module).__name__}, as linear layers and pointwise functions under the ghost engine"
    return notes

"""`check_rule`: a layer and its rule against the per-sample loop."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradconsist.engines import Engine, GhostEngine, LoopEngine
from gradconsist.engines.ghost.rules import Form
from gradconsist.errors import ConfigError, GradConsistError
from gradconsist.loss import GradientConsistencyLoss


@dataclass(frozen=True)
class RuleReport:
    """A layer under the ghost engine against the per-sample loop, in float64.

    Attributes:
        errors: relative errors of the inner products and of the gradient of L_g, as vectors, by what was run.
        tolerance: bound on all of them.
        failure: what was raised, if the layer did not run.
    """

    errors: dict[str, float]
    tolerance: float
    failure: str | None = None

    @property
    def ok(self) -> bool:
        """Whether everything agrees."""
        return self.failure is None and all(error <= self.tolerance for error in self.errors.values())

    def __str__(self) -> str:
        if self.failure is not None:
            return f"the rule FAILED: {self.failure}"
        verdict = "agrees" if self.ok else "DISAGREES"
        lines = [f"the rule {verdict} with the per-sample loop (tolerance {self.tolerance:.0e})"]
        lines += [f"  {what}: {error:.1e}" for what, error in self.errors.items()]
        return "\n".join(lines)


def check_rule(layer: nn.Module, *inputs: Tensor, tolerance: float = 1e-8, seed: int = 0) -> RuleReport:
    """Tests a layer, with the rule registered for it if there is one, against the per-sample loop in float64.

    The layer is made into a model with a smooth random loss of its whole output; its second view is a perturbed input.
    Compared are the three inner products of every pair, and the whole gradient of L_g, to which the derivatives of the
    rule in its input, output gradient and parameters contribute; once as it is, and once with a second use of every
    parameter, which also sees a gradient that is transposed or has another sign.

    Args:
        layer: the layer; a copy is used, with parameters drawn anew, since zeros and ones hide errors.
        *inputs: an input batch of two samples or more for each argument of its forward.
        tolerance: bound on the relative errors.
        seed: of everything that is drawn.

    Returns:
        The report; put ``assert check_rule(layer, x).ok`` into a test.

    Raises:
        ConfigError: there is no input, or the layer has no parameters.

    Example:
        >>> check_rule(nn.Conv1d(3, 4, 3), torch.randn(4, 3, 9)).ok
        True
    """
    if not inputs or any(len(x) < 2 for x in inputs):
        raise ConfigError("`inputs` needs a batch of at least two samples for each argument of the layer's forward.")
    generator = torch.Generator().manual_seed(seed)
    layer = copy.deepcopy(layer).double()
    if not any(parameter.requires_grad for parameter in layer.parameters()):
        raise ConfigError(f"`layer` ({type(layer).__name__}) has no trainable parameters, so it needs no rule.")
    with torch.no_grad():
        for parameter in layer.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.3 * noise.to(parameter.device))
    weak = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    strong = tuple(_perturbed(x, generator) for x in weak)
    errors: dict[str, float] = {}
    try:
        for shared in (False, True):
            model = _Probe(layer, shared, seed)
            expected = _evaluate(model, weak, strong, LoopEngine())
            forms: tuple[Form, ...] = ("gradient",) if shared else ("gradient", "gram")
            for form in forms:
                found = _evaluate(model, weak, strong, GhostEngine(form=form))
                where = "beside another use" if shared else f"{form} form"
                for what, value in expected.items():
                    error = float((found[what] - value).norm() / value.norm().clamp(min=1e-30))
                    errors[f"{what}, {where}"] = error
    except (GradConsistError, RuntimeError) as error:
        return RuleReport({}, tolerance, f"{type(error).__name__}: {error}")
    return RuleReport(errors, tolerance)


class _Probe(nn.Module):
    """The layer, and if `shared` another use of its parameters without a rule.

    Inner products alone do not see a gradient that is transposed or has another sign: the other use, to whose gradient
    the rule's is added, does.
    """

    def __init__(self, layer: nn.Module, shared: bool, seed: int) -> None:
        super().__init__()
        self.layer = layer
        self.shared = shared
        self.seed = seed

    def forward(self, *inputs: Tensor) -> Tensor:
        """A smooth number for each sample: [B]."""
        leaves = [leaf.reshape(len(inputs[0]), -1) for leaf in tree_leaves(self.layer(*inputs))]
        value = (torch.sin(_waves(torch.cat(leaves, 1), 3.0 + self.seed)) * 2.0).sum(1)
        if self.shared:
            own = sum(_waves(p.reshape(1, -1), 7.0 + self.seed).sum() for p in self.layer.parameters())
            value = value + own * torch.sin(leaves[0].detach().sum(1))
        return value


def _waves(flat: Tensor, frequency: float) -> Tensor:
    """Columns times fixed numbers, none of them alike; nothing may be drawn under vmap."""
    position = torch.arange(flat.shape[1], dtype=flat.dtype, device=flat.device)
    return flat * torch.cos(frequency * (position + 0.5))


def _evaluate(
    model: nn.Module, weak: tuple[Tensor, ...], strong: tuple[Tensor, ...], engine: Engine
) -> dict[str, Tensor]:
    """Norms and cosines, and the gradient of L_g."""
    model.zero_grad()
    loss = GradientConsistencyLoss(model, loss_fn=lambda output, target: output, engine=engine, chunk_size=None)
    loss(weak, strong, torch.zeros(len(weak[0]), dtype=torch.long, device=weak[0].device)).backward()
    record = loss.measure(weak, strong, torch.zeros(len(weak[0]), dtype=torch.long, device=weak[0].device))
    parts = [
        (torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters() if p.requires_grad
    ]
    # a pair whose gradient vanishes has no cosine
    products = torch.cat([record.norm_weak, record.norm_strong, record.cosine.nan_to_num(0.0)])
    return {"inner products": products, "gradient of L_g": torch.cat(parts)}


def _perturbed(x: Tensor, generator: torch.Generator) -> Tensor:
    if not x.is_floating_point():
        return x.roll(1, 0)
    return x + torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)

"""`check_rule`: tests a layer and its rule against the per-sample loop."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradconsist._forward.randomness import preserved_randomness
from gradconsist.diagnostics.same_loss import check_float64
from gradconsist.engines import Engine, GhostEngine, LoopEngine
from gradconsist.engines.ghost.parts import Form
from gradconsist.errors import ConfigError, GradConsistError
from gradconsist.loss import GradientConsistencyLoss


@dataclass(frozen=True)
class RuleReport:
    """How far a layer under the ghost engine differs from the per-sample loop, in float64.

    Attributes:
        errors: relative errors of the inner products and of the gradient of L_g, as vectors, keyed by what was run.
        tolerance: bound on all errors.
        failure: the error that was raised, if the layer did not run.
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

    The layer becomes a model with a smooth random loss of its whole output; the second view is a perturbed input. The
    test compares the three inner products of every pair, and the whole gradient of L_g, which includes the derivatives
    of the rule in its input, output gradient and parameters. It runs once with the plain layer, and once with a second
    use of every parameter, which also detects a gradient that is transposed or has the wrong sign.

    Args:
        layer: the layer; a copy is used, with noise added to its parameters, since zeros and ones hide errors.
        *inputs: an input batch of two samples or more for each argument of its forward.
        tolerance: bound on the relative errors.
        seed: seed of all random numbers.

    Returns:
        The report; put ``assert check_rule(layer, x).ok`` into a test.

    Raises:
        ConfigError: there is no input, a batch has fewer than two samples, or the layer has no trainable parameters.
        DeviceError: the layer's device has no float64.

    Example:
        >>> check_rule(nn.Conv1d(3, 4, 3), torch.randn(4, 3, 9)).ok
        True
    """
    if not inputs or any(len(x) < 2 for x in inputs):
        raise ConfigError("`inputs` needs a batch of at least two samples for each argument of the layer's forward.")
    generator = torch.Generator().manual_seed(seed)
    check_float64(layer)
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
        dims = _batch_dims(layer, weak)
        for shared in (False, True):
            model = _Probe(layer, shared, seed, dims)
            expected = _evaluate(model, weak, strong, LoopEngine())
            forms: tuple[Form, ...] = ("gradient",) if shared else ("gradient", "gram")
            for form in forms:
                found = _evaluate(model, weak, strong, GhostEngine(form=form))
                where = "beside another use" if shared else f"{form} form"
                for what, value in expected.items():
                    error = float((found[what] - value).norm() / value.norm().clamp(min=1e-30))
                    errors[f"{what}, {where}"] = error
    except (GradConsistError, RuntimeError, TypeError, ValueError) as error:
        return RuleReport({}, tolerance, f"{type(error).__name__}: {error}")
    return RuleReport(errors, tolerance)


class _Probe(nn.Module):
    """Runs the layer and, if `shared`, uses its parameters a second time without a rule.

    Inner products alone do not detect a gradient that is transposed or has the wrong sign. The second use does, because
    its gradient is added to the rule's.
    """

    def __init__(self, layer: nn.Module, shared: bool, seed: int, dims: list[int]) -> None:
        super().__init__()
        self.layer = layer
        self.factor = nn.Parameter(next(layer.parameters()).new_ones(()))  # for a derivative through the inputs
        self.shared = shared
        self.seed = seed
        self.dims = dims

    def forward(self, *inputs: Tensor) -> Tensor:
        """Computes a smooth number per sample: [B]."""
        outputs = self.layer(*(x * self.factor if x.is_floating_point() else x for x in inputs))
        leaves = [
            leaf.movedim(dim, 0).reshape(len(inputs[0]), -1)
            for leaf, dim in zip(tree_leaves(outputs), self.dims, strict=True)
        ]
        value = (torch.sin(_waves(torch.cat(leaves, 1), 3.0 + self.seed)) * 2.0).sum(1)
        if self.shared:
            own = sum(_waves(p.reshape(1, -1), 7.0 + self.seed).sum() for p in self.layer.parameters())
            value = value + own * torch.sin(leaves[0].detach().sum(1))
        return value


def _batch_dims(layer: nn.Module, inputs: tuple[Tensor, ...]) -> list[int]:
    """Finds the samples' dimension of each output, which is not the first in the states of recurrent layers."""
    layer = copy.deepcopy(layer)  # whatever these forwards leave in it
    with torch.no_grad(), preserved_randomness(inputs[0].device, seed=0):
        once, twice = (tree_leaves(layer(*x)) for x in (inputs, [torch.cat([x, x]) for x in inputs]))
    pairs = [zip(a.shape, b.shape, strict=True) for a, b in zip(once, twice, strict=True)]
    return [next((dim for dim, (one, two) in enumerate(pair) if one != two), 0) for pair in pairs]


def _waves(flat: Tensor, frequency: float) -> Tensor:
    """Multiplies columns by fixed, distinct numbers, since random numbers cannot be drawn under vmap."""
    position = torch.arange(flat.shape[1], dtype=flat.dtype, device=flat.device)
    return flat * torch.cos(frequency * (position + 0.5))


def _evaluate(model: _Probe, weak: tuple[Tensor, ...], strong: tuple[Tensor, ...], engine: Engine) -> dict[str, Tensor]:
    """Computes norms and cosines of the layer's gradients, and the gradient of L_g."""
    model.zero_grad()
    loss = GradientConsistencyLoss(
        model, encoder=model.layer, loss_fn=lambda output, target: output, engine=engine, chunk_size=None
    )
    target = torch.zeros(len(weak[0]), dtype=torch.long, device=weak[0].device)
    loss(weak, strong, target).backward()
    record = loss.measure(weak, strong, target)
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

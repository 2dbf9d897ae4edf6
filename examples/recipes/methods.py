"""What is trained: `--method` and the GGCR options, built from gradconsist's public API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn

from gradconsist import GGCRWrapper, GradientConsistencyLoss, SSLBatch, StepOutput
from gradconsist.methods import FixMatch
from gradconsist.regularizers import GradientNormPenalty, JacobianPenalty
from recipes.config import Config
from recipes.errors import OptionError
from recipes.models import WideResNet


class Supervised(nn.Module):
    """Cross-entropy on the labeled images alone: the baseline that every table needs.

    Args:
        model: From images `[B, 3, H, W]` to logits `[B, K]`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: SSLBatch) -> StepOutput:
        """Return the labeled loss; there is no pair of views to compare."""
        loss = F.cross_entropy(self.model(batch.x).float(), batch.y)
        return StepOutput(loss, None, {"loss_supervised": loss.detach()})


def _fixmatch(model: nn.Module, config: Config) -> nn.Module:
    return FixMatch(
        model,
        threshold=config.threshold,
        unlabeled_weight=config.unlabeled_weight,
        unlabeled_ramp_steps=config.unlabeled_ramp,
        brier_weight=config.brier_weight,
        joint=config.joint_forward,
    )


METHODS: dict[str, Callable[[nn.Module, Config], nn.Module]] = {
    "fixmatch": _fixmatch,
    "supervised": lambda model, config: Supervised(model),
}


def check_method(name: str) -> None:
    """Refuse a method that does not exist.

    Args:
        name: `--method`.

    Raises:
        OptionError: Listing the methods that exist.
    """
    if name not in METHODS:
        raise OptionError(f"--method {name!r} is unknown: choose from {', '.join(sorted(METHODS))}.")


def build_method(model: WideResNet, config: Config) -> nn.Module:
    """Build the method, with GGCR and the Jacobian penalty around it where their weights are above 0.

    Args:
        model: The network.
        config: Resolved options.

    Returns:
        A module from an `SSLBatch` to a `StepOutput`; with both weights 0 it is the plain method itself.

    Raises:
        OptionError: Where the method or `--ggcr-encoder` names nothing.
    """
    check_method(config.method)
    method = _with_ggcr(METHODS[config.method](model, config), model, config)
    if config.jacobian_weight == 0:
        return method
    penalty = JacobianPenalty(model, projections=config.jacobian_projections, seed=config.seed)
    return WithJacobian(method, penalty, config.jacobian_weight)


class WithJacobian(nn.Module):
    """A method whose loss also has the Jacobian penalty of the labeled images.

    Args:
        method: From an `SSLBatch` to a `StepOutput`.
        penalty: Of the same model.
        weight: Its factor.
    """

    def __init__(self, method: nn.Module, penalty: JacobianPenalty, weight: float) -> None:
        super().__init__()
        self.method, self.penalty, self.weight = method, penalty, weight

    def forward(self, batch: SSLBatch) -> StepOutput:
        """Return the method's step with the penalty added."""
        out: StepOutput = self.method(batch)
        term = self.penalty(batch.x)
        return out._replace(loss=out.loss + self.weight * term, logs={**out.logs, "loss_jacobian": term.detach()})

    def get_extra_state(self) -> dict[str, Any]:
        """The state of the penalty's generator."""
        return dict(self.penalty.state_dict())

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` returned."""
        self.penalty.load_state_dict(state)


def _with_ggcr(method: nn.Module, model: WideResNet, config: Config) -> nn.Module:
    if config.ggcr_weight == 0:
        return method
    term = GradientConsistencyLoss if config.ggcr_criterion == "cosine" else GradientNormPenalty
    consistency = term(
        model,
        encoder=_compared(model, config.ggcr_encoder),
        engine=config.ggcr_engine,
        max_pairs=config.ggcr_max_pairs,
    )
    return GGCRWrapper(
        method,
        consistency,
        weight=config.ggcr_weight,
        warmup_steps=config.ggcr_warmup,
        ramp_steps=config.ggcr_ramp,
        every=config.ggcr_every,
        gate=config.ggcr_gate,
    )


def _compared(model: WideResNet, name: str) -> nn.Module | Callable[[str], bool] | None:
    """Turn `--ggcr-encoder` into the loss's `encoder` argument."""
    if name == "all":
        return None
    if name == "encoder":
        return model.encoder
    names = [parameter for parameter, _ in model.named_parameters()]
    if not any(parameter.startswith(name) for parameter in names):
        raise OptionError(
            f"--ggcr-encoder {name!r} is a prefix of no parameter: write encoder, all, or for example "
            f"{names[1].rsplit('.', 1)[0]!r}."
        )
    return lambda parameter: parameter.startswith(name)

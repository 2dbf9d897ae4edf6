"""What is trained: `--method` and the GGCR options, built from gradconsist's public API."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import nn

from gradconsist import GGCRWrapper, GradientConsistencyLoss, SSLBatch, StepOutput
from gradconsist.methods import FixMatch
from recipes.config import Config, projection
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
    """Build the method, wrapped in GGCR where `--ggcr-weight` is above 0.

    Args:
        model: The network.
        config: Resolved options.

    Returns:
        A module from an `SSLBatch` to a `StepOutput`; with weight 0 it is the plain method itself.

    Raises:
        OptionError: Where the method or `--ggcr-encoder` names nothing.
    """
    check_method(config.method)
    method = METHODS[config.method](model, config)
    if config.ggcr_weight == 0:
        return method
    consistency = GradientConsistencyLoss(
        model,
        encoder=_compared(model, config.ggcr_encoder),
        engine=config.ggcr_engine,
        max_pairs=config.ggcr_max_pairs,
        projection=projection(config),
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

"""What is trained: `--method` and the GGCR options, built from gradconsist's public API."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn

import gradconsist.methods
from gradconsist import GGCRWrapper, GradientConsistencyLoss, SSLBatch, StepOutput
from gradconsist.regularizers import GradientNormPenalty, JacobianPenalty
from trainer.config import Config
from trainer.errors import OptionError
from trainer.models import classifier_head
from trainer.option_checks import projection


class Supervised(nn.Module):
    """Loss of the labeled images alone, as FixMatch has it: the baseline that every table needs."""

    def __init__(self, model: nn.Module, *, brier_weight: float = 0.0) -> None:
        super().__init__()
        self.model, self.brier_weight = model, brier_weight

    def forward(self, batch: SSLBatch) -> StepOutput:
        """Return the labeled loss; there is no pair of views to compare."""
        logits = self.model(batch.x).float()
        loss = F.cross_entropy(logits, batch.y)
        if self.brier_weight > 0:
            onehot = F.one_hot(batch.y, logits.shape[1])
            loss = loss + self.brier_weight * (logits.softmax(1) - onehot).square().sum(1).mean()
        return StepOutput(loss, None, {"loss_supervised": loss.detach()})


METHODS: dict[str, type[nn.Module]] = {
    **{name.lower(): getattr(gradconsist.methods, name) for name in gradconsist.methods.__all__},
    "supervised": Supervised,
}

# Which option is which argument of a method, for the methods that have it.
ARGUMENTS = {
    "threshold": "threshold",
    "temperature": "temperature",
    "method_decay": "ema_decay",
    "unlabeled_weight": "unlabeled_weight",
    "unlabeled_ramp": "unlabeled_ramp_steps",
    "brier_weight": "brier_weight",
    "joint_forward": "joint",
}


def check_method(config: Config) -> None:
    """Refuse a method that does not exist, and options that the method does not have.

    The supervised baseline alone ignores the options of unlabeled images, so that one command line serves both.
    """
    if config.method not in METHODS:
        raise OptionError(f"--method {config.method!r} is unknown: choose from {', '.join(sorted(METHODS))}.")
    if config.method == "supervised":
        return
    taken = inspect.signature(METHODS[config.method]).parameters
    for option, argument in ARGUMENTS.items():
        value = getattr(config, option)
        given = value > 0 if option == "brier_weight" else value is not None
        if given and argument not in taken:
            raise OptionError(
                f"--{option.replace('_', '-')} {value}: {config.method} has no such option; leave it out."
            )


def build_method(model: nn.Module, config: Config, samples: int | None = None) -> nn.Module:
    """Build the method, with GGCR and the Jacobian penalty around it where their weights are above 0.

    The network's last linear layer is the classifier head, and all the rest the encoder; `samples` is the number of
    training images, for the methods that remember each of them.
    """
    check_method(config)
    known: dict[str, Any] = {"samples": samples, "classes": classifier_head(model)[1].out_features}
    known |= {argument: getattr(config, option) for option, argument in ARGUMENTS.items()}
    taken = inspect.signature(METHODS[config.method]).parameters
    method = METHODS[config.method](model, **{name: value for name, value in known.items() if name in taken})
    method = _with_ggcr(method, model, config)
    if config.jacobian_weight == 0:
        return method
    penalty = JacobianPenalty(model, projections=config.jacobian_projections, seed=config.seed)
    return WithJacobian(method, penalty, config.jacobian_weight)


class WithJacobian(nn.Module):
    """A method whose loss also has the Jacobian penalty of the labeled images."""

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


def _with_ggcr(method: nn.Module, model: nn.Module, config: Config) -> nn.Module:
    if config.ggcr_through_statistics and not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        raise OptionError(f"--ggcr-through-statistics: --arch {config.arch} has no BatchNorm; leave it out.")
    term = GradientConsistencyLoss if config.ggcr_criterion == "cosine" else GradientNormPenalty
    own = ("engine", "max_pairs", "stop_gradient", "batchnorm", "through_statistics", "chunk_size")
    options = {name: getattr(config, f"ggcr_{name}") for name in own}
    encoder = _compared(model, config.ggcr_encoder)
    consistency = term(model, encoder=encoder, projection=projection(config), **options)
    if config.ggcr_weight == 0:  # after the term is built: its options are checked in any case
        return method
    return GGCRWrapper(
        method,
        consistency,
        weight=config.ggcr_weight,
        warmup_steps=config.ggcr_warmup,
        ramp_steps=config.ggcr_ramp,
        every=config.ggcr_every,
        gate=config.ggcr_gate,
    )


def _compared(model: nn.Module, name: str) -> Callable[[str], bool] | None:
    """Turn `--ggcr-encoder` into the loss's `encoder` argument."""
    if name == "all":
        return None
    if name == "encoder":
        head = classifier_head(model)[0]
        return lambda parameter: not parameter.startswith(head + ".")
    names = [parameter for parameter, _ in model.named_parameters()]
    if not any(parameter.startswith(name) for parameter in names):
        raise OptionError(
            f"--ggcr-encoder {name!r} is a prefix of no parameter: write encoder, all, or for example "
            f"{names[1].rsplit('.', 1)[0]!r}."
        )
    return lambda parameter: parameter.startswith(name)

"""One step of training, and everything that must be saved to take the next one exactly."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from gradconsist import GGCRWrapper, SSLBatch, StepOutput
from gradconsist.errors import NonFiniteError
from gradconsist.optim import SAM
from trainer.config import Config
from trainer.ema import AveragedModel
from trainer.errors import CheckpointError, NonFiniteLossError, OptionError
from trainer.loader import StepImages, ToModel
from trainer.methods import build_method
from trainer.models import build_model
from trainer.runlog import Meter, Number
from trainer.sam import same_step_twice
from trainer.schedule import build_optimizer, set_learning_rate
from trainer.weights import load_start

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# GradScaler starts at 2^16 and halves at each overflow. At 1 the loss itself overflows: waiting would train nothing.
_LEAST_SCALE = 1.0


class StepTrainer:
    """What the trainers of one process and of several have in common: precision, messages, and the state of a run."""

    config: Config
    to_model: ToModel
    method: nn.Module
    optimizer: Any
    average: AveragedModel
    scaler: torch.amp.GradScaler
    step: int
    meter: Meter
    evaluations: list[float]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.amp == "off":
            return contextlib.nullcontext()
        return torch.autocast(self.to_model.device.type, dtype=AMP_TYPES[self.config.amp])

    def _non_finite(self, what: str) -> str:
        return (
            f"step {self.step}: {what}. Nothing was updated, and the last checkpoint is untouched. "
            "Try a smaller --lr or --ggcr-weight, or --amp off, in a new --output."
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, and the options, so that the file describes itself."""
        return {
            "step": self.step,
            "options": dataclasses.asdict(self.config),
            "method": self.method.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "meter": self.meter.state_dict(),
            "evaluations": list(self.evaluations),
            **self._random_states(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Args:
            state: From a verified checkpoint.

        Raises:
            CheckpointError: Where it does not fit this run.
        """
        try:
            self.method.load_state_dict(state["method"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.meter.load_state_dict(state["meter"])
            self.evaluations = [float(value) for value in state["evaluations"]]
            self.step = int(state["step"])
            if not 0 <= self.step <= self.config.steps:
                raise ValueError(f"it is of step {self.step} of {self.config.steps}")
            self._load_random(state)
        except Exception as error:  # what a foreign state holds can fail in any way where it is used
            reason = (str(error) or "no reason given").splitlines()[0]
            raise CheckpointError(
                f"the checkpoint does not fit this run ({type(error).__name__}: {reason}): "
                "it was written by another version of the trainer, or for another model. Use another --output."
            ) from error

    def _random_states(self) -> dict[str, Any]:
        """The random states' part of `state_dict`."""
        raise NotImplementedError

    def _load_random(self, state: dict[str, Any]) -> None:
        """Restore what `_random_states` returned."""
        raise NotImplementedError


class Trainer(StepTrainer):
    """Model, method, optimizer, averaged model and loss scaling of a run.

    Args:
        config: Resolved options.
        classes: Number of classes K.
        to_model: Normalisation and device.
        samples: Number of training images.
        start: Weights to start from instead of random ones, as `--init-part` says.

    Attributes:
        step: Steps done.
        meter: Means for the log.
        evaluations: Test accuracies so far.
    """

    def __init__(
        self, config: Config, classes: int, to_model: ToModel, samples: int, start: dict[str, Tensor] | None = None
    ) -> None:
        self.config, self.to_model, device = config, to_model, to_model.device
        check_half_type(config.amp, device)
        torch.manual_seed(config.seed)
        self.model = build_model(config.arch, classes, momentum=float(config.bn_momentum or 0.001)).to(device)
        if start is not None:
            load_start(self.model, start, config)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.method = build_method(self.model, config, samples).to(device).train()
        sgd = build_optimizer(self.model, lr=config.lr, weight_decay=float(config.weight_decay or 0.0))
        self.sam = SAM(sgd, rho=config.sam_rho) if config.optimizer == "sam" else None
        self.optimizer = self.sam or sgd
        self.average = AveragedModel(self.model, config.ema, warmup=bool(config.ema_warmup))
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.step = 0
        self.meter = Meter()
        self.evaluations: list[float] = []

    def train_step(self, images: StepImages) -> None:
        """Take one step.

        Args:
            images: The step's images.

        Raises:
            NonFiniteLossError: Where the loss or its gradient is NaN or infinite; nothing is updated then.
        """
        lr = set_learning_rate(self.optimizer, self.config.lr, self.step, self.config.steps)
        batch = self.to_model.batch(images)
        if self.sam is None:
            out = self._gradient(batch)
            self.scaler.step(self.optimizer)
        else:
            out = same_step_twice(self.method, self.sam, lambda: self._gradient(batch))
            self.scaler.step(self.sam.base)  # by the second gradient
        try:
            scaling = update_scale(self.scaler)
        except FloatingPointError as error:
            raise NonFiniteLossError(self._non_finite(str(error))) from error
        self.average.update(self.model)
        self.step += 1
        quality = pseudo_label_quality(out, images.truth)
        self.meter.add({**out.logs, **quality, **scaling, "loss": out.loss, "lr": lr})
        if "ggcr_cosine" in out.logs:
            self.meter.add({"ggcr_cosine_sample": last_cosines(self.method)})

    def _gradient(self, batch: SSLBatch) -> StepOutput:
        """The method's loss and, in `.grad`, its scaled gradient."""
        try:
            with self._autocast():
                out: StepOutput = self.method(batch)
        except NonFiniteError as error:
            raise NonFiniteLossError(self._non_finite(f"the gradient consistency failed ({error})")) from error
        loss = float(out.loss.detach())
        if not math.isfinite(loss):
            terms = [name for name, value in out.logs.items() if "loss" in name and not math.isfinite(float(value))]
            raise NonFiniteLossError(self._non_finite(f"the loss is {loss:g}; terms: {terms or 'none'}"))
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(out.loss).backward()
        if not self.scaler.is_enabled():  # fp16's scaler meets infinite gradients as a matter of course, and skips
            self._check_gradients()
        return out

    def _check_gradients(self) -> None:
        name = non_finite_gradient(self.model)
        if name is not None:
            raise NonFiniteLossError(self._non_finite(f"the gradient of {name} is not finite"))

    def _random_states(self) -> dict[str, Any]:
        device = self.to_model.device
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return {"rng": torch.get_rng_state(), "cuda_rng": cuda}

    def _load_random(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.to_model.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.to_model.device)


def check_half_type(amp: str, device: torch.device) -> None:
    """Refuse a device that cannot compute in the half type: torch may raise, or warn and go on in float32.

    Args:
        amp: `--amp`.
        device: Where the run computes.

    Raises:
        OptionError: Naming the device and what to give instead.
    """
    if amp == "off":
        return
    wanted, why = AMP_TYPES[amp], "torch goes on in float32"
    try:
        kernel = torch.zeros(1, 1, 1, 1, device=device, requires_grad=True)
        with warnings.catch_warnings(), torch.autocast(device.type, dtype=wanted):
            warnings.simplefilter("ignore")
            out = torch.nn.functional.conv2d(torch.zeros(1, 1, 1, 1, device=device), kernel)
        out.sum().backward()
        if out.dtype == wanted:
            return
    except RuntimeError as error:
        why = str(error).splitlines()[0]
    instead = "--amp bf16 or --amp off" if amp == "fp16" else "--amp off"
    raise OptionError(f"--amp {amp} does not work on {device} with torch {torch.__version__} ({why}): give {instead}.")


def update_scale(scaler: torch.amp.GradScaler) -> dict[str, Number]:
    """Adapt the loss scale of fp16, and say what it was; an overflow halves it, and its step was skipped.

    Args:
        scaler: After its `step`.

    Returns:
        `loss_scale` and `skipped`; nothing where the scaler is not enabled.

    Raises:
        FloatingPointError: Where the gradient is not finite even without scaling.
    """
    if not scaler.is_enabled():
        return {}
    scale = scaler.get_scale()
    scaler.update()
    skipped = scaler.get_scale() < scale
    if skipped and scale < _LEAST_SCALE:
        raise FloatingPointError(f"the gradient is not finite at a loss scale of {scale:g}")
    return {"loss_scale": scale, "skipped": float(skipped)}


def last_cosines(method: nn.Module) -> Tensor:
    """GC of each pair `[B]` of the last step; NaN for pairs that were not compared or are degenerate."""
    wrapper = next(module for module in method.modules() if isinstance(module, GGCRWrapper))
    record = wrapper.consistency.last
    return torch.empty(0) if record is None else record.cosine


def non_finite_gradient(model: nn.Module) -> str | None:
    """The first parameter whose gradient is NaN or infinite, or None."""
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    norms = torch.stack(torch._foreach_norm([gradient for _, gradient in named]))
    if bool(torch.isfinite(norms).all()):
        return None
    return next(name for (name, _), norm in zip(named, norms.tolist(), strict=True) if not math.isfinite(norm))


def pseudo_label_quality(out: StepOutput, truth: Tensor) -> dict[str, Number]:
    """How often the pseudo-labels are right, over all pairs and over the confident ones (NaN where there is none)."""
    if out.pair is None:
        return {}
    target = out.pair.target.argmax(1) if out.pair.target.ndim == 2 else out.pair.target
    right = (target == truth.to(target.device)).float()
    weight = torch.ones_like(right) if out.pair.weight is None else out.pair.weight.float()
    return {"pseudo_label_accuracy": right.mean(), "confident_accuracy": (right * weight).sum() / weight.sum()}

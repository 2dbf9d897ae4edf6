"""One step of training on all processes, and everything that must be saved to take the next one exactly."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gradconsist import GGCRWrapper, SSLBatch, StepOutput
from gradconsist.errors import NonFiniteError
from recipes.ema import AveragedModel
from recipes.errors import CheckpointError, NonFiniteLossError, TrainerError
from recipes.imagenet.config import ImageNetConfig
from recipes.loader import StepImages, ToModel
from recipes.methods import build_method
from recipes.processes import OtherProcessError, Processes
from recipes.runlog import Meter
from recipes.schedule import build_optimizer, set_learning_rate
from recipes.trainer import (
    AMP_TYPES,
    check_half_type,
    last_cosines,
    non_finite_gradient,
    pseudo_label_quality,
    update_scale,
)

# Sums over the pairs of a process; every other number of a step is a mean.
_COUNTS = ("ggcr_pairs", "ggcr_degenerate")


class ProcessTrainer:
    """Model, method, optimizer, averaged model and loss scaling of a run, the same on every process.

    DDP is around the whole step, so that the gradients that are compared stay on their process and the gradient of the
    loss is the mean over the processes: that of one process with the joined batch.

    Args:
        config: Resolved options.
        model: The network, from weights that are the same everywhere.
        to_model: Normalisation and device.
        samples: Number of training images.
        processes: This process among all.

    Attributes:
        step: Steps done.
        meter: Means for the log, over all processes.
        evaluations: Top-1 accuracies so far.
    """

    def __init__(
        self, config: ImageNetConfig, model: nn.Module, to_model: ToModel, samples: int, processes: Processes
    ) -> None:
        self.config, self.to_model, self.processes = config, to_model, processes
        device = to_model.device
        processes.together(lambda: check_half_type(config.amp, device))
        self.model = model.to(device)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)
        torch.manual_seed(config.seed + 1 + processes.rank)  # which pairs --ggcr-max-pairs takes, and dropout
        pairs = config.ggcr_max_pairs and config.ggcr_max_pairs // processes.world
        local = dataclasses.replace(config, ggcr_max_pairs=pairs)
        self.method = build_method(self.model, local, samples, chunk_size=config.ggcr_chunk_size).to(device).train()
        self.whole_step = processes.wrap(self.method)
        self.optimizer = build_optimizer(self.model, lr=config.lr, weight_decay=float(config.weight_decay or 0.0))
        self.average = AveragedModel(self.model, config.ema, warmup=bool(config.ema_warmup))
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.step = 0
        self.meter = Meter()
        self.evaluations: list[float] = []

    def train_step(self, images: Callable[[], StepImages]) -> None:
        """Take one step, on all processes or on none.

        Args:
            images: Fetches this process's images.

        Raises:
            NonFiniteLossError: Where the loss or its gradient is NaN or infinite; nothing is updated then.
            DatasetError: A photograph cannot be read.
            OtherProcessError: One of these happened to another process.
        """
        config = self.config
        lr = set_learning_rate(self.optimizer, config.lr, self.step, config.steps, config.lr_warmup)
        batch = self.processes.together(images)  # before any process waits for the others in its forward
        out, numbers = self.processes.together(lambda: self._forward(batch))
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(out.loss).backward()
        if not self.scaler.is_enabled():  # fp16's scaler meets infinite gradients as a matter of course, and skips
            name = non_finite_gradient(self.model)  # after the mean over the processes: the same everywhere
            if name is not None:
                error = NonFiniteLossError(self._non_finite(f"the gradient of {name} is not finite"))
                raise self._same_everywhere(error)
        self.scaler.step(self.optimizer)
        try:
            scaling = update_scale(self.scaler)  # the same everywhere, as the gradient
        except FloatingPointError as error:
            raise self._same_everywhere(NonFiniteLossError(self._non_finite(str(error)))) from error
        self.average.update(self.model)
        self.step += 1
        means = self.processes.mean(numbers)
        counts = {name: value * self.processes.world for name, value in means.items() if name in _COUNTS}
        self.meter.add({**means, **counts, **scaling, "lr": lr})
        if "ggcr_cosine" in means:
            self.meter.add({"ggcr_cosine_sample": self.processes.gather(last_cosines(self.method).cpu())})

    def _forward(self, images: StepImages) -> tuple[StepOutput, dict[str, float]]:
        """The loss with its graph, and the numbers of the log."""
        batch: SSLBatch = self.to_model.batch(images)
        try:
            with self._autocast():
                out: StepOutput = self.whole_step(batch)
        except NonFiniteError as error:
            raise NonFiniteLossError(self._non_finite(f"the gradient consistency failed ({error})")) from error
        numbers = {
            name: float(value)
            for name, value in {
                **out.logs,
                **pseudo_label_quality(out, images.truth),
                "loss": out.loss.detach(),
            }.items()
        }
        if not math.isfinite(numbers["loss"]):
            terms = [name for name, value in numbers.items() if "loss_" in name and not math.isfinite(value)]
            raise NonFiniteLossError(self._non_finite(f"the loss is {numbers['loss']:g}; terms: {terms or 'none'}"))
        return out, numbers

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.amp == "off":
            return contextlib.nullcontext()
        return torch.autocast(self.to_model.device.type, dtype=AMP_TYPES[self.config.amp])

    def _non_finite(self, what: str) -> str:
        return (
            f"step {self.step}: {what}. Nothing was updated, and the last checkpoint is untouched. "
            "Try a smaller --lr or --ggcr-weight, or --amp off, in a new --output."
        )

    def _same_everywhere(self, error: TrainerError) -> TrainerError:
        """The error on process 0, and on the others that it has told why."""
        return error if self.processes.first else OtherProcessError("process 0 failed")

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on; all processes must call it.

        What is the same everywhere is there once. BatchNorm's running statistics are those of process 0, which DDP
        hands on at the start of each step. `processes` holds the random states, one row for each process.
        """
        device = self.to_model.device
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.zeros(0, dtype=torch.uint8)
        return {
            "step": self.step,
            "options": dataclasses.asdict(self.config),
            "method": self.method.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "meter": self.meter.state_dict(),
            "evaluations": list(self.evaluations),
            "processes": {
                "rng": self.processes.gather(torch.get_rng_state()),
                "cuda_rng": self.processes.gather(cuda),
                "pairs": self.processes.gather(self._pair_generator()),
            },
        }

    def _pair_generator(self) -> torch.Tensor:
        if not isinstance(self.method, GGCRWrapper):
            return torch.zeros(0, dtype=torch.uint8)
        return self.method.consistency.state_dict()["generator"]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; a process that it does not know keeps the random state of its seed.

        Args:
            state: From a verified checkpoint.

        Raises:
            CheckpointError: Where it does not fit this run.
        """
        try:
            fresh = self._pair_generator()
            self.method.load_state_dict(state["method"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.meter.load_state_dict(state["meter"])
            self.evaluations = [float(value) for value in state["evaluations"]]
            self.step = int(state["step"])
            if not 0 <= self.step <= self.config.steps:
                raise ValueError(f"it is of step {self.step} of {self.config.steps}")
            self._load_random(state["processes"], fresh)
        except Exception as error:  # what a foreign state holds can fail in any way where it is used
            reason = (str(error) or "no reason given").splitlines()[0]
            raise CheckpointError(
                f"the checkpoint does not fit this run ({type(error).__name__}: {reason}): "
                "it was written by another version of the trainer, or for another model. Use another --output."
            ) from error

    def _load_random(self, rows: dict[str, torch.Tensor], fresh: torch.Tensor) -> None:
        rank, device = self.processes.rank, self.to_model.device
        known = rank < len(rows["rng"])
        if known:
            torch.set_rng_state(rows["rng"][rank].clone())  # torch crashes on a view
            if device.type == "cuda" and rows["cuda_rng"].numel():
                torch.cuda.set_rng_state(rows["cuda_rng"][rank].clone(), device)
        if isinstance(self.method, GGCRWrapper):
            mine = rows["pairs"][rank] if known else fresh
            consistency = self.method.consistency
            consistency.load_state_dict({**consistency.state_dict(), "generator": mine})

"""One step of training on all processes, and everything that must be saved to take the next one exactly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gradconsist import GGCRWrapper, SSLBatch, StepOutput
from gradconsist.errors import NonFiniteError
from trainer.ema import AveragedModel
from trainer.errors import NonFiniteLossError, TrainerError
from trainer.imagenet.config import ImageNetConfig
from trainer.loader import StepImages, ToModel
from trainer.methods import build_method
from trainer.processes import OtherProcessError, Processes
from trainer.runlog import Meter
from trainer.schedule import build_optimizer, set_learning_rate
from trainer.step import (
    StepTrainer,
    check_half_type,
    last_cosines,
    non_finite_gradient,
    pseudo_label_quality,
    update_scale,
)

# Sums over the pairs of a process; every other number of a step is a mean.
_COUNTS = ("ggcr_pairs", "ggcr_degenerate")


class ProcessTrainer(StepTrainer):
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

    config: ImageNetConfig

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
        self._fresh_pairs = self._pair_generator()  # of this process's seed; a checkpoint overwrites it

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

    def _same_everywhere(self, error: TrainerError) -> TrainerError:
        """The error on process 0, and on the others that it has told why."""
        return error if self.processes.first else OtherProcessError("process 0 failed")

    def _random_states(self) -> dict[str, Any]:
        """The random states of all processes, one row for each; all of them must call it.

        The rest of the state is there once: it is the same everywhere, but for BatchNorm's running statistics, which
        are those of process 0, as DDP hands them on at the start of each step.
        """
        device = self.to_model.device
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.zeros(0, dtype=torch.uint8)
        return {
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

    def _load_random(self, state: dict[str, Any]) -> None:
        """Restore this process's row; one that the checkpoint does not know keeps the random state of its seed."""
        rows, rank, device = state["processes"], self.processes.rank, self.to_model.device
        known = rank < len(rows["rng"])
        if known:
            torch.set_rng_state(rows["rng"][rank].clone())  # torch crashes on a view
            if device.type == "cuda" and rows["cuda_rng"].numel():
                torch.cuda.set_rng_state(rows["cuda_rng"][rank].clone(), device)
        if isinstance(self.method, GGCRWrapper):
            mine = rows["pairs"][rank] if known else self._fresh_pairs
            consistency = self.method.consistency
            consistency.load_state_dict({**consistency.state_dict(), "generator": mine})

"""One step of training, and everything that must be saved to take the next one exactly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradconsist import GGCRWrapper, SSLBatch, StepOutput
from gradconsist.errors import GradConsistError, NonFiniteError
from gradconsist.optim import SAM
from trainer.config import Config
from trainer.errors import CheckpointError, NonFiniteLossError, OtherProcessError, TrainerError, reason
from trainer.loader import StepImages, ToModel
from trainer.methods import build_method
from trainer.models import build_network, check_forward, join_statistics
from trainer.optimizer import (
    AMP_TYPES,
    AveragedModel,
    build_optimizer,
    check_half,
    same_step_twice,
    set_learning_rate,
    update_scale,
)
from trainer.processes import ALONE, Processes, is_of_processes
from trainer.runlog import Meter, Number
from trainer.weights import load_start

# Sums over the pairs of a process; every other number of a step is a mean.
_COUNTS = ("ggcr_pairs", "ggcr_degenerate")


class Trainer:
    """Model, method, optimizer, averaged model and loss scaling of a run, the same on every process.

    With several processes, DDP is around the whole step, so that the gradients that are compared stay on their process
    and the gradient of the loss is the mean over the processes: that of one process with the joined batch.
    """

    def __init__(
        self, config: Config, model: nn.Module, to_model: ToModel, samples: int, processes: Processes = ALONE
    ) -> None:
        self.config, self.to_model, self.processes = config, to_model, processes
        device = to_model.device
        processes.together(lambda: check_half(config.amp, device))
        self.model = model.to(device)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)
        pairs, k = config.ggcr_max_pairs, config.accumulate
        if processes.world > 1:  # which pairs --ggcr-max-pairs takes, and dropout
            torch.manual_seed(config.seed + 1 + processes.rank)
            pairs = pairs and pairs // processes.world
        # The method counts batches, of which a step has k.
        local = dataclasses.replace(
            config, ggcr_max_pairs=pairs, ggcr_warmup=k * config.ggcr_warmup, ggcr_ramp=k * config.ggcr_ramp,
            unlabeled_ramp=None if config.unlabeled_ramp is None else k * config.unlabeled_ramp,
        )  # fmt: skip
        self.method = processes.together(lambda: build_method(self.model, local, samples)).to(device).train()
        self.whole_step = processes.wrap(self.method)
        base = build_optimizer(
            self.model, lr=float(config.lr or 0.0), weight_decay=float(config.weight_decay or 0.0),
            adamw=config.optimizer == "adamw",
        )  # fmt: skip
        self.sam = SAM(base, rho=config.sam_rho) if config.optimizer == "sam" else None
        self.optimizer: Any = self.sam or base
        self.average = AveragedModel(self.model, config.ema, warmup=bool(config.ema_warmup))
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.step = 0  # steps done
        self.meter = Meter()  # over all processes
        self.evaluations: list[dict[str, float]] = []  # so far
        self._fresh_pairs = self._pair_generator()  # of this process's seed; a checkpoint overwrites it

    @classmethod
    def fresh(
        cls, config: Config, classes: int, to_model: ToModel, samples: int, start: dict[str, Tensor] | None = None, *,
        processes: Processes = ALONE, size: Sequence[int] | None = None,
    ) -> Trainer:  # fmt: skip
        """A trainer with the network that the options name, from the weights that `--seed` draws."""
        torch.manual_seed(config.seed)

        def build() -> nn.Module:
            network = build_network(config, classes, processes)
            if start is not None:
                load_start(network, start, config)
            network.to(to_model.device)
            if size is not None:
                check_forward(network, config, classes, size)
            if config.norm == "sync":  # last: its forward needs all processes
                join_statistics(network)
            return network

        return cls(config, processes.together(build), to_model, samples, processes)

    def train_step(self, images: Callable[[], StepImages]) -> None:
        """Take one step, on all processes or on none: nothing is updated where loss or gradient are not finite."""
        config = self.config
        lr = set_learning_rate(self.optimizer, float(config.lr or 0.0), self.step, config.steps, config.lr_warmup)
        fetched = self.processes.together(images)  # before any process waits for the others in its forward
        if self.sam is None:
            self.optimizer.zero_grad(set_to_none=True)
            self._gradient(fetched)
            for _ in range(config.accumulate - 1):
                self._gradient(self.processes.together(images))
        else:
            same_step_twice(self.method, self.sam, lambda: self._gradient(fetched))
        inner = self.sam.base if self.sam else self.optimizer  # by the second gradient
        if config.clip_norm is not None:
            self.scaler.unscale_(inner)
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.scaler.step(inner)
        try:
            scaling = update_scale(self.scaler)  # the same everywhere, as the gradient
        except FloatingPointError as error:
            raise self._same_everywhere(NonFiniteLossError(self._non_finite(str(error)))) from error
        self.average.update(self.model)
        self.step += 1
        self.meter.add({**scaling, "lr": lr})

    def _gradient(self, images: StepImages) -> StepOutput:
        """The method's loss and, added to `.grad`, its scaled gradient."""
        out, numbers = self.processes.together(lambda: self._forward(images))
        if self.sam is not None:
            self.optimizer.zero_grad(set_to_none=True)
        try:
            self.scaler.scale(out.loss / self.config.accumulate).backward()
        except Exception as fault:
            self._name_the_network(fault)
            raise
        if not self.scaler.is_enabled():  # fp16's scaler meets infinite gradients as a matter of course, and skips
            name = non_finite_gradient(self.model)  # after the mean over the processes: the same everywhere
            if name is not None:
                error = NonFiniteLossError(self._non_finite(f"the gradient of {name} is not finite"))
                raise self._same_everywhere(error)
        if self.sam is None or not self.sam.perturbed:
            self._note(numbers)
        return out

    def _forward(self, images: StepImages) -> tuple[StepOutput, dict[str, Number]]:
        """The loss with its graph, and the numbers of the log."""
        batch: SSLBatch = self.to_model.batch(images)
        try:
            amp = self.config.amp
            with torch.autocast(self.to_model.device.type, dtype=AMP_TYPES.get(amp), enabled=amp != "off"):
                out: StepOutput = self.whole_step(batch)
        except NonFiniteError as error:
            raise NonFiniteLossError(self._non_finite(f"the gradient consistency failed ({error})")) from error
        except Exception as fault:
            self._name_the_network(fault)
            raise
        numbers = {**out.logs, **pseudo_label_quality(out, images.truth), "loss": out.loss.detach()}
        loss = float(out.loss.detach())
        if not math.isfinite(loss):
            terms = [name for name, value in out.logs.items() if "loss" in name and not math.isfinite(float(value))]
            raise NonFiniteLossError(self._non_finite(f"the loss is {loss:g}; terms: {terms or 'none'}"))
        return out, numbers

    def _note(self, numbers: dict[str, Number]) -> None:
        """Add a batch's numbers to the log, over all processes."""
        if self.processes.world == 1:
            self.meter.add(numbers)
        else:
            means = self.processes.mean({name: float(value) for name, value in numbers.items()})
            counts = {name: value * self.processes.world for name, value in means.items() if name in _COUNTS}
            self.meter.add({**means, **counts})
        if "ggcr_cosine" in numbers:
            wrapper = next(module for module in self.method.modules() if isinstance(module, GGCRWrapper))
            record, many = wrapper.consistency.last, self.processes.world > 1
            cosines = torch.empty(0) if record is None else record.cosine
            self.meter.add({"ggcr_cosine_sample": self.processes.gather(cosines.cpu()) if many else cosines})

    def _same_everywhere(self, error: TrainerError) -> TrainerError:
        """The error on process 0, and on the others that it has told why."""
        return error if self.processes.first else OtherProcessError("process 0 failed")

    def _name_the_network(self, fault: Exception) -> None:
        """Raise what a fault of the network's own code is called; other faults of a step speak for themselves."""
        if isinstance(fault, TrainerError | GradConsistError | OSError | torch.OutOfMemoryError):
            return
        if not is_of_processes(fault):
            raise TrainerError(
                f"step {self.step}: --arch {self.config.arch} failed ({reason(fault)}). Nothing was updated, and the "
                "last checkpoint is untouched."
            ) from fault

    def _non_finite(self, what: str) -> str:
        return (
            f"step {self.step}: {what}. Nothing was updated, and the last checkpoint is untouched. "
            "Try a smaller --lr or --ggcr-weight, or --amp off, in a new --output."
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, and the options, so that the file describes itself.

        Random states are there for each process, one row each, and all of them must call this. The rest is there once:
        it is the same everywhere, but for BatchNorm's running statistics, which are those of process 0, as DDP hands
        them on at the start of each step.
        """
        device = self.to_model.device
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.zeros(0, dtype=torch.uint8)
        gather = self.processes.gather
        rows = {"rng": gather(torch.get_rng_state()), "cuda_rng": gather(cuda), "pairs": gather(self._pair_generator())}
        return {
            "step": self.step,
            "options": dataclasses.asdict(self.config),
            "method": self.method.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "meter": self.meter.state_dict(),
            "evaluations": [dict(numbers) for numbers in self.evaluations],
            "processes": rows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        try:
            self.method.load_state_dict(state["method"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.meter.load_state_dict(state["meter"])
            self.evaluations = [
                {str(name): float(value) for name, value in numbers.items()} for numbers in state["evaluations"]
            ]
            self.step = int(state["step"])
            if not 0 <= self.step <= self.config.steps:
                raise ValueError(f"it is of step {self.step} of {self.config.steps}")
            self._load_random(state)
        except Exception as error:  # what a foreign state holds can fail in any way where it is used
            raise CheckpointError(
                f"the checkpoint does not fit this run ({reason(error, where=False)}): "
                "it was written by another version of the trainer, or for another model. Use another --output."
            ) from error

    def _pair_generator(self) -> Tensor:
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


def non_finite_gradient(model: nn.Module) -> str | None:
    """The first parameter whose gradient is NaN or infinite, or None."""
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    norms = torch.stack(torch._foreach_norm([gradient for _, gradient in named]))
    if bool(torch.isfinite(norms).all()):
        return None
    return next(name for (name, _), norm in zip(named, norms.tolist(), strict=True) if not math.isfinite(norm))


def pseudo_label_quality(out: StepOutput, truth: Tensor) -> dict[str, Number]:
    """How often the pseudo-labels are right, over all pairs and over the confident ones, where the label is known.

    NaN where there is no such pair.
    """
    if out.pair is None:
        return {}
    target = out.pair.target.argmax(1) if out.pair.target.ndim == 2 else out.pair.target
    truth = truth.to(target.device)
    known = (truth >= 0).float()
    right = (target == truth).float()  # no class is below 0
    weight = known if out.pair.weight is None else out.pair.weight.float() * known
    return {
        "pseudo_label_accuracy": right.sum() / known.sum(),
        "confident_accuracy": (right * weight).sum() / weight.sum(),
    }

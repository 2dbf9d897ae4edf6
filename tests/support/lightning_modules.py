"""FixMatch by hand as LightningModules of every form, and a Trainer that runs them quietly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning import pytorch as pl
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gradconsist import GradientConsistencyLoss, StepOutput, ViewPair
from gradconsist.adapters import lightning as adapter

from . import training

THRESHOLD = 0.37  # passes some pairs of every batch and never all
OPTIONS = {"weight": 0.3, "warmup_steps": 3, "ramp_steps": 4, "every": 2}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)


class Module(pl.LightningModule):
    """`form` says what training_step returns, or hands to manual_backward; `seed` makes dropout's masks known."""

    def __init__(self, form: str = "output", *, manual: bool = False, dropout: float = 0.2, seed: int = 5) -> None:
        super().__init__()
        self.model = training.network(dropout=dropout)
        self.form, self.seed, self.automatic_optimization = form, seed, not manual

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == 0 and batch_idx == 0:  # loaders draw from the global generator before
            torch.manual_seed(self.seed)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.output(batch)
        if self.automatic_optimization or loss is None:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def output(self, batch: Any) -> Any:
        loss, label, mask = training.plain_fixmatch(self.model, batch, THRESHOLD)
        self.latest = label, mask
        pair = ViewPair(batch.weak, batch.strong, label, mask)
        return {
            "output": StepOutput(loss, pair, {"mask": mask.mean()}),
            "tensor": loss,
            "mapping": {"loss": loss, "label": label, "mask": mask},
            "tuple": (loss, mask),
        }[self.form]

    def pair(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> ViewPair:
        """The `pair_fn` of the forms that hold no pair."""
        return ViewPair(args[0].weak, args[0].strong, *self.latest)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.parameters())


def attached(form: str = "output", *, loss: dict[str, Any] | None = None, **options: Any) -> tuple[Module, Any]:
    of_module = {name: options.pop(name) for name in ("manual", "dropout", "seed") if name in options}
    module = Module(form, **of_module)
    if form != "output":
        options["pair_fn"] = module.pair
    consistency = GradientConsistencyLoss(module.model, **(loss or {}))
    return module, adapter.attach(module, consistency, **(OPTIONS | options))


def trainer(epochs: int = 1, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    return pl.Trainer(max_epochs=epochs, **(quiet | options))


def fit(
    module: pl.LightningModule,
    data: list[Any] | None = None,
    epochs: int = 1,
    *,
    validation: list[Any] | None = None,
    resume: Any = None,
    **options: Any,
) -> pl.Trainer:
    """The trainer after it has fitted `module` on `data`, batch by batch, or on the module's own loader."""
    it = trainer(epochs, **options)
    it.fit(module, data and loader(data), validation and loader(validation), ckpt_path=resume)
    return it


def loader(data: list[Any]) -> DataLoader[Any]:
    return DataLoader(data, batch_size=None)


def loop(
    step: Callable[[Any], Tensor], model: nn.Module, data: list[Any], *, accumulate: int = 1, seed: int = 5
) -> dict[str, Tensor]:
    """The same in a plain loop, and the model's state after it."""
    optimizer = sgd(model.parameters())
    torch.manual_seed(seed)
    for number, batch in enumerate(data):
        (step(batch) / accumulate).backward()
        if (number + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict()


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)

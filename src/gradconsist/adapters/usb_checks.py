"""Checks that a ``semilearn`` algorithm is one, that it trains this model, and that it trains at all."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradconsist._inputs.parameters import holds
from gradconsist.errors import ConfigError, LossContractError

_NEEDED = ("train_step", "get_save_dict", "load_model", "consistency_loss", "compute_prob", "model", "it")
# GradScaler may skip the first steps, and a loop may accumulate gradients over a few.
_PATIENCE = 10


def check_algorithm(algorithm: Any) -> None:
    """Checks that the object is an algorithm of semilearn, by the attributes that the adapter uses."""
    missing = [name for name in _NEEDED if not hasattr(algorithm, name)]
    if missing:
        raise ConfigError(
            f"`algorithm` is a {type(algorithm).__name__} without {', '.join(missing)}: pass what"
            " semilearn.get_algorithm returns (semilearn 0.3.2)."
        )


def inner_model(algorithm: Any) -> nn.Module:
    """Returns the algorithm's model, unwrapped from DistributedDataParallel or DataParallel."""
    model: nn.Module = algorithm.model
    return model.module if isinstance(model, DistributedDataParallel | nn.DataParallel) else model


def check_same_model(algorithm: Any, compared: Sequence[nn.Parameter]) -> None:
    """Checks that the algorithm trains the compared model now (not its EMA model or a copy): it may replace `model`."""
    if not holds(algorithm.model, compared):
        raise ConfigError(
            "`consistency` compares a model that `algorithm` does not train: build GradientConsistencyLoss on"
            " `algorithm.model` itself (inside DistributedDataParallel: `algorithm.model.module`)."
        )


class Canary:
    """Detects an algorithm that does not train, which would otherwise show only as flat accuracy."""

    def __init__(self) -> None:
        self._steps = 0
        self._versions: list[int] = []
        self._done = False

    def check_unsupervised(self, algorithm: Any, losses: Sequence[Any]) -> None:
        """Checks in the first step that the unlabeled loss depends on the model."""
        if self._steps == 0 and losses and not any(call.loss.requires_grad for call in losses):
            raise LossContractError(
                f"the unlabeled loss of {type(algorithm).__name__} has no gradient, so only labeled data would train"
                " the model: the head of semilearn's repository computes MeanTeacher's from the teacher alone."
                " Install the release: semilearn==0.3.2."
            )

    def before_step(self, parameters: Sequence[nn.Parameter]) -> None:
        """Warns once if no parameter has changed since the first steps."""
        if self._done or self._steps == 0:
            return
        # A parameter's version counts in-place changes, which is how optimizers update it.
        self._done = self._versions != [parameter._version for parameter in parameters]
        if not self._done and self._steps >= _PATIENCE:
            self._done = True
            warnings.warn(
                f"the model has not changed in {self._steps} steps: the algorithm's ParamUpdateHook is never called."
                " Train with `algorithm.train()`, or call `algorithm.call_hook('after_train_step')` after each"
                " `train_step` with its results in `algorithm.out_dict` and `algorithm.log_dict`; the head of"
                " semilearn's repository does not do that in `Trainer.fit`, semilearn==0.3.2 does.",
                RuntimeWarning,
                stacklevel=4,
            )

    def after_step(self, parameters: Sequence[nn.Parameter]) -> None:
        """Stores the parameters' versions after a step."""
        if not self._done:
            self._versions = [parameter._version for parameter in parameters]
        self._steps += 1

"""MixMatch: guesses and sharpens labels, then mixes labeled and unlabeled inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradconsist._inputs.batch import leaves, rebuilt, take
from gradconsist._inputs.options import check_number
from gradconsist.errors import InputTypeError, StateError
from gradconsist.methods.base import LogitsFunction, Method
from gradconsist.optim import kept_running_statistics
from gradconsist.types import Inputs, SSLBatch, StepOutput


class MixMatch(Method):
    """Guesses and sharpens labels for unlabeled inputs, then applies MixUp to labeled and unlabeled inputs together.

        q = sharpen((softmax f(weak) + softmax f(strong)) / 2), without gradient;  sharpen(p) ~ p^(1 / temperature)
        W = [x, weak, strong] with targets [onehot(y), q, q], n + 2 m rows;  W_s = its rows in random order
        W' = l W + (1 - l) W_s, inputs and targets alike;  l = max(b, 1 - b), b ~ Beta(alpha, alpha) for each row
        L_s = 1/n sum CE(target', f(x'));   L_u = 1/(2 m C) sum ||softmax f(u') - target'||^2
        L = L_s + mu(t) * L_u

    Since l is at least 1/2, row i of W' counts as labeled if row i of W is. The paper uses two weak views: for its
    setting, pass the second one as `strong`.

    BatchNorm works as in the reference code. Labels are guessed in train mode, one view at a time, without changing the
    running statistics. The rows of W' are then forwarded in three batches, each with every third row of x', of weak'
    and of strong' (the reference's interleaving, which needs n = m); only the first batch updates the running
    statistics. ``joint=True`` forwards all rows at once instead, and they all do.

    The pair is (weak, strong) before mixing, with target q and weight 1. If temperature is 1 or more, nothing is
    sharpened, and the pair's target is argmax q instead, as in `PiModel`; L_u always uses q.

    l and the order come from the method's own generator, which is seeded from torch's initial seed, never draws from
    the global one, and is part of ``state_dict()``.

    Args:
        model: see above; inputs must hold exactly one tensor, of floating point.
        unlabeled_weight: mu after its ramp; 100 on CIFAR-10, 150 on CIFAR-100 in later comparisons.
        temperature: temperature of the sharpening.
        alpha: parameter of the Beta distribution; 0 mixes nothing. The paper uses 0.75, USB 0.5.

    Raises:
        InputTypeError: the inputs of a batch are not one floating-point tensor each.

    Source: Berthelot et al., MixMatch (2019), algorithm 1, and the authors' code.
    `gradconsist.methods` describes the arguments, logs and errors that methods share.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        unlabeled_weight: float = 100.0,
        unlabeled_ramp_steps: int = 16384,
        temperature: float = 0.5,
        alpha: float = 0.75,
        joint: bool = False,
        logits_fn: LogitsFunction | None = None,
    ) -> None:
        super().__init__(model, unlabeled_weight, unlabeled_ramp_steps, logits_fn, joint)
        self.temperature = check_number("temperature", temperature, least=1e-3)
        self.alpha = check_number("alpha", alpha, least=0.0)
        # Keeps the state, not the generator, so that the method can be copied and pickled.
        self._random = torch.Generator().manual_seed(torch.initial_seed() % 2**63).get_state()

    def forward(self, batch: SSLBatch) -> StepOutput:
        """Computes the loss of one step."""
        x, *tensors = (self._mixable(part) for part in (batch.x, batch.weak, batch.strong))
        with kept_running_statistics(self.model):
            one, two = (self._without_graph(view).softmax(1) for view in (batch.weak, batch.strong))
        guess = (((one + two) / 2).log() / self.temperature).softmax(1)  # a small T would underflow as a power
        onehot = F.one_hot(batch.y, guess.shape[1]).to(guess.dtype)
        n = len(x)
        mixed, targets = self._mixed(torch.cat([x, *tensors]), torch.cat([onehot, guess, guess]))
        inputs = rebuilt(batch.x, [mixed])
        logits = self._joint_logits(inputs)[0] if self.joint else self._interleaved(inputs, n)
        supervised = F.cross_entropy(logits[:n], targets[:n])
        unsupervised = (logits[n:].softmax(1) - targets[n:]).square().mean()
        target = guess if self.temperature < 1 else guess.argmax(1)
        return self._finish(batch, supervised, unsupervised, target, guess.new_ones(len(guess)))

    @staticmethod
    def _mixable(inputs: Inputs) -> Tensor:
        tensors = leaves(inputs)
        if len(tensors) != 1 or not tensors[0].is_floating_point():
            found = ", ".join(str(tensor.dtype) for tensor in tensors)
            raise InputTypeError(f"`batch` holds inputs of {found}: MixUp mixes one floating-point tensor of each.")
        return tensors[0]

    def _mixed(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Computes W' from W."""
        generator = torch.Generator()
        generator.set_state(self._random)
        rows = len(inputs)
        order = torch.randperm(rows, generator=generator).to(inputs.device)
        share = torch.ones(rows, dtype=torch.float64)
        if self.alpha > 0:  # b = g / (g + g') with g, g' from Gamma(alpha), since torch's Beta takes no generator
            one, two = torch._standard_gamma(share.new_full((2, rows), self.alpha), generator=generator)
            share = one / (one + two)
        share = torch.maximum(share, 1 - share)
        if self.training:
            self._random = generator.get_state()

        def mix(value: Tensor) -> Tensor:
            weight = share.to(device=value.device, dtype=value.dtype).view(-1, *[1] * (value.dim() - 1))
            return weight * value + (1 - weight) * value[order]

        return mix(inputs), mix(targets)

    def _interleaved(self, inputs: Inputs, n: int) -> Tensor:
        """Computes the logits of all rows in three forwards, each of every third row of each source."""
        (mixed,) = leaves(inputs)
        sources = torch.arange(len(mixed), device=mixed.device).split([n, *[(len(mixed) - n) // 2] * 2])
        parts = [part for k in range(3) if len(part := torch.cat([source[k::3] for source in sources]))]
        logits = self._joint_logits(take(inputs, parts[0]))
        with kept_running_statistics(self.model):
            logits += [self._joint_logits(take(inputs, part))[0] for part in parts[1:]]
        return torch.cat(logits)[torch.cat(parts).argsort()]

    def get_extra_state(self) -> dict[str, Any]:
        """Returns the step counter and the generator's state, which are part of ``state_dict()``."""
        return super().get_extra_state() | {"generator": self._random}

    def set_extra_state(self, state: Any) -> None:
        """Restores what `get_extra_state` returned, or raises a `StateError`; ``load_state_dict`` calls it."""
        super().set_extra_state(state)
        if not isinstance(state, Mapping) or not isinstance(state.get("generator"), Tensor):
            raise StateError("`state_dict` holds no generator for MixMatch: load the method's own.")
        self._random = state["generator"].cpu()

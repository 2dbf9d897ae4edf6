"""The mean loss of one batch as a function of the weights, around the model's current weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Tensor, nn

from gradconsist._consistency.probed import Probed
from gradconsist._consistency.trial import probe_model
from gradconsist._forward.batchnorm import BatchNormCalls, BatchNormPolicy
from gradconsist._forward.isolation import one_comparison
from gradconsist._forward.per_sample import PerSampleForward
from gradconsist._forward.sandbox import autocast_region, our_rules
from gradconsist._forward.statistics import take_statistics
from gradconsist._inputs.batch import check_inputs, leaves, map_leaves, take
from gradconsist._inputs.cross_entropy import cross_entropy
from gradconsist._inputs.options import check_choice, check_count
from gradconsist._inputs.pairs import Pairs, check_one_device, check_target
from gradconsist._inputs.parameters import Encoder, compared_parameters
from gradconsist._refusals.graphs import check_second_derivative
from gradconsist._refusals.models import check_model
from gradconsist.errors import ConfigError, NonFiniteError
from gradconsist.types import Inputs, LossFunction


class Landscape:
    """Computes L and its derivatives at and near the model's weights.

        L(w) = 1/B * sum over samples of loss_fn(model(x; w), t)

    w is one flat vector [P] of the selected parameters. BatchNorm's statistics are constants, computed at the model's
    own weights, and dropout is off. So this is the function whose per-sample gradients L_g compares. In eval mode the
    statistics are the running ones, and L is the loss of the deployed network.
    """

    def __init__(self, forward: PerSampleForward, own: Mapping[str, Tensor], batch: Pairs, chunk: int) -> None:
        self._forward, self._own, self._batch, self._chunk = forward, own, batch, chunk
        self._checked = False
        wide = reduce(torch.promote_types, (parameter.dtype for parameter in own.values()), torch.float32)
        self.weights = torch.cat([parameter.detach().reshape(-1).to(wide) for parameter in own.values()])

    def value(self, weights: Tensor) -> float:
        """Computes L at `weights` [P], which must be finite."""
        with torch.no_grad():
            value = sum(float(part) for part in self._parts(weights))
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the mean loss is {value}: check `inputs` and the parameters of `model`, or use a smaller `rho`."
            )
        return value

    def gradient(self, weights: Tensor) -> Tensor:
        """Computes dL/dw at `weights`, [P]."""
        total = torch.zeros_like(weights)
        with torch.enable_grad():
            at = weights.detach().clone().requires_grad_()
            for part in self._parts(at):
                total += torch.autograd.grad(part, at)[0]
        return total

    def hessian_product(self, vector: Tensor) -> Tensor:
        """Computes H v at the model's own weights, [P], as the derivative of ⟨dL/dw, v⟩."""
        total = torch.zeros_like(vector)
        with torch.enable_grad():
            at = self.weights.clone().requires_grad_()
            for part in self._parts(at):
                # Not a plain 1: if it had no graph, `once_differentiable` would silently cut the derivative.
                one = 1.0 + 0.0 * at[:1].sum()
                (gradient,) = torch.autograd.grad(part, at, one.to(part.dtype), create_graph=True)
                slope = (gradient * vector).sum()
                if not self._checked:
                    check_second_derivative(slope, [at], fused=False)
                    self._checked = True
                found = torch.autograd.grad(slope, at, allow_unused=True)[0]
                total += torch.zeros_like(vector) if found is None else found
        return total

    def _parts(self, weights: Tensor) -> Iterator[Tensor]:
        """Yields the terms of L, one per chunk."""
        pieces = weights.split([parameter.numel() for parameter in self._own.values()])
        replaced = {
            name: piece.view(parameter.shape).to(parameter.dtype)
            for (name, parameter), piece in zip(self._own.items(), pieces, strict=True)
        }
        size = len(self._batch)
        for start in range(0, size, self._chunk):
            rows = slice(start, start + self._chunk)
            losses = self._forward.losses(take(self._batch.weak, rows), self._batch.target[rows], replaced)
            yield losses.sum() / size


@contextmanager
def landscape(
    model: nn.Module,
    inputs: Inputs,
    target: Tensor,
    *,
    parameters: Encoder,
    loss_fn: LossFunction | None,
    batchnorm: BatchNormPolicy,
    chunk_size: int | None,
) -> Iterator[Landscape]:
    """Checks the arguments of `sharpness` and provides their landscape; the model runs under our rules in the block."""
    check_model(model)
    check_choice("batchnorm", batchnorm, ("auto", "batch", "running"))
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    if loss_fn is not None and not callable(loss_fn):
        raise ConfigError(f"`loss_fn` is {loss_fn!r}: pass a function (output, target) -> [B], or None.")
    own = compared_parameters(model, parameters)
    inputs = check_inputs("inputs", inputs)
    size = len(leaves(inputs)[0])
    inputs = map_leaves(lambda leaf: leaf.clone() if leaf.is_inference() else leaf, inputs)  # else no derivative
    target = check_target(target, size, loss_fn is None)
    device = check_one_device(model, {"inputs": leaves(inputs)[0], "target": target})
    pairs = Pairs(inputs, inputs, target, torch.ones(size, device=device), device)
    forward = PerSampleForward(
        model, loss_fn or cross_entropy, BatchNormCalls(batchnorm), autocast=autocast_region(device)
    )
    with one_comparison(), torch.inference_mode(False), our_rules(model, device, {"inputs": inputs}):
        take_statistics(forward, inputs, inputs)  # twice, which shows the calls that normalise over samples
        probe_model(forward, pairs, torch.arange(size, device=device), Probed())
        yield Landscape(forward, own, pairs, chunk_size or size)

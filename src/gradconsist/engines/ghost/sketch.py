"""Computes sketches of per-sample gradients from a layer's input and output gradient.

For the weight of a layer, read as a matrix, G = sum over positions of d_t a_t^T, and its Kronecker projection is

    L G R^T = sum over positions of (L d_t) (R a_t)^T

Both factors are projected before they are multiplied, so G is never formed. All other gradients are formed first and
then projected. A sketch is linear in the gradient, so the uses of one parameter add up, including cross terms.

Index letters: N samples, b maps per sample, g groups, T positions, k rows of a factor, [n, m] the weight as a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from gradconsist._inputs.precision import wide_dtype
from gradconsist.engines.ghost.conv import Convolution
from gradconsist.engines.ghost.layer_gradients import Seen
from gradconsist.engines.ghost.rules import ConvolutionWeight, EmbeddingWeight, LinearWeight, Rule
from gradconsist.engines.projection import Projector

_FACTORED = (LinearWeight, ConvolutionWeight, EmbeddingWeight)


def sketches(seen: Seen, parameters: Mapping[str, Tensor], projector: Projector) -> dict[str, Tensor]:
    """Computes the sketches of N samples, whose inner products add up.

    For "gaussian" one sketch [N, k] with the empty name; for "kronecker" names and sketches [N, k, k] of the projected
    weights. Parameters that the losses do not depend on are left out.
    """
    found: dict[str, Tensor] = {}
    start = 0
    for name, parameter in parameters.items():
        if projector.flat:
            gradient = seen.gradient(name)
            if gradient is not None:
                part = projector.sketch(gradient, start)
                found[""] = found[""] + part if found else part
        elif projector.shrinks(parameter.shape):
            parts = [of_use(use.rule, use.input, d, parameter.shape, start, projector) for use, d in seen.of(name)]
            parts += [projector.sketch(seen.rows[name], start)] if name in seen.rows else []
            if parts:
                found[name] = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        start += parameter.numel()
    return found


def route(name: str, seen: Seen, projector: Projector | None) -> str:
    """Describes how the sketch of a parameter is computed; empty if the losses do not depend on the parameter."""
    parts = []
    for use, _ in seen.of(name):
        factored = projector is not None and not projector.flat and isinstance(use.rule, _FACTORED)
        parts.append(f"{use.rule.name}, {'factors' if factored else 'gradient'} projected")
    parts += ["per-sample gradient, projected"] if name in seen.rows else []
    return " + ".join(dict.fromkeys(parts)) + (f" ({len(parts)} uses as one)" if len(parts) > 1 else "")


def of_use(rule: Rule, x: Tensor | None, d: Tensor, shape: torch.Size, start: int, projector: Projector) -> Tensor:
    """Computes the Kronecker sketch [N, k, k] of one use of a weight.

    `shape` is the weight's, which begins at `start` in the flat vector of all parameters.
    """
    if not isinstance(rule, _FACTORED):
        return projector.sketch(rule.gradients(x, d), start)
    left, right = projector.factors(shape, start, wide_dtype(d), d.device)
    if isinstance(rule, LinearWeight):
        a, d = rule.rows(x, d)
        return (d.to(left.dtype) @ left.T).transpose(1, 2) @ (a.to(left.dtype) @ right.T)
    if isinstance(rule, EmbeddingWeight):
        ids, d = rule.positions(x, d)
        return left.T[ids].transpose(1, 2) @ (d @ right.T)
    return _convolution(rule, x, d, left, right)


def _convolution(rule: ConvolutionWeight, x: Tensor | None, d: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Applies R to the patches of one side, as a convolution with k outputs, and L to the channels of the other side.

    The weight [n, m / kernel, kernel] of a convolution has the gradient of <d, conv(x, W)>. That of a transposed
    convolution has the gradient of <x, conv(d, W)>, so inputs and output gradients change places.
    """
    if x is None:
        raise ValueError("this rule needs the layer's input")
    samples, maps = x.shape[:2]
    groups, k = rule.geometry.groups, len(left)
    whole, patched = (x.flatten(0, 1), d) if rule.geometry.transposed else (d, x.flatten(0, 1))
    plain = replace(rule.geometry, transposed=False, output_padding=(), groups=1)
    # [N b, channels, ...] -> [N b g, channels of a group, ...]
    by_group = patched.to(left.dtype).reshape(-1, rule.shape[1], *patched.shape[2:])
    patches = Convolution.apply(by_group, right.reshape(k, *rule.shape[1:]), plain)
    for axis, size in enumerate(whole.shape[2:], 2):  # an output padding beyond the stride adds positions
        patches = patches.narrow(axis, 0, size)
    channels = left.view(k, groups, -1).transpose(0, 1) @ whole.to(left.dtype).reshape(
        len(whole), groups, left.shape[1] // groups, -1
    )  # [N b, g, k, T]
    products = channels @ patches.reshape(len(whole), groups, k, -1).transpose(2, 3)
    return products.view(samples, maps * groups, k, k).sum(1)

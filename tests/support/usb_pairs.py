"""The pairs of semilearn's nine algorithms by their papers' formulas, from forwards of our own on copies of a model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]  # target, weight


def _probabilities(model: nn.Module, *parts: Tensor) -> list[Tensor]:
    """Softmax of one joint forward in train mode, which leaves `model` alone."""
    with torch.no_grad():
        logits = copy.deepcopy(model)(torch.cat(parts))["logits"]
    return [each.softmax(dim=1) for each in logits.split([len(part) for part in parts])]


def expected(algorithm: Any, batch: dict[str, Tensor]) -> Pair:
    """Target and weight of the pairs of the next step of `algorithm`, which stays as it is."""
    weak, strong = batch["x_ulb_w"], batch["x_ulb_s"]
    model, hooks = algorithm.model, algorithm.hooks_dict
    ones = torch.ones(len(weak), dtype=torch.float64)
    ramp = ones * min(1.0, algorithm.it / (0.4 * algorithm.num_train_iter))
    name = algorithm.algorithm
    if name == "meanteacher":
        teacher = copy.deepcopy(model)
        teacher.load_state_dict(algorithm.ema.shadow, strict=False)
        return _probabilities(teacher, weak)[0], ramp
    if name == "pimodel":
        return (_probabilities(model, weak)[0] + _probabilities(model, strong)[0]).argmax(1), ramp
    if name == "mixmatch":
        squared = (_probabilities(model, weak)[0] / 2 + _probabilities(model, strong)[0] / 2) ** 2  # T = 1/2
        return squared / squared.sum(1, keepdim=True), ones
    if name == "pseudolabel":
        confidence, label = _probabilities(model, weak)[0].max(1)
        return label, (confidence >= algorithm.p_cutoff).double()
    _, p, _ = _probabilities(model, batch["x_lb"], weak, strong)
    confidence, label = p.max(1)
    passed = (confidence >= getattr(algorithm, "p_cutoff", 0.0)).double()
    if name == "fixmatch":
        return label, passed
    if name == "uda":  # T = 0.4
        powers = p**2.5
        return powers / powers.sum(1, keepdim=True), passed
    hook = hooks["MaskingHook"]
    if name == "flexmatch":
        learned = hook.classwise_acc.double()[label]
        return label, (confidence >= algorithm.p_cutoff * learned / (2 - learned)).double()
    m = 0.999
    if name == "freematch":
        level = m * hook.time_p + (1 - m) * confidence.mean()
        share = m * hook.p_model + (1 - m) * p.mean(0)
        return label, (confidence >= level * (share / share.max())[label]).double()
    assert name == "softmatch"
    seen = hooks["DistAlignHook"].p_model
    seen = p.mean(0) if seen is None else m * seen + (1 - m) * p.mean(0)
    aligned = p * (0.1 + 1e-6) / (seen + 1e-6)
    confidence = (aligned / aligned.sum(1, keepdim=True)).max(1).values
    mean = m * hook.prob_max_mu_t + (1 - m) * confidence.mean()
    variance = m * hook.prob_max_var_t + (1 - m) * confidence.var()
    return label, torch.exp(-((confidence - mean).clamp(max=0) ** 2) / (2 * variance / 4))

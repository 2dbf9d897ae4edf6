"""Laws at the two ends of the term: logits sharpened up to saturation, and lambda = 0.

P14, P15 of the test plan.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from gradconsist import GGCRWrapper, GradientConsistencyLoss, SSLBatch
from gradconsist.methods import FixMatch
from support import compare, training
from support.generated import Plan, apart, outcome, plans
from support.laws import law, same, within

MIN_NORM = 1e-8
EPS = torch.finfo(torch.float32).eps


def sharp_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-log softmax(z)[t] in float64 without 1 - p, which a confident sample would turn into rounding."""
    margin = logits - logits.gather(1, target[:, None])
    others = margin.masked_fill(torch.arange(logits.shape[1]) == target[:, None], -torch.inf)
    return torch.logaddexp(torch.zeros(len(target), dtype=logits.dtype), torch.logsumexp(others, 1))


@law(
    "P14",
    plan=plans(soft=False, body=st.sampled_from(["mlp", "conv1d", "conv2d", "tokens"])),
    sharpness=st.floats(0, 3),
    fused=st.booleans(),
)
def test_p14_saturation(engine: str, plan: Plan, sharpness: float, fused: bool) -> None:
    """Float32 is float64, up to the rounding of the logits, however confident the model; or the pair is degenerate.

    The targets are the weak view's own classes, as a method would choose them; the logits grow by 10^sharpness.
    """
    p = plan.problem(torch.float32)
    with torch.no_grad():
        for parameter in p.model[-1].parameters():
            parameter.mul_(10**sharpness)
    p.model.eval()
    with torch.no_grad():
        logits = torch.stack([p.model(p.weak), p.model(p.strong)])
        p.target[:] = logits[0].argmax(1)
    verdict = p.judge(loss_fn=sharp_cross_entropy).verdict()
    rounding = EPS * (1 + float(logits.abs().max()))
    for norm in (verdict.norm_weak, verdict.norm_strong):
        assume(not bool(((norm / MIN_NORM).log().abs() < 100 * rounding).any()))  # on the border, rounding decides
    found = outcome(p, engine=engine, fused=fused, min_norm=MIN_NORM)
    assert bool(torch.isfinite(found.loss))
    assert bool(torch.isfinite(found.gradient).all())
    assert torch.equal(found.degenerate, verdict.degenerate)
    within("cosine / rounding of the logits", compare.cosine_error(found.cosine, verdict.cosine) / rounding, 50.0)
    within("gradient / rounding of the logits", apart(found.gradient, verdict.flat) / rounding, 5000.0)


OFF = st.sampled_from(
    [
        {"weight": 0.0, "warmup_steps": 0},
        {"weight": 0.0, "warmup_steps": 0, "every": 2, "ramp_steps": 3},
        {"weight": 0.7, "warmup_steps": 3},
        {"weight": 0.7, "warmup_steps": 3, "ramp_steps": 5, "gate": "all"},
    ]
)


@law(
    "P15",
    options=OFF,
    joint=st.booleans(),
    threshold=st.sampled_from([0.0, 0.37, 1.0]),
    dropout=st.sampled_from([0.0, 0.3]),
    loss=st.fixed_dictionaries(
        {},
        optional={
            "max_pairs": st.integers(1, 3),
            "dropout": st.just("on"),
            "batchnorm": st.sampled_from(["observed", "running"]),
            "fused": st.booleans(),
        },
    ),
    seed=st.integers(0, 10**6),
)
def test_p15_lambda_zero(
    engine: str, options: dict[str, Any], joint: bool, threshold: float, dropout: float, loss: dict[str, Any], seed: int
) -> None:
    """Bit for bit the method alone over three steps: loss, gradients, parameters, buffers, and the random stream."""
    data = [SSLBatch(*batch) for batch in training.batches(3)]
    logs = []
    for wrapped in (False, True):
        method = FixMatch(training.network(dropout=dropout, seed=seed % 7), threshold=threshold, joint=joint)
        gc = GradientConsistencyLoss(method.model, engine=engine, **loss)
        before = gc.state_dict()["generator"]
        step = GGCRWrapper(method, gc, **options) if wrapped else method
        optimizer = torch.optim.SGD(step.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            log = training.train(lambda batch, step=step: step(batch).loss, method.model, data, optimizer)
            drawn = torch.rand(3)
        logs.append((log, drawn, method.step))
        assert gc.last is None
        same("the loss's own generator", gc.state_dict()["generator"], before)
    same("the next random numbers", logs[1][1], logs[0][1])
    assert logs[0][0] == logs[1][0]
    assert logs[0][2] == logs[1][2] == len(data)

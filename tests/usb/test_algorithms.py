"""The nine algorithms of semilearn with the term, against themselves without it and against the oracle."""

from __future__ import annotations

import copy
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from gradconsist import GradientConsistencyLoss, ViewPair
from gradconsist.adapters.usb import attach
from gradconsist.errors import ConfigError, LossContractError
from support import usb
from support.compare import relative
from support.oracle import Judge
from support.usb_pairs import expected

WEIGHT = 0.1


class Network(nn.Module):
    """A small network with BatchNorm that returns what semilearn's do, in float64."""

    def __init__(self, num_classes: int, **_: Any) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten())
        self.classifier = nn.Linear(54, num_classes)
        self.double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.features(x)
        return {"logits": self.classifier(features), "feat": features}


def batch_of(name: str, step: int) -> dict[str, Tensor]:
    batch = {key: value.double() if value.is_floating_point() else value for key, value in usb.batch_of(step).items()}
    if name == "pseudolabel":  # its paper has one view
        batch["x_ulb_s"] = batch["x_ulb_w"] + 0.5 * torch.randn_like(batch["x_ulb_w"])
    return batch


def build(name: str, **config: Any) -> Any:
    options = {"network": Network, "p_cutoff": 0.27, "lr": 0.3, "use_quantile": False, "ema_p": 0.999} | config
    algorithm = usb.build(name, **options)
    hook = algorithm.hooks_dict.get("MaskingHook")  # as if it had learned for a while, so that masks are mixed
    if name == "flexmatch":
        hook.selected_label = torch.cat([torch.arange(10).repeat(3), torch.arange(5).repeat(7)])[:64]
    elif name == "freematch":
        hook.time_p = torch.tensor(0.27)
    elif name == "softmatch":
        hook.prob_max_mu_t, hook.prob_max_var_t = torch.tensor([0.4, 0.02]).double()
    return algorithm


def one_step(algorithm: Any, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    torch.manual_seed(step)
    numpy.random.seed(step)
    return usb.step(algorithm, batch_of(algorithm.algorithm, step))


def state_of(algorithm: Any) -> list[Tensor]:
    """Everything that a step changes."""
    hooks = [
        vars(hook)[name].clone()
        for hook in algorithm.hooks_dict.values()
        for name in sorted(vars(hook))
        if isinstance(vars(hook)[name], Tensor)
    ]
    momenta = [state["momentum_buffer"] for state in algorithm.optimizer.state.values()]
    numbers = [torch.tensor(numpy.random.get_state()[1].astype("int64")), torch.get_rng_state()]
    models = [*algorithm.model.state_dict().values(), *algorithm.ema_model.state_dict().values()]
    return [*models, *algorithm.ema.shadow.values(), *momenta, *hooks, *numbers]


@pytest.mark.parametrize("options", [{"weight": 0.0, "warmup_steps": 0}, {"weight": 0.1, "warmup_steps": 9}], ids=str)
@pytest.mark.parametrize("name", usb.ALGORITHMS)
def test_bitwise_the_algorithm_where_the_term_is_not_due(name: str, options: dict[str, Any]) -> None:
    plain, attached = build(name), build(name)
    attach(attached, GradientConsistencyLoss(attached.model), **options)
    for step in range(3):
        out, logs = one_step(plain, step)
        states = state_of(plain)
        found, found_logs = one_step(attached, step)
        assert torch.equal(found["loss"], out["loss"])
        assert found_logs["train/ggcr_weight"] == 0.0
        assert {key: found_logs[key] for key in logs} == logs
        for mine, other in zip(state_of(attached), states, strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("name", usb.ALGORITHMS)
def test_the_term_is_that_of_the_algorithms_own_pairs(name: str) -> None:
    plain, attached = build(name), build(name)
    attach(attached, GradientConsistencyLoss(attached.model), weight=WEIGHT, warmup_steps=4)
    for step in range(4):
        one_step(plain, step)
        one_step(attached, step)
    batch = batch_of(name, 4)
    target, weight = expected(plain, batch)
    assert name == "mixmatch" or 0 < weight.sum() < len(weight)  # else the mask would not be tested
    verdict = Judge(plain.model, batch["x_ulb_w"], batch["x_ulb_s"], target, weight).verdict()
    terms = []
    for algorithm in (plain, attached):
        numpy.random.seed(4)
        torch.manual_seed(4)
        with usb.without_gpu():
            out, logs = algorithm.train_step(**algorithm.process_batch(**batch))
        gradients = torch.autograd.grad(out["loss"], list(algorithm.model.parameters()))
        terms.append((out["loss"].detach(), torch.cat([g.reshape(-1) for g in gradients]), logs))
    (base, base_gradient, _), (total, total_gradient, logs) = terms
    assert float((total - base) / WEIGHT) == pytest.approx(float(verdict.loss), rel=1e-8)
    assert relative((total_gradient - base_gradient) / WEIGHT, verdict.flat) < 1e-8
    assert logs["train/ggcr_cosine"] == pytest.approx(float(verdict.cosine[weight > 0].mean()), rel=1e-8)
    assert logs["train/ggcr_weight"] == WEIGHT


@pytest.mark.parametrize("name", usb.ALGORITHMS)
def test_a_step_calls_each_hook_once_and_the_model_moves(name: str) -> None:
    algorithm = build(name)
    counts: dict[str, int] = {}
    own = algorithm.call_hook

    def counted(what: str, hook: str | None = None, *args: Any, **kwargs: Any) -> Any:
        counts[what] = counts.get(what, 0) + 1
        return own(what, hook, *args, **kwargs)

    algorithm.call_hook = counted
    attach(algorithm, GradientConsistencyLoss(algorithm.model), warmup_steps=0)
    before = [parameter.detach().clone() for parameter in algorithm.model.parameters()]
    for step in range(2):
        one_step(algorithm, step)
    assert set(counts.values()) == {2}
    assert all(not torch.equal(new, old) for new, old in zip(algorithm.model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["fixmatch", "flexmatch"])
def test_soft_labels_are_sharpened(name: str) -> None:
    """semilearn passes the weak view's own prediction on, against which every gradient is zero."""
    algorithm = build(name, hard_label=False, p_cutoff=0.0)
    attach(algorithm, GradientConsistencyLoss(algorithm.model), warmup_steps=0)
    batch = batch_of(name, 0)
    _, p, _ = copy.deepcopy(algorithm.model)(torch.cat([batch[k] for k in ("x_lb", "x_ulb_w", "x_ulb_s")]))[
        "logits"
    ].detach().softmax(1).split([4, 8, 8])  # fmt: skip
    target = p**2 / (p**2).sum(1, keepdim=True)  # T = 1/2
    verdict = Judge(algorithm.model, batch["x_ulb_w"], batch["x_ulb_s"], target).verdict()
    _, logs = one_step_on(algorithm, batch)
    assert logs["train/ggcr_loss"] == pytest.approx(float(verdict.loss), rel=1e-8)
    assert logs["train/ggcr_degenerate"] == 0


def one_step_on(algorithm: Any, batch: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    with usb.without_gpu():
        result: tuple[dict[str, Any], dict[str, Any]] = algorithm.train_step(**algorithm.process_batch(**batch))
    return result


def test_pseudolabel_asks_for_the_second_view() -> None:
    algorithm = build("pseudolabel")
    handle = attach(algorithm, GradientConsistencyLoss(algorithm.model), warmup_steps=100)
    one_view = {key: value for key, value in batch_of("pseudolabel", 0).items() if key != "x_ulb_s"}
    with pytest.raises(LossContractError, match=r"the batch has no x_ulb_s.*alg='fixmatch'"):
        one_step_on(algorithm, one_view)
    handle.detach()
    attach(algorithm, GradientConsistencyLoss(algorithm.model), weight=0.0)
    one_step_on(algorithm, one_view)  # nothing is compared, and nothing is asked for


def test_another_algorithm_is_refused_by_name_or_gets_its_pairs() -> None:
    algorithm = build("adamatch", ema_p=0.999)
    consistency = GradientConsistencyLoss(algorithm.model)
    with pytest.raises(ConfigError, match=r"`algorithm` is a AdaMatch.*FixMatch.*`pair_fn"):
        attach(algorithm, consistency)

    def pair_of(args: Any, kwargs: dict[str, Tensor], output: Any) -> ViewPair:
        call = handle.calls[0]
        return ViewPair(kwargs["x_ulb_w"], kwargs["x_ulb_s"], call.targets, call.mask)

    handle = attach(algorithm, consistency, pair_fn=pair_of, warmup_steps=0)
    _, logs = one_step_on(algorithm, batch_of("adamatch", 0))
    assert logs["train/ggcr_pairs"] == round(8 * logs["train/util_ratio"]) > 0
    assert handle.calls == []


@pytest.mark.parametrize("use_cat", [True, False])
def test_observed_statistics(use_cat: bool) -> None:
    """`use_cat` decides whether the views go through one forward with the labeled images, or through one each."""
    algorithm = build("fixmatch", use_cat=use_cat, p_cutoff=0.0)
    attach(algorithm, GradientConsistencyLoss(algorithm.model, batchnorm="observed"), warmup_steps=0)
    batch = batch_of("fixmatch", 0)
    views = batch["x_ulb_w"], batch["x_ulb_s"]
    target, weight = expected(algorithm, batch)
    joint = {"observed": torch.cat([batch["x_lb"], *views])}
    apart = {"observed": views[0], "observed_strong": views[1]}
    verdict = Judge(algorithm.model, *views, target, weight, **(joint if use_cat else apart)).verdict()
    assert one_step_on(algorithm, batch)[1]["train/ggcr_loss"] == pytest.approx(float(verdict.loss), rel=1e-8)


def test_mixed_precision_is_the_algorithms_own() -> None:
    """Its forward runs in bfloat16, and the term in the parameters' precision, with the algorithm's own labels."""
    algorithm = usb.build("fixmatch", network=lambda **config: Network(**config).float(), p_cutoff=0.0)
    algorithm.amp_cm = lambda: torch.autocast("cpu", torch.bfloat16)
    seen: list[ViewPair] = []
    consistency = GradientConsistencyLoss(algorithm.model)
    handle = attach(algorithm, consistency, warmup_steps=0)
    evaluate = consistency.evaluate
    consistency.evaluate = lambda *args, **kwargs: (seen.append(ViewPair(*args)), evaluate(*args, **kwargs))[1]  # type: ignore[method-assign]
    before = copy.deepcopy(algorithm.model)
    out, logs = usb.step(algorithm, usb.batch_of(0))
    assert out["loss"].dtype == torch.float32
    verdict = Judge(before, *seen[0]).verdict()
    assert logs["train/ggcr_loss"] == pytest.approx(float(verdict.loss), abs=1e-5)
    assert handle.wrapper.step == 1


class Words(nn.Module):
    """A text network as semilearn's are: one argument, a dict."""

    def __init__(self, num_classes: int, **_: Any) -> None:
        super().__init__()
        self.embedding, self.classifier = nn.Embedding(20, 8), nn.Linear(8, num_classes)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = x["attention_mask"].unsqueeze(2)
        features = (self.embedding(x["input_ids"]) * mask).sum(1) / mask.sum(1)
        return {"logits": self.classifier(features), "feat": features}


class ByKeyword(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(inputs)


def test_text_by_a_module_around_the_model() -> None:
    algorithm = usb.build("fixmatch", network=Words, use_cat=False, p_cutoff=0.0)

    def text(count: int) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(20, (count, 5)), "attention_mask": torch.ones(count, 5)}

    batch = {"x_lb": text(4), "y_lb": torch.arange(4), "x_ulb_w": text(6), "x_ulb_s": text(6)}
    handle = attach(algorithm, GradientConsistencyLoss(algorithm.model), warmup_steps=0)
    with pytest.raises(LossContractError, match=r"the views are dicts.*forward\(self, \*\*inputs\)"):
        one_step_on(algorithm, batch)
    handle.detach()
    model = ByKeyword(algorithm.model)
    attach(algorithm, GradientConsistencyLoss(model), warmup_steps=0)
    target = algorithm.model(batch["x_ulb_w"])["logits"].argmax(1)
    verdict = Judge(model, batch["x_ulb_w"], batch["x_ulb_s"], target).verdict()
    assert one_step_on(algorithm, batch)[1]["train/ggcr_loss"] == pytest.approx(float(verdict.loss), abs=1e-5)

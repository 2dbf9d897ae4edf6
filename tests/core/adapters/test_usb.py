"""The adapter's own logic, on a stand-in with semilearn's attributes; tests/usb holds it against the real package."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradconsist import GradientConsistencyLoss, ViewPair
from gradconsist.adapters.usb import UsbHandle, attach
from gradconsist.errors import ConfigError, LossContractError, StateError
from support.oracle import Judge


class Base:
    """What `AlgorithmBase` has and the adapter uses."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.consistency_loss: Callable[..., Tensor] = self.weighted
        self.it = 0
        self.failing = False

    @staticmethod
    def weighted(logits: Tensor, targets: Tensor, name: str = "ce", mask: Tensor | None = None) -> Tensor:
        losses = F.cross_entropy(logits, targets, reduction="none")
        return (losses if mask is None else losses * mask).mean()

    def compute_prob(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=-1)

    def get_save_dict(self) -> dict[str, Any]:
        return {"it": self.it + 1}

    def load_model(self, load_path: dict[str, Any]) -> dict[str, Any]:
        self.it = load_path["it"]
        return load_path


class FixMatch(Base):
    def train_step(self, x_lb: Tensor, y_lb: Tensor, x_ulb_w: Tensor, x_ulb_s: Tensor) -> Any:
        p = self.compute_prob(self.model(x_ulb_w).detach())
        if self.failing:
            raise RuntimeError("out of data")
        confidence, label = p.max(1)
        unsupervised = self.consistency_loss(self.model(x_ulb_s), label, "ce", mask=(confidence > 0.4).float())
        return {"loss": F.cross_entropy(self.model(x_lb), y_lb) + unsupervised}, {"train/unsup_loss": 1.0}


class PseudoLabel(Base):
    def train_step(self, x_lb: Tensor, y_lb: Tensor, x_ulb_w: Tensor) -> Any:
        logits = self.model(x_ulb_w)
        loss = self.consistency_loss(logits, logits.detach().argmax(1), "ce", torch.ones(len(logits)))
        return {"loss": F.cross_entropy(self.model(x_lb), y_lb) + loss}, {}


class MixMatch(Base):
    T = 0.5

    def train_step(self, x_lb: Tensor, y_lb: Tensor, x_ulb_w: Tensor, x_ulb_s: Tensor) -> Any:
        one, two = (self.compute_prob(self.model(view).detach()) for view in (x_ulb_w, x_ulb_s))
        unsupervised = self.consistency_loss(self.model(x_ulb_s), (one + two) / 2, "ce")
        return {"loss": F.cross_entropy(self.model(x_lb), y_lb) + unsupervised}, {}


class MyFixMatch(FixMatch):
    """Known by what it derives from."""


class Twice(FixMatch):
    def train_step(self, x_lb: Tensor, y_lb: Tensor, x_ulb_w: Tensor, x_ulb_s: Tensor) -> Any:
        self.consistency_loss(self.model(x_ulb_s), y_lb[:1].expand(len(x_ulb_s)))
        return super().train_step(x_lb, y_lb, x_ulb_w, x_ulb_s)


class Loose(Base):
    """Another algorithm, which takes whatever the batch has."""

    def train_step(self, x_lb: Tensor, **rest: Tensor) -> Any:
        return {"loss": self.model(x_lb).square().mean()}, {}


BATCH = {
    "x_lb": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "y_lb": torch.tensor([0, 1, 2]),
    "x_ulb_w": torch.randn(5, 4, generator=torch.Generator().manual_seed(1)),
    "x_ulb_s": torch.randn(5, 4, generator=torch.Generator().manual_seed(2)),
}


def attached(algorithm: Any, **options: Any) -> UsbHandle:
    return attach(algorithm, GradientConsistencyLoss(algorithm.model), **{"warmup_steps": 0, **options})


def process_batch(algorithm: Any, **batch: Any) -> dict[str, Any]:
    """semilearn's filter: what the signature of `train_step` names."""
    return {name: value for name, value in batch.items() if name in inspect.signature(algorithm.train_step).parameters}


def test_the_loss_gains_the_weighted_term() -> None:
    algorithm = MyFixMatch()
    base, _ = algorithm.train_step(**BATCH)
    attached(algorithm, weight=0.3)
    out, logs = algorithm.train_step(**process_batch(algorithm, **BATCH, idx_ulb=torch.arange(5)))
    confidence, label = algorithm.model(BATCH["x_ulb_w"]).softmax(1).max(1)
    mask = (confidence > 0.4).float()
    assert 0 < mask.sum() < 5
    term = Judge(algorithm.model, BATCH["x_ulb_w"], BATCH["x_ulb_s"], label, mask).value()
    assert float(out["loss"].detach() - base["loss"].detach()) == pytest.approx(0.3 * term, abs=1e-6)
    assert logs["train/ggcr_loss"] == pytest.approx(term, abs=1e-5)
    assert logs["train/ggcr_pairs"] == mask.sum()
    assert logs["train/unsup_loss"] == 1.0
    assert all(isinstance(value, float) for value in logs.values())


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_close_views_of_mixmatch_agree(temperature: float) -> None:
    """Also where nothing is sharpened, and the mean of both predictions would make their residuals opposite."""
    algorithm = MixMatch()
    algorithm.T = temperature
    attached(algorithm)
    close = BATCH["x_ulb_w"] + 1e-3 * BATCH["x_ulb_s"]
    assert algorithm.train_step(**{**BATCH, "x_ulb_s": close})[1]["train/ggcr_cosine"] > 0.99


def test_detach_leaves_the_object_as_it_was() -> None:
    algorithm = FixMatch()
    algorithm.get_save_dict = lambda: {"it": 7}  # type: ignore[method-assign]  # the user's own, on the instance
    before = dict(vars(algorithm))
    handle = attached(algorithm)
    algorithm.train_step(**BATCH)
    assert dict(vars(algorithm)) != before
    handle.detach()
    assert dict(vars(algorithm)) == before
    algorithm.get_save_dict = lambda: {"it": 8}  # type: ignore[method-assign]
    handle.detach()  # a second time, nothing
    assert algorithm.get_save_dict() == {"it": 8}
    attached(algorithm).detach()


def test_one_term_at_a_time() -> None:
    algorithm = FixMatch()
    handle = attached(algorithm)
    with pytest.raises(ConfigError, match=r"`algorithm` has a term already: detach\(\)"):
        attached(algorithm)
    handle.detach()
    attached(algorithm)
    ours = algorithm.train_step
    algorithm.train_step = lambda **batch: ours(**batch)  # type: ignore[method-assign]  # the other two are ours still
    with pytest.raises(ConfigError, match=r"`algorithm` has a term already: detach\(\)"):
        attached(algorithm)


def test_a_wrapper_over_ours_must_go_first() -> None:
    algorithm = FixMatch()
    handle = attached(algorithm)
    ours = algorithm.train_step
    algorithm.train_step = lambda **batch: ours(**batch)  # type: ignore[method-assign]
    algorithm.train_step(**BATCH)
    with pytest.raises(StateError, match=r"`algorithm.train_step` was replaced after attach"):
        handle.detach()
    algorithm.train_step = ours  # type: ignore[method-assign]
    handle.detach()


def test_an_error_inside_leaves_no_trace() -> None:
    algorithm = FixMatch()
    handle = attached(algorithm)
    before = dict(vars(algorithm))
    algorithm.failing = True
    with pytest.raises(RuntimeError, match="out of data"):
        algorithm.train_step(**BATCH)
    algorithm.failing = False
    assert dict(vars(algorithm)) == before
    assert handle.wrapper.step == 0
    assert handle.calls == []
    with pytest.raises(TypeError, match="missing a required argument: 'x_lb'"):
        algorithm.train_step(x_ulb_w=BATCH["x_ulb_w"], x_ulb_s=BATCH["x_ulb_s"])
    algorithm.train_step(*BATCH.values())
    assert handle.wrapper.step == 1


def test_the_second_view_joins_the_signature_and_not_the_call() -> None:
    algorithm = PseudoLabel()
    own = inspect.signature(algorithm.train_step)
    handle = attached(algorithm)
    assert list(inspect.signature(algorithm.train_step).parameters) == [*own.parameters, "x_ulb_s"]
    _, logs = algorithm.train_step(**process_batch(algorithm, **BATCH))
    assert logs["train/ggcr_pairs"] == 5
    with pytest.raises(LossContractError, match="the batch has no x_ulb_s, but gradient consistency compares two"):
        algorithm.train_step(BATCH["x_lb"], BATCH["y_lb"], BATCH["x_ulb_w"])
    handle.detach()
    assert inspect.signature(algorithm.train_step) == own


def test_unknown_algorithms_need_pairs() -> None:
    algorithm = Loose()
    with pytest.raises(ConfigError, match=r"`algorithm` is a Loose, whose views.*give `pair_fn"):
        attached(algorithm)
    pair = ViewPair(BATCH["x_ulb_w"], BATCH["x_ulb_s"], torch.tensor([0, 1, 2, 0, 1]))
    attached(algorithm, pair_fn=lambda args, kwargs, output: pair if output[0]["loss"] > 0 else None)
    assert algorithm.train_step(**process_batch(algorithm, **BATCH))[1]["train/ggcr_pairs"] == 5


def test_other_objects_models_and_options_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"`algorithm` is a Linear without train_step.*semilearn.get_algorithm"):
        attach(nn.Linear(2, 2), GradientConsistencyLoss(nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match=r"`consistency` compares a model that `algorithm` does not train"):
        attach(FixMatch(), GradientConsistencyLoss(nn.Linear(4, 3)))
    with pytest.raises(ConfigError, match=r"`every` is 0"):
        attached(FixMatch(), every=0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'warmup'"):
        attached(FixMatch(), warmup=3)
    algorithm = FixMatch()
    attached(algorithm)
    algorithm.model = nn.Linear(4, 3)
    with pytest.raises(ConfigError, match=r"`consistency` compares a model that `algorithm` does not train"):
        algorithm.train_step(**BATCH)


def test_unexpected_steps_are_named() -> None:
    algorithm: Any = Twice()
    attached(algorithm)
    with pytest.raises(LossContractError, match=r"a step of Twice called `consistency_loss` 2 times.*`pair_fn"):
        algorithm.train_step(**BATCH)
    algorithm = FixMatch()
    algorithm.train_step = lambda x_lb, y_lb, x_ulb_w, x_ulb_s: {"loss": x_lb.sum()}
    attached(algorithm)
    with pytest.raises(LossContractError, match=r"`train_step` of FixMatch returned dict.*\(out_dict, log_dict\)"):
        algorithm.train_step(**BATCH)


def test_the_schedule_is_in_the_checkpoint() -> None:
    algorithm = FixMatch()
    algorithm.it = 40
    handle = attached(algorithm, warmup_steps=42)
    weights = []
    for _ in range(3):
        weights.append(algorithm.train_step(**BATCH)[1]["train/ggcr_weight"])
        algorithm.it += 1
    assert weights == [0.0, 0.0, 0.1]
    saved = algorithm.get_save_dict()
    assert saved["gradconsist"]["step"] == 43
    other = FixMatch()
    fresh = attached(other)
    other.load_model(saved)
    assert fresh.wrapper.step == 43
    other.load_model({"it": 9})
    assert fresh.wrapper.step == 9
    fresh.load_state_dict(handle.state_dict())
    assert fresh.wrapper.step == 43
    with pytest.raises(StateError, match="load the wrapper's own"):
        fresh.load_state_dict({"it": 3})


def test_canaries() -> None:
    algorithm = FixMatch()
    algorithm.consistency_loss = lambda logits, *rest, **options: algorithm.weighted(logits.detach(), *rest, **options)
    handle = attached(algorithm, weight=0.0)
    with pytest.raises(LossContractError, match="the unlabeled loss of FixMatch has no gradient"):
        algorithm.train_step(**BATCH)
    handle.detach()
    del algorithm.consistency_loss
    algorithm.consistency_loss = algorithm.weighted
    attached(algorithm, weight=0.0)
    for _ in range(10):
        algorithm.train_step(**BATCH)
    with pytest.warns(RuntimeWarning, match="the model has not changed in 10 steps: .*ParamUpdateHook is never called"):
        algorithm.train_step(**BATCH)
    algorithm.train_step(**BATCH)  # told once


def test_a_model_that_moves_is_not_told() -> None:
    algorithm = FixMatch()
    attached(algorithm)
    optimizer = torch.optim.SGD(algorithm.model.parameters(), lr=0.1)
    for step in range(15):
        algorithm.train_step(**BATCH)[0]["loss"].backward()
        if step % 8 == 7:
            optimizer.step()

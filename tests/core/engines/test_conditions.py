"""Conditions that depend on data: every sample gets the answer that it would have got alone, in as few batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradconsist import GradientConsistencyLoss
from gradconsist._forward.batchnorm import STRONG, WEAK
from gradconsist.engines import GhostEngine, LoopEngine, VmapEngine, base
from gradconsist.engines.conditions import SamplesDiffer, in_groups
from gradconsist.engines.ghost import engine as ghost
from support import compare
from support.models import Layers
from support.oracle import judge

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch, of vmap
ENGINES = pytest.mark.parametrize("engine", [GhostEngine(), VmapEngine()], ids=["ghost", "vmap"])
TOKENS = 4


class Text(nn.Module):
    """A small text model whose middle is any function of (model, states [T, 6], mask [T])."""

    def __init__(self, function: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.embed, self.inner, self.other, self.head = (
            nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3),
        )  # fmt: skip

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = [self.function(self, h, m) for h, m in zip(self.embed(ids).unbind(), mask.unbind(), strict=True)]
        return self.head(torch.stack(states))


def _as_transformers_do(model: Any, h: Tensor, mask: Tensor) -> Tensor:
    h = torch.tanh(model.inner(h))
    weights = h.sum(-1)
    if not mask.all():
        weights = weights.masked_fill(~mask, -torch.inf)
    return weights.softmax(-1) @ h


def _two_ways(model: Any, h: Tensor, mask: Tensor) -> Tensor:
    h = model.inner(h).tanh() if mask.sum() > 2 else model.other(h).cos()
    return h.sum(0) * (2.0 if (h * h).mean() > 0.3 else 0.5)


def _cut(model: Any, h: Tensor, mask: Tensor) -> Tensor:
    length = mask.sum()
    return model.inner(h[:length]).tanh().mean(0) + model.other(h[: int(length)]).sum(0)


FUNCTIONS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "transformers": _as_transformers_do,
    "two_ways": _two_ways,
    "a cut": _cut,
    "item": lambda model, h, mask: model.inner(h).tanh().sum(0) * mask.sum().item(),
    "float of each sample": lambda model, h, mask: model.inner(h).tanh().sum(0) * float(h.detach().max()),
    "tolist": lambda model, h, mask: sum(model.inner(x) for x, m in zip(h, mask.tolist(), strict=True) if m),
    "contains": lambda model, h, mask: model.inner(h).sum(0) if False in mask else model.other(h).sum(0),
    "equal": lambda model, h, mask: (model.inner if torch.equal(mask, ~mask.flip(0)) else model.other)(h).sum(0),
    "range": lambda model, h, mask: sum(model.inner(h[t]).tanh() for t in range(mask.sum())),
    "requires_grad_": lambda model, h, mask: model.inner(h.requires_grad_()).tanh().sum(0),
    "arange": lambda model, h, mask: model.inner(h[torch.arange(mask.sum())]).tanh().sum(0),
}
# What depends on data in its shape needs a graph below vmap, which the ghost engine alone has.
SHAPES: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "boolean index": lambda model, h, mask: model.inner(h[mask]).tanh().sum(0),
    "boolean index of two": lambda model, h, mask: model.inner(h[mask, :]).tanh().sum(0),
    "masked_select": lambda model, h, mask: model.inner(h.masked_select(mask[:, None]).view(-1, 6)).tanh().sum(0),
    "nonzero": lambda model, h, mask: model.inner(h[mask.nonzero().squeeze(1)]).tanh().sum(0),
    "where": lambda model, h, mask: model.inner(h[torch.where(mask)[0]]).tanh().sum(0),
    "runs": lambda model, h, mask: model.inner(h).sum(0) * torch.unique_consecutive(mask, return_counts=True)[1][0],
    "unique": lambda model, h, mask: model.inner(h).sum(0) * len(mask.unique()),
    "repeats": lambda model, h, mask: model.inner(h.repeat_interleave(mask.long(), 0)).tanh().sum(0),
}


def _model(function: Callable[[Any, Tensor, Tensor], Tensor]) -> Text:
    torch.manual_seed(0)
    return Text(function).double()


def _views(lengths: list[int], strong: list[int] | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    g = torch.Generator().manual_seed(1)
    views = [
        {
            "ids": torch.randint(7, (len(own), TOKENS), generator=g),
            "mask": torch.arange(TOKENS) < torch.tensor(own)[:, None],
        }
        for own in (lengths, strong or lengths)
    ]
    return views[0], views[1], torch.arange(len(lengths)) % 3


def _by(engine: base.Engine, model: nn.Module, views: tuple[Any, Any, Tensor], **options: Any) -> list[Tensor]:
    """Products of an engine, and the gradient of a function of them."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def losses(inputs: Any, target: Tensor, replacements: Any = None, view: Any = None) -> Tensor:
        output = torch.func.functional_call(model, dict(replacements or {}), (), dict(inputs))
        return F.cross_entropy(output, target, reduction="none")

    found = engine.products(base.Problem(losses, parameters, *views, model=model, **options))
    value = (found.cross / (found.weak * found.strong).sqrt() + 0.1 * found.weak.log()).sum()
    return [
        *(part.detach() for part in found.present()),
        *torch.autograd.grad(value, list(parameters.values()), allow_unused=True),
    ]


def _same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(
            torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b,
            rtol=1e-9, atol=1e-11, check_dtype=False,
        )  # fmt: skip


LENGTHS = {
    "agree": ([3, 3, 3, 3, 3], None),
    "differ": ([4, 2, 4, 3, 1], None),
    "views differ": ([4, 2, 4, 3, 2], [2, 2, 4, 4, 3]),
    "every view differs": ([4, 4, 4, 4, 4], [2, 2, 2, 2, 2]),
}


def _mixes(name: str, functions: dict[str, Any]) -> list[str]:
    """Samples that differ, and another mix in turn."""
    return ["differ", ("agree", "views differ", "every view differs")[list(functions).index(name) % 3]]


@pytest.mark.parametrize("name", FUNCTIONS)
@ENGINES
def test_every_answer_is_that_of_the_sample_alone(engine: base.Engine, name: str) -> None:
    for mix in _mixes(name, FUNCTIONS):
        model, views = _model(FUNCTIONS[name]), _views(*LENGTHS[mix])
        _same(_by(engine, model, views), _by(LoopEngine(), model, views))
        if isinstance(engine, GhostEngine):
            assert engine.looped(model) == {}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_depend_on_data(name: str) -> None:
    for mix in _mixes(name, SHAPES):
        engine, model, views = GhostEngine(), _model(SHAPES[name]), _views(*LENGTHS[mix])
        _same(_by(engine, model, views), _by(LoopEngine(), model, views))
        assert engine.looped(model) == {}


@pytest.mark.parametrize("stop", ["weak", "strong"])
@ENGINES
def test_one_constant_view(engine: base.Engine, stop: str) -> None:
    model, views = _model(_two_ways), _views(*LENGTHS["views differ"])
    _same(*(_by(each, model, views, **{f"graph_{stop}": False}) for each in (engine, LoopEngine())))


def _batches(engine: GhostEngine, model: nn.Module, views: tuple[Any, Any, Tensor]) -> list[int]:
    """The samples of each forward that ended, in order."""
    sizes = []

    def see(problem: Any, inputs: Any, *args: Any) -> Any:
        result = original(problem, inputs, *args)
        sizes.append(len(inputs["ids"]))
        return result

    original = ghost.see
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ghost, "see", see)
        _by(engine, model, views)
    return sizes


def test_as_few_batches_as_there_are_answers() -> None:
    model = _model(_as_transformers_do)
    assert _batches(GhostEngine(), model, _views([3] * 6)) == [12]
    assert _batches(GhostEngine(), model, _views([4, 3, 4, 2, 1, 4])) == [6, 6]
    assert _batches(GhostEngine(), model, _views([4] * 6, [3] * 6)) == [6, 6]
    # Pairs of (answer of the weak view, answer of the strong view), in the order of their first appearance.
    assert _batches(GhostEngine(), model, _views([4, 4, 3], [4, 3, 3])) == [2, 1, 1, 2]


@pytest.mark.parametrize("engine", ["ghost", "vmap", "auto"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_the_whole_loss_against_the_oracle(engine: str, chunk_size: int | None) -> None:
    model, views = _model(_as_transformers_do), _views(*LENGTHS["views differ"])
    gc = GradientConsistencyLoss(model, engine=engine, chunk_size=chunk_size)
    compare.assert_exact(gc, views, judge(model, *views))


def test_conditions_on_what_no_sample_decides() -> None:
    """A parameter's or a buffer's value is the same for all, and answered as it is."""

    def function(model: Any, h: Tensor, mask: Tensor) -> Tensor:
        limit = torch.arange(3).sum()
        return (model.inner if limit > 2 and limit.item() == 3 else model.other)(h).sum(0)

    model, views = _model(function), _views([4, 2, 3])
    _same(_by(GhostEngine(), model, views), _by(LoopEngine(), model, views))


def test_not_a_number_is_an_answer_too() -> None:
    def function(model: Any, h: Tensor, mask: Tensor) -> Tensor:
        value = (0.0 * mask.sum() / (0.0 * mask.sum())).item()
        return (model.inner if value != value else model.other)(h).sum(0)

    model, views = _model(function), _views([4, 2, 3])
    assert _batches(GhostEngine(), model, views) == [6]


def test_a_handler_of_the_model_does_not_swallow_a_difference() -> None:
    def function(model: Any, h: Tensor, mask: Tensor) -> Tensor:
        try:
            return model.inner(h).sum(0) if mask.all() else model.other(h).sum(0)
        except Exception:
            return model.other(h).sum(0)

    model, views = _model(function), _views([4, 2, 3])
    _same(_by(GhostEngine(), model, views), _by(LoopEngine(), model, views))


def test_a_vmap_of_the_model_is_left_to_torch() -> None:
    """Its own batch is no batch of samples: what torch refuses there is refused in a plain forward too."""

    def function(model: Any, h: Tensor, mask: Tensor) -> Tensor:
        rows = torch.func.vmap(lambda row: row if row.sum() > 0 else -row)(h)
        return model.inner(rows).sum(0)

    with pytest.raises(RuntimeError, match="data-dependent"):
        _by(GhostEngine(), _model(function), _views([4, 4, 4]))


@pytest.mark.parametrize("engine", ["ghost", "auto"])
def test_with_random_numbers_a_condition_is_not_answered(engine: str) -> None:
    """Groups that run again would draw other numbers, so that some answers became more likely than alone."""
    skips = lambda m, x: x if torch.rand(()) < 0.5 else m.layer(x)  # noqa: E731
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), Layers(skips, layer=nn.Linear(5, 5)), nn.Linear(5, 3)).double()
    gc = GradientConsistencyLoss(model, engine=engine, dropout="on")
    x = torch.randn(6, 5, dtype=torch.float64)
    gc(x, x + 0.1, torch.arange(6) % 3).backward()
    own: Any = gc.engine if engine == "ghost" else gc.engine.engine
    assert set(own.looped(model)) == {"1"}


def test_groups_are_put_back_in_order() -> None:
    rows = torch.arange(7)
    whole = in_groups(lambda index: [10 * rows[index], rows[index].float()], ["a", "b", "a", "c", "b", "b", "a"])
    assert torch.equal(whole[0], 10 * rows)
    assert torch.equal(whole[1], rows.float())
    assert SamplesDiffer(["a", "b"]).answers == ["a", "b"]
    assert (WEAK, STRONG) == (0, 1)  # the order of a pair's answers


def test_many_different_answers_take_the_loop_and_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """Batches of one pair take longer than the loop: 1.6 to 1.9 times, on two small models and one thread."""
    model, engine = _model(lambda m, h, mask: m.inner(h).sum(0) * (1 + h.abs().sum().item())), GhostEngine()
    views = _views([4] * 8)
    with caplog.at_level("WARNING", "gradconsist"):
        assert _batches(engine, model, views) == []
        _same(_by(engine, model, views), _by(LoopEngine(), model, views))
    assert [record.message[:33] for record in caplog.records] == ["some chunks run sample by sample,"]
    assert len(_batches(engine, model, _views([4] * 7))) == 14, "few pairs are not worth another way"

"""What one trains with: methods, half precision, penalties, SAM, diagnostics, state, and a device that is full."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradconsist import GGCRWrapper, GradientConsistencyLoss, SSLBatch, ViewPair, diagnostics
from gradconsist.engines import VmapEngine
from gradconsist.errors import DeviceError, UnsupportedModuleError
from gradconsist.methods import FixMatch
from gradconsist.optim import SAM
from gradconsist.regularizers import GradientNormPenalty, JacobianPenalty
from support import methods
from support.models import Layers

from .devices import computing_on, move, on_both, to_cpu

BATCHES = methods.data(4)
VIEWS = (BATCHES[0].weak[:5], BATCHES[0].strong[:5], torch.arange(5) % 3)


def network(device: str, *, dropout: float = 0.0) -> nn.Module:
    return methods.network(dropout=dropout).to(device)


def same(found: Any, expected: Any, *, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True)


def same_on_both(run: Callable[[str], Any], **tolerances: float) -> None:
    expected, found = on_both(run)
    same(found, expected, **tolerances)


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Any]:
    """The loss and its gradient."""
    loss.backward()
    return {"loss": loss, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def wrapped(name: str, device: str) -> tuple[GGCRWrapper, torch.optim.Optimizer]:
    """A method with the term from the first step on, and its optimizer."""
    torch.manual_seed(5)  # MixMatch and the loss take their seeds from here
    model = network(device)
    method = methods.METHODS[name](model).train()
    gc = GradientConsistencyLoss(model, max_pairs=4)
    wrapper = GGCRWrapper(method, gc, weight=0.5, warmup_steps=0, gate="all")
    return wrapper, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def steps(wrapper: GGCRWrapper, optimizer: torch.optim.Optimizer, batches: list[SSLBatch], device: str) -> list[float]:
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = wrapper(SSLBatch(*(move(part, device) for part in batch))).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", sorted(methods.METHODS))
def test_a_method_continues_on_either_device(name: str) -> None:
    """Each step on another device than the one before, from a file: the same losses and weights."""
    with computing_on("cpu"):
        wrapper, optimizer = wrapped(name, "cpu")
        expected = steps(wrapper, optimizer, BATCHES[:3], "cpu"), to_cpu(dict(wrapper.method.model.named_parameters()))
    file, losses = None, []
    for device, batch in zip(("cuda", "cpu", "cuda"), BATCHES, strict=False):
        with computing_on(device):
            wrapper, optimizer = wrapped(name, device)
            if file is not None:
                state = torch.load(file, map_location=device, weights_only=True)
                wrapper.load_state_dict(state["wrapper"])
                optimizer.load_state_dict(state["optimizer"])
            losses += steps(wrapper, optimizer, [batch], device)
            file = io.BytesIO()
            torch.save({"wrapper": wrapper.state_dict(), "optimizer": optimizer.state_dict()}, file)
            file.seek(0)
            found = losses, to_cpu(dict(wrapper.method.model.named_parameters()))
    same(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_with_a_scaler(dtype: torch.dtype) -> None:
    """The method runs in half precision and the term in float32; nothing is skipped, and the numbers are near."""

    def run(device: str) -> list[float]:
        torch.manual_seed(5)
        model = network(device).float()
        gc = GradientConsistencyLoss(model)
        wrapper = GGCRWrapper(FixMatch(model, threshold=0.45), gc, weight=0.5, warmup_steps=0, gate="all")
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
        scaler = torch.amp.GradScaler(device, init_scale=256.0)
        for batch in BATCHES[:3]:
            optimizer.zero_grad()
            moved = (move(part, device) for part in batch)
            with torch.autocast(device, dtype=dtype):
                loss = wrapper(SSLBatch(*(x.float() if x.is_floating_point() else x for x in moved))).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(float(loss.detach()))
            assert gc.last.cosine.dtype == torch.float32
        assert scaler.get_scale() == 256.0
        return losses

    same_on_both(run, rtol=0.02, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_model_in_half_precision(dtype: torch.dtype) -> None:
    def run(device: str) -> Any:
        model = network(device).to(dtype)
        loss = GradientConsistencyLoss(model)
        views = [move(view, device) for view in VIEWS]
        value = loss(*(view.to(dtype) if view.is_floating_point() else view for view in views))
        return {**gradients(value, model), "cosine": loss.last.cosine}

    same_on_both(run, rtol=0.02, atol=0.02)


def test_measure_needs_no_graph() -> None:
    def run(device: str) -> Any:
        model = network(device, dropout=0.5)
        loss = GradientConsistencyLoss(model)
        with torch.no_grad():
            record = loss.measure(*(move(view, device) for view in VIEWS))
        assert record.cosine.device.type == device
        return [record.cosine, record.norm_weak, record.norm_strong, record.summary()]

    same_on_both(run)


def test_diagnostics() -> None:
    def run(device: str) -> Any:
        model = network(device)
        loss = GradientConsistencyLoss(model)
        views = [move(view, device) for view in VIEWS]
        verified = diagnostics.verify(loss, *views, directions=1)
        report = diagnostics.check(loss, *views)
        bound = diagnostics.consistency_bound(loss, *views)
        sharp = diagnostics.sharpness(model, views[0], views[2])
        top = diagnostics.top_eigenvalue(model, views[0], views[2], max_steps=3)
        rule = diagnostics.check_rule(nn.Linear(5, 3).to(device), move(torch.randn(4, 5), device))
        cost = diagnostics.memory_report(loss, ViewPair(*views), chunk_sizes=(3,), stop_gradient=(None,))
        assert verified.ok
        assert rule.ok
        assert all(row.bytes > 0 and row.seconds > 0 for row in cost.rows)
        return str(report), [vars(bound), sharp.sharpness, top.value]

    expected, found = on_both(run)
    assert found[0] == expected[0]
    same(found[1], expected[1], rtol=1e-6)


def test_penalties() -> None:
    def run(device: str) -> Any:
        found = []
        model = network(device)
        views = [move(view, device) for view in VIEWS]
        for penalty, args in (
            (GradientNormPenalty(model), views),
            (JacobianPenalty(model, projections=None), views[:1]),
            (JacobianPenalty(model, projections=2), views[:1]),
        ):
            model.zero_grad()
            found.append(gradients(penalty(*args), model))
        return found

    same_on_both(run)


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam(adaptive: bool) -> None:
    def run(device: str) -> Any:
        model = network(device)
        loss = GradientConsistencyLoss(model)
        optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, adaptive=adaptive, model=model)
        views = [move(view, device) for view in VIEWS]

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(*views) + nn.functional.cross_entropy(model(views[0]), views[2])
            value.backward()
            return value

        for _ in range(2):
            optimizer.step(closure)
        return dict(model.state_dict())

    same_on_both(run)


def test_random_layers_leave_the_generators_alone() -> None:
    """`dropout="on"` draws from the loss's seed, again the same; the state of both generators does not move."""
    model = network("cuda", dropout=0.5)
    views = [move(view, "cuda") for view in VIEWS]
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    found = []
    for _ in range(2):
        loss = GradientConsistencyLoss(model, dropout="on")
        loss._generator.manual_seed(3)
        loss(*views).backward()
        found.append(loss.last.cosine)
    assert torch.equal(*found)
    assert not torch.equal(found[0], GradientConsistencyLoss(model).measure(*views).cosine)
    assert all(map(torch.equal, before, (torch.cuda.get_rng_state(), torch.get_rng_state())))


def test_draws_on_the_device_are_noticed() -> None:
    noisy = lambda _, x: x + 0 * torch.rand(x.shape, device=x.device, dtype=x.dtype)  # noqa: E731  # only its generator tells
    model = nn.Sequential(nn.Linear(5, 3), Layers(noisy)).double().cuda()
    with pytest.raises(UnsupportedModuleError, match="drew random numbers"):
        GradientConsistencyLoss(model)(*(move(view, "cuda") for view in VIEWS))


def test_a_generator_of_the_device() -> None:
    """One may pass a CUDA generator, from which the subset is drawn."""
    loss = GradientConsistencyLoss(network("cuda"), max_pairs=4)
    views = [move(view, "cuda") for view in VIEWS]
    chosen = []
    for seed in (1, 1, 2):
        loss(*views, generator=torch.Generator("cuda").manual_seed(seed)).backward()
        chosen.append(loss.last.compared.tolist())
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.parametrize("place", range(3))
def test_a_tensor_that_stayed_on_the_cpu(place: int) -> None:
    views = [move(view, "cpu" if at == place else "cuda") for at, view in enumerate(VIEWS)]
    with pytest.raises(DeviceError, match="is on cpu, the model on cuda:0: move it there"):
        GradientConsistencyLoss(network("cuda"))(*views)


def test_a_full_device_halves_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator itself runs out; the result is that of the whole batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 3)).cuda()
    weak = torch.randn(32, 256)
    views = [move(view, "cuda") for view in (weak, weak + 0.5 * torch.randn_like(weak), torch.arange(32) % 3)]
    sizes: list[int] = []
    products = VmapEngine.products

    def counted(self: VmapEngine, problem: Any) -> Any:
        sizes.append(len(problem.target))
        return products(self, problem)

    monkeypatch.setattr(VmapEngine, "products", counted)

    def run() -> Any:
        model.zero_grad()
        sizes.clear()
        loss = GradientConsistencyLoss(model, engine="vmap")
        return copy.deepcopy(to_cpu(gradients(loss(*views), model)))

    torch.cuda.reset_peak_memory_stats()
    expected = run()
    assert max(sizes) == VmapEngine.most_pairs
    room = torch.cuda.memory_allocated() + 0.6 * (torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated())
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        found, halved = run(), sizes[:]
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            GradientConsistencyLoss(model, engine="vmap", chunk_size=16)(*views)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 16 in halved
    assert 4 <= halved[-1] <= 8
    same(found, expected, rtol=1e-4, atol=1e-6)
    assert math.isfinite(float(found["loss"]))

"""The checks of `sweep_derivatives.py`: torch's first and second derivatives of a row, and the library's L_g on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from sweep_row import Row
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_leaves

from gradconsist import GradientConsistencyLoss
from gradconsist.errors import GradConsistError

PAIRS = 2
STEPS = (1e-4, 1e-5, 1e-6)
TOLERANCE = 1e-5  # of a directional derivative, relative to what a random direction sees of the gradient
TOLERANCE_FLOAT32 = 2e-2
ENGINES = ("loop", "vmap", "ghost")
TORCH = ("first", "second", "loop", "vmap", "batched", "float32")
LIBRARY = tuple(f"gradconsist {engine}" for engine in (*ENGINES, "float32"))


@dataclass(frozen=True)
class Cell:
    """right, wrong (with its error), raises or refused (with the message), or "-" where there is nothing to test."""

    verdict: str
    error: float | None = None
    message: str | None = None

    def __str__(self) -> str:
        return f"wrong {self.error:.0e}" if self.verdict == "wrong" and self.error is not None else self.verdict


class Network(nn.Module):
    """x * scale + shift, the layer, and a smooth number of all its outputs: [B]."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.layer = row.layer()
        self.scale = nn.Parameter(torch.ones(row.shape))
        self.shift = nn.Parameter(torch.zeros(row.shape))

    def forward(self, x: Tensor) -> Tensor:
        outputs = floats(self.layer(x * self.scale + self.shift))
        flat = torch.cat([output.reshape(len(x), -1) for output in outputs], 1)
        place = torch.arange(flat.shape[1], dtype=flat.dtype, device=flat.device)
        return (torch.sin(0.8 * flat + place.cos()) * (1.5 + (3 * place).sin())).sum(1)


def floats(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def draw(row: Row, count: int, generator: torch.Generator) -> Tensor:
    """Inputs [count, *shape] of the row's kind, a margin away from its kinks."""
    if row.inputs == "spread":
        size = torch.Size(row.shape).numel()
        places = torch.stack([torch.randperm(size, generator=generator) for _ in range(count)])
        x = ((places.double() + 0.5) / size * 3 - 1.3).reshape(count, *row.shape)
    else:
        x = torch.randn(count, *row.shape, generator=generator, dtype=torch.float64)
        x = x.abs() + 0.2 if row.inputs == "positive" else x
    for kink in row.kinks:
        near = (x - kink).abs() < 0.03
        x = torch.where(near, kink + 0.03 * torch.where(x < kink, -1.0, 1.0), x)
    return x


def build(row: Row, seed: int = 0) -> tuple[Network, Tensor, Tensor]:
    """The row's network with random parameters, and two views."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(row).double()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in network.layer.parameters():
                parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return network, draw(row, PAIRS, generator), draw(row, PAIRS, generator)


# --- torch's own checks


def orders(row: Row) -> dict[str, Cell]:
    """Gradcheck and gradgradcheck of the layer."""
    network, z, _ = build(row)
    names = [name for name, _ in network.layer.named_parameters()]
    leaves = (z.requires_grad_(), *(p.detach().clone().requires_grad_() for _, p in network.layer.named_parameters()))

    def layer(z: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        # A copy: some layers work in place.
        out = functional_call(network.layer, dict(zip(names, parameters, strict=True)), (z * 1.0,))
        return tuple(leaf for leaf in floats(out) if leaf.requires_grad)

    fast = sum(leaf.numel() for leaf in leaves) > 60
    options: dict[str, Any] = {"eps": 1e-6, "atol": 1e-7, "rtol": 1e-5, "fast_mode": fast}
    if fast:
        options["atol"] = 1e-6
    return {
        "first": attempt(lambda: gradcheck(layer, leaves, **options)),
        "second": attempt(lambda: gradgradcheck(layer, leaves, gen_non_contig_grad_outputs=True, **options)),
    }


def attempt(check: Callable[[], Any]) -> Cell:
    try:
        check()
    except GradcheckError as error:
        return Cell("wrong" if "mismatch" in str(error) else "raises", None, first_line(error))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return Cell("raises", None, first_line(error))
    return Cell("right")


def first_line(error: BaseException) -> str:
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        if str(error).strip()
        else type(error).__name__
    )


# --- per-sample gradients, and scalars of them

Parameters = Mapping[str, Tensor]


def by_loop(network: nn.Module, parameters: Parameters, x: Tensor, *, graph: bool) -> Tensor:
    """Per-sample gradients [B, P], one sample after the other."""
    rows = []
    for one in x.split(1):
        loss = functional_call(network, dict(parameters), (one,)).sum()
        parts = torch.autograd.grad(loss, list(parameters.values()), create_graph=graph, allow_unused=True)
        rows.append(flatten(parts, parameters))
    return torch.stack(rows)


def flatten(parts: Any, parameters: Parameters) -> Tensor:
    dense = [
        torch.zeros_like(p) if part is None else part.to_dense() if part.is_sparse else part
        for part, p in zip(parts, parameters.values(), strict=True)
    ]
    return torch.cat([part.reshape(-1) for part in dense])


def by_vmap(network: nn.Module, parameters: Parameters, x: Tensor) -> Tensor:
    """The same by vmap of grad."""

    def loss(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(network, parameters, (one[None],)).sum()

    parts = vmap(grad(loss), in_dims=(None, 0))(dict(parameters), x)
    return torch.cat([part.reshape(len(x), -1) for part in parts.values()], 1)


def by_batch(network: nn.Module, parameters: Parameters, x: Tensor) -> Tensor:
    """The same by autograd of a forward under vmap, with a row of each parameter for each sample."""

    def loss(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(network, parameters, (one[None],)).sum()

    rows = {name: p.expand(len(x), *p.shape) for name, p in parameters.items()}
    total = vmap(loss)(rows, x).sum()
    parts = torch.autograd.grad(total, list(rows.values()), create_graph=True, allow_unused=True)
    found = [torch.zeros_like(r) if part is None else part for part, r in zip(parts, rows.values(), strict=True)]
    return torch.cat([part.reshape(len(x), -1) for part in found], 1)


def scalar(weak: Tensor, strong: Tensor) -> Tensor:
    """Inner products of both views' gradients, with a weight for each."""
    weight = torch.tensor([1.0, 0.6], dtype=weak.dtype)
    return (weight * ((weak * strong).sum(1) + 0.5 * weak.square().sum(1) - 0.3 * strong.square().sum(1))).sum()


def consistency(weak: Tensor, strong: Tensor) -> Tensor:
    """L_g, summed."""
    return (1 - (weak * strong).sum(1) / (weak.norm(dim=1) * strong.norm(dim=1))).sum()


class Truth:
    """Central differences of both scalars, along directions in each parameter and in all."""

    def __init__(self, network: nn.Module, weak: Tensor, strong: Tensor) -> None:
        self.network, self.weak, self.strong = network, weak, strong
        self.parameters = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
        self.gradients = self._gradients(self.parameters)
        generator = torch.Generator().manual_seed(1)
        flat = [(name, torch.randn(p.shape, generator=generator, dtype=p.dtype)) for name, p in self.parameters.items()]
        scaled = {name: v / v.norm() * (float(self.parameters[name].norm()) or 1.0) for name, v in flat}
        self.directions = [scaled, {name: -v if i % 2 else v for i, (name, v) in enumerate(scaled.items())}]
        if len(scaled) <= 8:
            self.directions += [{name: v} for name, v in scaled.items()]
        # [direction, step, scalar]
        self.slopes = [[self._slope(v, h) for h in STEPS] for v in self.directions]

    def _gradients(self, parameters: Parameters) -> tuple[Tensor, Tensor]:
        weak, strong = (by_loop(self.network, parameters, x, graph=False) for x in (self.weak, self.strong))
        return weak, strong

    def _slope(self, direction: Mapping[str, Tensor], h: float) -> tuple[float, float]:
        found = []
        for sign in (h, -h):
            moved = {
                name: (p.detach() + sign * direction[name] if name in direction else p.detach()).requires_grad_()
                for name, p in self.parameters.items()
            }
            weak, strong = self._gradients(moved)
            found.append((float(scalar(weak, strong)), float(consistency(weak, strong))))
        return tuple((up - down) / (2 * h) for up, down in zip(*found, strict=True))  # type: ignore[return-value]

    def judge(self, gradient: Tensor, which: int) -> Cell:
        """A gradient [P] of scalar number `which`, held against the differences."""
        parts = dict(zip(self.parameters, gradient.split([p.numel() for p in self.parameters.values()]), strict=True))
        worst = 0.0
        for direction, slopes in zip(self.directions, self.slopes, strict=True):
            analytic = sum(float(parts[name] @ v.reshape(-1)) for name, v in direction.items())
            length = sum(float(v.square().sum()) for v in direction.values()) ** 0.5
            size = max(float(gradient.norm()) * length / len(gradient) ** 0.5, 1e-4 * abs(analytic), 1e-4)
            errors = [abs(slope[which] - analytic) / size for slope in slopes]
            worst = max(worst, min(errors) if all(error == error for error in errors) else float("inf"))
        return Cell("right" if worst <= TOLERANCE else "wrong", worst)


def compositions(row: Row) -> dict[str, Cell]:
    """Second derivatives of per-sample gradients, by torch alone and by the library."""
    network, weak, strong = build(row)
    quiet = network if not row.random else build(row)[0].eval()  # the library switches chance off
    try:
        truth = Truth(network, weak, strong)
        expected = Truth(quiet, weak, strong) if row.random else truth
    except (RuntimeError, NotImplementedError) as error:
        cells = dict.fromkeys(TORCH[2:], Cell("raises", None, "first derivative: " + first_line(error)))
        return cells | {
            f"gradconsist {e}": settle(lambda e=e: no_truth(row, weak, strong, e)) for e in (*ENGINES, "float32")
        }
    cells = {}
    found: dict[str, Tensor] = {}

    def loop(dtype: torch.dtype = torch.float64) -> Tensor:
        own = build(row)[0].to(dtype)
        leaves = {name: p.detach().clone().requires_grad_() for name, p in own.named_parameters()}
        value = scalar(*(by_loop(own, leaves, x.to(dtype), graph=True) for x in (weak, strong)))
        return derivative(value, leaves)

    def mapped(gradients: Callable[[nn.Module, Parameters, Tensor], Tensor]) -> Tensor:
        leaves = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
        first = [gradients(network, leaves, x) for x in (weak, strong)]
        for ours, theirs in zip(first, truth.gradients, strict=True):
            if float((ours - theirs).norm()) > 1e-8 * float(theirs.norm()):
                raise FirstDerivativeError(float((ours - theirs).norm() / theirs.norm()))
        return derivative(scalar(*first), leaves)

    cells["loop"] = settle(lambda: truth.judge(keep(found, "loop", loop()), 0))
    cells["vmap"] = settle(lambda: truth.judge(mapped(by_vmap), 0))
    cells["batched"] = settle(lambda: truth.judge(mapped(by_batch), 0))
    if cells["loop"].verdict == "right" and not row.random:  # a draw in float32 is another one
        cells["float32"] = settle(lambda: near(loop(torch.float32), found["loop"]))
    else:
        cells["float32"] = Cell("-")
    for engine in ENGINES:
        run = lambda engine=engine: keep(found, f"gradconsist {engine}", library(build(row)[0], weak, strong, engine))
        cells[f"gradconsist {engine}"] = settle(lambda run=run: expected.judge(run(), 1))
    cells["gradconsist float32"] = Cell("-")
    if cells["gradconsist loop"].verdict == "right":
        own = lambda: library(build(row)[0].float(), weak.float(), strong.float(), "auto")
        cells["gradconsist float32"] = settle(lambda: near(own(), found["gradconsist loop"]))
    return cells


class FirstDerivativeError(Exception):
    """vmap(grad) differs from the loop already in the first derivative."""


def keep(store: dict[str, Tensor], name: str, value: Tensor) -> Tensor:
    store[name] = value
    return value


def near(value: Tensor, truth: Tensor) -> Cell:
    # Where the gradient vanishes by cancellation, what is left in float32 is rounding.
    error = float((value.double() - truth).norm() / truth.norm().clamp(min=1e-3))
    return Cell("right" if error <= TOLERANCE_FLOAT32 else "wrong", error)


def no_truth(row: Row, weak: Tensor, strong: Tensor, engine: str) -> Cell:
    """What torch cannot differentiate even once must not give a number."""
    library(build(row)[0], weak, strong, "auto" if engine == "float32" else engine)
    return Cell("wrong", None, "a number without a first derivative")


def derivative(value: Tensor, leaves: Parameters) -> Tensor:
    return flatten(torch.autograd.grad(value, list(leaves.values()), allow_unused=True), leaves).detach()


def library(network: Network, weak: Tensor, strong: Tensor, engine: str) -> Tensor:
    gc = GradientConsistencyLoss(network, loss_fn=lambda output, target: output, engine=engine, reduction="sum")
    gc(weak, strong, torch.zeros(len(weak), dtype=torch.long)).backward()
    assert gc.last is not None
    if gc.last.degenerate.any():
        raise GradConsistError("degenerate pair")
    leaves = dict(network.named_parameters())
    return flatten([p.grad for p in leaves.values()], leaves)


def settle(run: Callable[[], Cell]) -> Cell:
    try:
        return run()
    except FirstDerivativeError as error:
        return Cell("wrong", error.args[0], "first derivative")
    except GradConsistError as error:
        return Cell("refused", None, first_line(error))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return Cell("raises", None, first_line(error))

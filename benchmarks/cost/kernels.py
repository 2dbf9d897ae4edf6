"""The forms of the layer rules, one layer at a time: which is fastest, and does the engine's cost model know it?

    python benchmarks/cost/kernels.py --output benchmarks/results/kernels.json

For each layer and size, the three inner products of every pair and their derivative for the layer's input and output
gradient are computed by each form of the rule ("gradient": per-sample gradients formed; "gram": by Gram matrices over
positions), by unfold + bmm with torch's own derivatives, and by a grouped F.conv2d with torch's own second derivative,
as vmap(grad) has it. Then, separately, the chain through a convolution: its input gradient, differentiated for weight
and output gradient, by the engine's closed `Convolution` and by F.conv2d.

"choice" tells which form the cost model ("auto") takes; "loss" is its time over the faster form's, and a star marks
more than 10 %; where both forms are about as fast, a star is noise. Errors are those of the cosine and of its
derivative (relative), against unfold + bmm (convolutions) or the "gradient" form, in float64. Forms alternate with a
rotating order. What fails or does not apply is a row with the reason.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in ("benchmarks/shared", "tests")]
from environment import write_result
from harness import Row, Timing, alternate, heading, parse, parser, setting, show

from gradconsist.engines.ghost.conv import Convolution, Geometry, Stage
from gradconsist.engines.ghost.gram import Doubts, lost, pair_gram
from gradconsist.engines.ghost.parts import chosen, products
from gradconsist.engines.ghost.rules import ConvolutionWeight, EmbeddingWeight, LinearWeight, Rule
from support.compare import relative

FORMS = ("gradient", "gram")
COLUMNS = {
    "layer": "<34", "variant": "<28", "milliseconds": "12.2f", "milliseconds_min": "16.2f", "milliseconds_max": "16.2f",
    "choice": "<15", "loss": "6.2f", "cosine_error": "12.1e", "gradient_error": "14.1e",
}  # fmt: skip
UNFOLD, GROUPED = "unfold + bmm, stock", "grouped F.conv2d, stock"


@dataclass(frozen=True)
class Conv:
    """A 2-d convolution on square images."""

    c: int
    p: int
    side: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1

    @property
    def name(self) -> str:
        """As printed."""
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        return f"conv {self.kernel}x{self.kernel}/{self.stride} {self.c}->{self.p}, {self.side}x{self.side}{groups}"

    def geometry(self) -> Geometry:
        """As the engine has it."""
        pad = self.kernel // 2
        return Geometry((self.stride,) * 2, (pad, pad), (1, 1), groups=self.groups)

    def weight_shape(self) -> tuple[int, ...]:
        """As torch has it."""
        return self.p, self.c // self.groups, self.kernel, self.kernel

    def out(self) -> int:
        """Side of the output."""
        return (self.side + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1


CONVOLUTIONS = (
    *(Conv(channels, channels, side) for channels in (16, 64, 256) for side in (2, 4, 8, 16)),
    Conv(3, 16, 32), Conv(16, 32, 32), Conv(32, 32, 32), Conv(128, 128, 8), Conv(512, 512, 2), Conv(512, 512, 7),
    Conv(32, 64, 32, stride=2), Conv(64, 128, 16, stride=2), Conv(3, 64, 64, kernel=7, stride=2),
    Conv(32, 64, 32, kernel=1, stride=2), Conv(256, 64, 14, kernel=1), Conv(512, 2048, 7, kernel=1),
    Conv(2048, 512, 4, kernel=1), Conv(64, 64, 16, groups=64), Conv(128, 128, 8, groups=4),
)  # fmt: skip
LINEAR = (  # positions, features in, features out
    (1, 784, 256), (1, 256, 256), (1, 2048, 1000), (4, 256, 256), (16, 192, 192), (65, 192, 192), (65, 192, 768),
    (65, 768, 192), (65, 192, 576), (197, 384, 1536), (16, 1024, 1024), (65, 1024, 1024),
)  # fmt: skip
EMBEDDING = ((1000, 64, 16), (1000, 64, 128), (10000, 128, 16), (10000, 128, 128))  # rows, features, positions
QUICK_CONVOLUTIONS = (Conv(16, 16, 8), Conv(32, 32, 16), Conv(128, 128, 4), Conv(32, 64, 16, stride=2))


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--pairs", type=int, default=14)
    made.add_argument("--rounds", type=int, default=5)
    options = parse(made, pairs=4, rounds=3)
    torch.manual_seed(0)
    rows: list[Row] = []
    heading(COLUMNS)
    samples = 2 * options.pairs
    for conv in QUICK_CONVOLUTIONS if options.quick else CONVOLUTIONS:
        x, d = _views(samples, conv.c, conv.side, conv.side).relu(), _views(samples, conv.p, conv.out(), conv.out())
        x, d = x.to(options.device), d.to(options.device)
        rule = ConvolutionWeight(conv.weight_shape(), conv.geometry())
        stock = {UNFOLD: _unfold(conv), GROUPED: _grouped(conv)}
        rows += _case(conv.name, rule, x, d, stock, options, oracle=_unfold(conv), lift=lambda x: x.unsqueeze(1))
        rows += _second_derivative(conv, x, d, options)
    for positions, c, p in LINEAR[:: 4 if options.quick else 1]:
        x, d = (_views(samples, positions, features).to(options.device) for features in (c, p))
        rows += _case(f"linear {c}->{p}, {positions} positions", LinearWeight(), x, d, {}, options)
    for count, features, positions in EMBEDDING[:: 3 if options.quick else 1]:
        x = torch.randint(count, (samples // 2, positions)).repeat_interleave(2, 0).to(options.device)
        d = _views(samples, positions, features).to(options.device)
        rule_ = EmbeddingWeight((count, features))
        rows += _case(f"embedding {count}x{features}, {positions} positions", rule_, x, d, {}, options)
    losses = [row["loss"] for row in rows if row.get("choice")]
    wrong = sum(loss > 1.1 for loss in losses)
    print(f"The cost model is more than 10 % from the fastest form in {wrong} of {len(losses)} layers.")
    if options.output:
        write_result(options.output, {"setting": setting(options, "pairs", "rounds"), "rows": rows})


def _views(samples: int, *shape: int) -> Tensor:
    """Weak and strong rows in turn, the strong ones with noise, so that cosines are those of like views."""
    weak = torch.randn(samples // 2, *shape)
    return torch.stack([weak, weak + 0.5 * torch.randn_like(weak)], 1).flatten(0, 1)


def _case(
    layer: str,
    rule: Rule,
    x: Tensor,
    d: Tensor,
    stock: dict[str, Callable[[Tensor, Tensor], Tensor]],
    options: Any,
    *,
    oracle: Callable[[Tensor, Tensor], Tensor] | None = None,
    lift: Callable[[Tensor], Tensor] = lambda x: x,
) -> list[Row]:
    """Every form of one layer; `lift` gives the input the shape that the rule takes."""
    forms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        form: lambda x, d, form=form: products(rule, lift(x), d, form)  # type: ignore[misc]
        for form in FORMS
    }
    failed: dict[str, str] = {}
    if not math.isfinite(rule.costs(lift(x), d)[1]):
        failed["gram"] = "the rule has one form here"
    elif _doubtful(rule, lift(x), d):
        failed["gram"] = "gives way to 'gradient': positions cancel"
    calls = {**{form: call for form, call in forms.items() if form not in failed}, **stock}
    timing = alternate(
        {name: _differentiated(call, x, d) for name, call in calls.items()},
        options.rounds, clock=options.clock, device=options.device,
    )  # fmt: skip
    choice = chosen(rule, lift(x), d, "auto")
    oracle = oracle or (lambda x, d: products(rule, lift(x), d, "gradient"))
    right = _cosines(oracle, _wide(x), d.double())
    rows = []
    for name in [*FORMS, *stock]:
        if name in failed or name in timing.failed:
            rows.append({"layer": layer, "variant": name, "reason": failed.get(name) or timing.failed[name]})
            continue
        cosine, gradient = _cosines(calls[name], x, d)
        row = {"layer": layer, "variant": name, **_milliseconds(timing, name)}
        row["cosine_error"] = float((cosine.double() - right[0]).abs().max())
        row["gradient_error"] = relative(gradient, right[1])
        fastest = min(_milliseconds(timing, form)["milliseconds"] for form in FORMS if form in timing.rounds)
        row["choice"] = "auto" if choice == name else ""
        if row["choice"]:
            row["loss"] = row["milliseconds"] / fastest
            row["choice"] += " *" if row["loss"] > 1.1 else ""
        rows.append(row)
    show(rows, COLUMNS)
    return rows


def _doubtful(rule: Rule, x: Tensor, d: Tensor) -> bool:
    """Whether positions cancel so far that the form gives way."""
    doubts: Doubts = []
    rule.gram(x, d, doubts)
    return any(lost(doubts))


def _second_derivative(conv: Conv, x: Tensor, d: Tensor, options: Any) -> list[Row]:
    """The derivative of a convolution's input gradient for weight and output gradient, ours and torch's."""
    geometry = conv.geometry()
    w = torch.randn(conv.weight_shape(), device=x.device)
    v = torch.randn_like(x)

    def ours(x: Tensor, w: Tensor, d: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        stage = Stage(outputs_only=True)
        y = Convolution.apply(x, w, geometry, stage)
        (gx,) = torch.autograd.grad(y, x, d, create_graph=True)
        stage.outputs_only = False
        return torch.autograd.grad(gx, (w, d), v)

    def torchs(x: Tensor, w: Tensor, d: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        y = F.conv2d(x, w, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
        (gx,) = torch.autograd.grad(y, x, d, create_graph=True)
        return torch.autograd.grad(gx, (w, d), v)

    def leaf(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(tensor.detach().to(dtype).requires_grad_() for tensor in tensors)

    calls = {"chain, closed Convolution": ours, "chain, F.conv2d": torchs}
    inputs = leaf((x, w, d, v), torch.float32)
    timing = alternate(
        {name: partial(call, *inputs) for name, call in calls.items()},
        options.rounds, clock=options.clock, device=options.device,
    )  # fmt: skip
    right = _flat(torchs(*leaf((x, w, d, v), torch.float64)))
    rows = []
    for name, call in calls.items():
        if name in timing.failed:
            rows.append({"layer": conv.name, "variant": name, "reason": timing.failed[name]})
            continue
        error: Row = {"gradient_error": relative(_flat(call(*inputs)), right)}
        rows.append({"layer": conv.name, "variant": name, **_milliseconds(timing, name), **error})
    show(rows, COLUMNS)
    return rows


def _unfold(conv: Conv) -> Callable[[Tensor, Tensor], Tensor]:
    def gram(x: Tensor, d: Tensor) -> Tensor:
        pad = conv.kernel // 2
        patches = F.unfold(x, conv.kernel, padding=pad, stride=conv.stride)  # [N, c k k, T]
        patches, outputs = (t.flatten(2).unflatten(1, (conv.groups, -1)) for t in (patches, d))
        return pair_gram(outputs @ patches.transpose(2, 3))

    return gram


def _grouped(conv: Conv) -> Callable[[Tensor, Tensor], Tensor]:
    def gram(x: Tensor, d: Tensor) -> Tensor:
        samples = len(x)
        w = x.new_zeros(samples * conv.p, *conv.weight_shape()[1:]).requires_grad_()
        folded_x, folded_d = (t.flatten(0, 1).unsqueeze(0) for t in (x, d))
        y = F.conv2d(folded_x, w, None, conv.stride, conv.kernel // 2, groups=samples * conv.groups)
        (gradient,) = torch.autograd.grad(y, w, folded_d, create_graph=True)
        return pair_gram(gradient.unflatten(0, (samples, -1)))

    return gram


def _differentiated(call: Callable[[Tensor, Tensor], Tensor], x: Tensor, d: Tensor) -> Callable[[], object]:
    """Products and their derivative, once."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, d) if tensor.is_floating_point()]
    given = leaves if x.is_floating_point() else [x, *leaves]
    cotangent = torch.randn(len(x) // 2, 2, 2, device=x.device)
    return lambda: torch.autograd.grad(call(*given), leaves, cotangent)


def _cosines(call: Callable[[Tensor, Tensor], Tensor], x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine of every pair, and the derivative of their sum as one vector."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, d) if tensor.is_floating_point()]
    m = call(*(leaves if x.is_floating_point() else [x, *leaves]))
    cosine = m[:, 0, 1] / (m[:, 0, 0] * m[:, 1, 1]).sqrt()
    return cosine.detach(), _flat(torch.autograd.grad(cosine.sum(), leaves))


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _milliseconds(timing: Timing, name: str) -> Row:
    row = timing.row(name)
    spread = {f"milliseconds_{end}": 1e3 * row[f"seconds_{end}"] for end in ("min", "max")}
    return {"milliseconds": 1e3 * row["seconds_median"], **spread, "reason": None}


if __name__ == "__main__":
    main()

"""The judge: gradient consistency by its definition, one sample at a time, in float64.

    g_w = d l(f(w), t) / dE      g_s = d l(f(s), t) / dE      GC = <g_w, g_s> / (|g_w| |g_s|)
    L_g = (1/B) sum_u weight(u) (1 - GC(u))                   and dL_g / d(every trainable parameter)

It shares no code with the library and takes no shortcut: `torch.autograd.grad` of one sample's loss on a deep copy
of the user's model, gradients flattened to one vector, autograd once more for the derivative of L_g.  BatchNorm is
written out by hand with constant statistics.  A model on which autograd itself is wrong at second order (weight_norm)
or that computes BatchNorm on its own declares a `reference`, which rewrites the copy by hand.

Names: B pairs, P compared parameters.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

Tree = Any  # a tensor, or a dict, tuple or list of trees
LossFn = Callable[[Any, Tensor], Tensor]
_DROPOUTS = {
    name: getattr(F, name)
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
}


@dataclass(frozen=True)
class Verdict:
    """What the library must reproduce.  `loss` is a number, or [B] where the reduction is "none"."""

    cosine: Tensor  # [B], NaN where degenerate
    norm_weak: Tensor  # [B]
    norm_strong: Tensor  # [B]
    degenerate: Tensor  # [B], bool
    loss: Tensor
    gradient: dict[str, Tensor]  # dL_g/dtheta of every trainable parameter, by name
    inputs: tuple[Tensor, ...] = ()  # dL_g/dx of every floating input, weak then strong, where asked for

    @property
    def flat(self) -> Tensor:
        """The gradient as one float64 vector, in the order of `named_parameters()`."""
        return torch.cat([g.reshape(-1).double() for g in self.gradient.values()])


class Tape:
    """The constant statistics of every BatchNorm call: written in one joint forward, read in all the others."""

    def __init__(self, batchnorm: str) -> None:
        self.batchnorm = batchnorm
        self.recording = False
        self.entries: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.cursor: dict[str, int] = {}

    def statistics(self, name: str, layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance for this call of this layer."""
        has_running = layer.running_mean is not None
        from_batch = {"auto": layer.training or not has_running, "batch": True, "running": False}[self.batchnorm]
        if not from_batch:
            return layer.running_mean, layer.running_var
        if self.recording:
            channels_last = x.detach().transpose(0, 1).reshape(x.shape[1], -1)  # [C, everything else]
            mean = channels_last.mean(dim=1)
            variance = (channels_last - mean[:, None]).square().mean(dim=1)
            self.entries.setdefault(name, []).append((mean, variance))
        turn = self.cursor.get(name, 0)
        self.cursor[name] = turn + 1
        return self.entries[name][turn]

    def normalize(self, name: str, layer: Any, x: Tensor) -> Tensor:
        """BatchNorm by its textbook formula, the statistics being constants."""
        mean, variance = self.statistics(name, layer, x)
        shape = [1, -1] + [1] * (x.dim() - 2)
        y = (x - mean.view(shape)) / torch.sqrt(variance.view(shape) + layer.eps)
        if layer.weight is not None:
            y = y * layer.weight.view(shape) + layer.bias.view(shape)
        return y


def tree_map(function: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """Apply to every tensor of a nested dict, tuple or list."""
    if isinstance(tree, dict):
        return {key: tree_map(function, value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)([tree_map(function, value) for value in tree])
    return function(tree) if isinstance(tree, Tensor) else tree  # a constant


def tree_leaves(tree: Tree) -> list[Tensor]:
    """Every tensor of a nested dict, tuple or list, in order."""
    found: list[Tensor] = []
    tree_map(lambda x: found.append(x) or x, tree)
    return found


def tree_cat(first: Tree, second: Tree) -> Tree:
    """Concatenate two trees of the same structure along the batch."""
    if isinstance(first, dict):
        return {key: tree_cat(first[key], second[key]) for key in first}
    if isinstance(first, (tuple, list)):
        return type(first)([tree_cat(a, b) for a, b in zip(first, second, strict=True)])
    return torch.cat([first, second]) if isinstance(first, Tensor) else first


def call(model: nn.Module, inputs: Tree) -> Any:
    """A tensor is one argument, a dict keywords, a tuple or list positional arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def cross_entropy(output: Any, target: Tensor) -> Tensor:
    """-sum_c t_c log softmax(z)_c on logits z [B, C], for class indices [B] and probabilities [B, C]."""
    if isinstance(output, dict):
        output = output["logits"]
    logits = output if isinstance(output, Tensor) else output.logits
    log_p = logits - torch.logsumexp(logits, dim=1, keepdim=True)
    if target.dim() == 1:
        return -log_p[torch.arange(len(target)), target]
    return -(target.to(log_p.dtype) * log_p).sum(dim=1)


@contextlib.contextmanager
def _plain_kernels() -> Iterator[None]:
    """Attention by its formula (the fused kernels have no second derivative), and no functional dropout."""
    try:
        for name in _DROPOUTS:
            setattr(F, name, lambda x, *args, **kwargs: x)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for name, function in _DROPOUTS.items():
            setattr(F, name, function)


class Judge:
    """One problem, prepared: a private copy of the model with constant statistics, ready to be evaluated.

    `compared` is a predicate on names of parameters (E); every trainable parameter is in E where it is None.
    `autocast` runs the forwards in that dtype, for the same-dtype loop that half precision is measured against.
    `observed` is the batch whose forward supplies the statistics; None is weak and strong views together. Where
    `observed_strong` is given, its forward supplies those of the strong views.
    `scale` multiplies the loss and divides the gradients, so that those of float16 do not underflow.
    `inputs` asks for the derivative for floating inputs as well.
    `sketch` is what every per-sample gradient [P] is replaced by: a projection, written out.
    """

    def __init__(
        self,
        model: nn.Module,
        weak: Tree,
        strong: Tree,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        compared: Callable[[str], bool] | None = None,
        loss_fn: LossFn | None = None,
        batchnorm: str = "auto",
        stop_gradient: str | None = None,
        min_norm: float = 1e-8,
        reduction: str = "mean",
        reference: Callable[[nn.Module, Tape], None] | None = None,
        dtype: torch.dtype = torch.float64,
        autocast: torch.dtype | None = None,
        observed: Tree = None,
        observed_strong: Tree = None,
        scale: float = 1.0,
        inputs: bool = False,
        sketch: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        cast = lambda x: x.detach().to(dtype) if x.is_floating_point() else x.detach()  # noqa: E731
        self.model = copy.deepcopy(model).to(dtype)
        self.weak, self.strong, self.target = tree_map(cast, weak), tree_map(cast, strong), cast(target)
        self.size = len(target)
        self.weight = torch.ones(self.size).double() if weight is None else weight.detach().double()
        self.loss_fn = loss_fn or cross_entropy
        self.stop_gradient, self.min_norm, self.reduction = stop_gradient, min_norm, reduction
        self.autocast, self.scale, self.sketch = autocast, scale, sketch
        leaves = [*tree_leaves(self.weak), *tree_leaves(self.strong)]
        self.inputs = [x.requires_grad_() for x in leaves if x.is_floating_point()] if inputs else []
        self.trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.compared = [p for n, p in self.trainable.items() if compared is None or compared(n)]
        self.tape = Tape(batchnorm)
        self._start = [
            (module, name, copy.deepcopy(value))
            for module in self.model.modules()
            for name, value in [
                *module._buffers.items(),
                *((name, getattr(module, name)) for name in getattr(module, "memory", ())),
            ]
        ]
        self._write_out(reference)
        joint = tree_cat(self.weak, self.strong) if observed is None else tree_map(cast, observed)
        self.constants = [self._record(joint)] * 2
        if observed_strong is not None:
            self.constants[1] = self._record(tree_map(cast, observed_strong))

    def _write_out(self, reference: Callable[[nn.Module, Tape], None] | None) -> None:
        for name, layer in self.model.named_modules():
            if isinstance(layer, _BatchNorm):
                layer.forward = lambda x, name=name, layer=layer: self.tape.normalize(name, layer, x)
            elif isinstance(layer, _DropoutNd):
                layer.p = 0.0
            elif isinstance(layer, (nn.MultiheadAttention, nn.RNNBase)):
                layer.dropout = 0.0
        if reference is not None:
            reference(self.model, self.tape)

    def _record(self, inputs: Tree) -> dict[str, list[tuple[Tensor, Tensor]]]:
        self.tape.recording, self.tape.entries = True, {}
        with torch.no_grad(), self._context():
            call(self.model, inputs)
        self.tape.recording = False
        return self.tape.entries

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        half: AbstractContextManager[Any] = contextlib.nullcontext()
        if self.autocast is not None:
            half = torch.autocast("cpu", dtype=self.autocast, cache_enabled=False)
        self.tape.cursor.clear()
        for module, name, value in self._start:  # every sample meets what the model remembers as it was
            setattr(module, name, copy.deepcopy(value))
        with _plain_kernels(), half:
            yield

    def _sample_gradient(self, view: int, i: int, graph: bool = True) -> Tensor:
        """d l(f(x_i), t_i) / dE of a weak (0) or strong (1) view as one vector [P], differentiable with `graph`."""
        inputs, self.tape.entries = (self.weak, self.strong)[view], self.constants[view]
        with self._context():
            output = call(self.model, tree_map(lambda x: x[i : i + 1], inputs))
            loss = self.loss_fn(output, self.target[i : i + 1])
        assert loss.shape == (1,), "a zoo model's loss_fn must return one number per sample"
        parts = torch.autograd.grad(
            loss.sum() * self.scale, self.compared, create_graph=graph, allow_unused=True, materialize_grads=True
        )
        wide = torch.float64 if loss.dtype == torch.float64 else torch.float32
        gradient = torch.cat([g.reshape(-1).to(wide) for g in parts]) / self.scale
        return gradient if self.sketch is None else self.sketch(gradient)

    def pairs(self, graph: bool = True) -> tuple[list[Tensor | None], Tensor, Tensor, Tensor]:
        """Cosine of every pair (None where degenerate), both norms, and the degenerate pairs."""
        cosines: list[Tensor | None] = []
        norms = torch.zeros(2, self.size, dtype=torch.float64)
        for i in range(self.size):
            g_w, g_s = self._sample_gradient(0, i, graph), self._sample_gradient(1, i, graph)
            if self.stop_gradient == "weak":
                g_w = g_w.detach()
            if self.stop_gradient == "strong":
                g_s = g_s.detach()
            norms[0, i], norms[1, i] = g_w.detach().double().norm(), g_s.detach().double().norm()
            degenerate = bool(norms[:, i].min() <= self.min_norm)
            # Not `@` and `norm`, whose float32 sums lose digits over millions of entries.
            ww, ss, ws = ((a * b).sum() for a, b in ((g_w, g_w), (g_s, g_s), (g_w, g_s)))
            cosines.append(None if degenerate else ws / (ww.sqrt() * ss.sqrt()))
        return cosines, norms[0], norms[1], norms.min(dim=0).values <= self.min_norm

    def terms(self, cosines: list[Tensor | None]) -> Tensor:
        """weight(u) (1 - GC(u)) of every pair, zero where degenerate: [B]."""
        zero = torch.zeros((), dtype=torch.float64)
        return torch.stack([zero if c is None else w * (1 - c) for c, w in zip(cosines, self.weight, strict=True)])

    def reduce(self, terms: Tensor) -> Tensor:
        return {"mean": terms.sum() / self.size, "sum": terms.sum(), "none": terms}[self.reduction]

    def value(self) -> float:
        """L_g at the present parameters, the statistics being those of the start."""
        return float(self.reduce(self.terms(self.pairs(graph=False)[0])).sum())

    def verdict(self, cotangent: Tensor | None = None) -> Verdict:
        """Everything at once; with a cotangent [B] the gradient is that of <cotangent, loss>."""
        cosines, norm_weak, norm_strong, degenerate = self.pairs()
        loss = self.reduce(self.terms(cosines))
        total = loss.sum() if cotangent is None else (loss * cotangent.double()).sum()
        wanted = [*self.trainable.values(), *self.inputs]
        if total.requires_grad:
            parts = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
        else:
            parts = tuple(torch.zeros_like(p) for p in wanted)
        nan = torch.tensor(torch.nan, dtype=torch.float64)
        cosine = torch.stack([nan if c is None else c.detach().double() for c in cosines])
        count = len(self.trainable)
        gradient = dict(zip(self.trainable, parts[:count], strict=True))
        return Verdict(cosine, norm_weak, norm_strong, degenerate, loss.detach(), gradient, parts[count:])

    def slope(self, direction: dict[str, Tensor], *, step: float) -> float:
        """(L(theta + h v) - L(theta - h v)) / 2h, statistics held constant."""
        values = []
        for sign in (+1.0, -1.0):
            with torch.no_grad():
                for name, parameter in self.trainable.items():
                    parameter += sign * step * direction[name]
            values.append(self.value())
            with torch.no_grad():
                for name, parameter in self.trainable.items():
                    parameter -= sign * step * direction[name]
        return (values[0] - values[1]) / (2 * step)


def judge(*args: Any, cotangent: Tensor | None = None, **options: Any) -> Verdict:
    """`Judge(...).verdict()` in one call."""
    return Judge(*args, **options).verdict(cotangent)

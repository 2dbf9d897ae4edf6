"""Other libraries on the same task, used as their documentation shows, and the two forms written out with torch.func.

Differentiable, for training: `BackpackTerm` (BatchGrad with create_graph). For monitoring, without a graph: `opacus`,
`backpack`, `torchjd`, `by_hand`, each ``(model) -> ((weak, strong, target) -> cosines [n])``. Everything here wants
models without BatchNorm in train mode: with it, a gradient of a sample needs a definition, which none of them has.

    pip install opacus==1.6.0 backpack-for-pytorch==1.7.1 torchjd==0.18.0
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from models import has_batchnorm
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

Monitor = Callable[[Tensor, Tensor, Tensor], Tensor]


class RefusedError(RuntimeError):
    """The library does not take this model, or leaves some of its parameters out."""


def twin(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same parameters, so that hooks stay off the model that others are timed on."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})


class BackpackTerm:
    """L_g with BackPACK's per-sample gradients, formed chunk by chunk with the gradient inside, as ours is.

    Args:
        model: with `encoder` and `head`; the encoder's gradients are compared.
        chunk_size: pairs at a time.
    """

    def __init__(self, model: nn.Module, chunk_size: int) -> None:
        self.samples = _Backpack(model)
        self.chunk_size = chunk_size
        self.parameters = list(model.parameters())
        self.compared = [p for name, p in model.named_parameters() if name.startswith("encoder.")]
        self.cosine: Tensor | None = None

    def __call__(self, weak: Tensor, strong: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """As `GradientConsistencyLoss`; pairs of weight 0 are left out."""
        weight = torch.ones(len(target), device=weak.device) if weight is None else weight
        buffer = [torch.zeros_like(p) for p in self.parameters]
        total, cosines = weak.new_zeros(()), weak.new_full([len(target)], torch.nan)
        for index in weight.nonzero().squeeze(1).split(self.chunk_size):
            rows = torch.cat([weak[index], strong[index]])
            gradients = self.samples(rows, target[index].repeat(2), self.compared, graph=True)
            cosine = cosine_of_halves(gradients)
            term = (weight[index] * (1.0 - cosine)).sum() / len(target)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                parts = torch.autograd.grad(term, self.parameters, allow_unused=True)
            for held, part in zip(buffer, parts, strict=True):
                if part is not None:
                    held += part
            cosines[index], total = cosine.detach(), total + term.detach()
        self.cosine = cosines
        linear = torch.stack([(p * g).sum() for p, g in zip(self.parameters, buffer, strict=True)]).sum()
        return total + linear - linear.detach()


class _Backpack:
    """Per-sample gradients by BatchGrad."""

    def __init__(self, model: nn.Module) -> None:
        from backpack import extend

        if has_batchnorm(model):
            raise RefusedError("BackPACK: individual gradients of a BatchNorm in train mode 'may not be meaningful'")
        self.parameters: list[Any] = list(model.parameters())
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.model = extend(twin(model))
        self.loss = extend(nn.CrossEntropyLoss(reduction="sum"))

    def __call__(self, rows: Tensor, target: Tensor, compared: Sequence[Any], *, graph: bool) -> list[Tensor]:
        from backpack import backpack
        from backpack.extensions import BatchGrad

        with _grad_kept(self.parameters), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a hint for every container and every call
            loss = self.loss(self.model(rows), target)
            with backpack(BatchGrad()):
                loss.backward(create_graph=graph)
        missing = [self.names[id(p)] for p in compared if not hasattr(p, "grad_batch")]
        if missing:
            raise RefusedError(f"BackPACK has no BatchGrad for {len(missing)} parameters, the first is {missing[0]}")
        gradients = [p.grad_batch for p in compared]
        for p in self.parameters:  # attributes would keep the graph alive
            if hasattr(p, "grad_batch"):
                del p.grad_batch
        return gradients


@contextmanager
def _grad_kept(parameters: list[Any]) -> Iterator[None]:
    """BackPACK works through `backward()`, which would add to the method's own ``.grad``."""
    held = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        for p, before in zip(parameters, held, strict=True):
            p.grad = before


def backpack(model: nn.Module) -> Monitor:
    """BatchGrad of all 2 n rows, then products."""
    samples, parameters = _Backpack(model), list(model.parameters())

    def cosines(weak: Tensor, strong: Tensor, target: Tensor) -> Tensor:
        return cosine_of_halves(samples(torch.cat([weak, strong]), target.repeat(2), parameters, graph=False))

    return cosines


def opacus(model: nn.Module) -> Monitor:
    """``grad_sample`` of all 2 n rows by Opacus' hooks, then products."""
    from opacus.grad_sample import GradSampleModule

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    parameters: list[Any] = list(wrapped.parameters())

    def cosines(weak: Tensor, strong: Tensor, target: Tensor) -> Tensor:
        wrapped.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            F.cross_entropy(wrapped(torch.cat([weak, strong])), target.repeat(2), reduction="sum").backward()
        result = cosine_of_halves([p.grad_sample for p in parameters])
        for p in parameters:
            p.grad_sample = None
        return result

    return cosines


def torchjd(model: nn.Module) -> Monitor:
    """The Gramian of all 2 n losses by TorchJD's autogram engine, of which the n wanted products are read."""
    from torchjd.autogram import Engine

    own = copy.deepcopy(model)
    engine = Engine(own, batch_dim=0)

    def cosines(weak: Tensor, strong: Tensor, target: Tensor) -> Tensor:
        n = len(target)
        with _batched_attention():
            losses = F.cross_entropy(own(torch.cat([weak, strong])), target.repeat(2), reduction="none")
            gramian = engine.compute_gramian(losses).detach()
        norms = gramian.diagonal().sqrt()
        return gramian.diagonal(n) / (norms[:n] * norms[n:])

    return cosines


def by_hand(model: nn.Module) -> Monitor:
    """``vmap(grad)`` of both views, as torch's tutorial on per-sample gradients has it."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (x.unsqueeze(0),)), y.unsqueeze(0))

    samples = vmap(grad(loss), (None, 0, 0))

    def cosines(weak: Tensor, strong: Tensor, target: Tensor) -> Tensor:
        with _batched_attention():
            gradients = samples(parameters, torch.cat([weak, strong]), target.repeat(2))
        return cosine_of_halves(list(gradients.values()))

    return cosines


def _batched_attention() -> AbstractContextManager[None]:
    """Under vmap torch runs its fused attention sample by sample, and says so; the formula is batched."""
    return sdpa_kernel(SDPBackend.MATH)


def cosine_of_halves(gradients: list[Tensor]) -> Tensor:
    """Cosine between row i and row n + i of per-sample gradients [2 n, ...], all tensors as one vector."""
    n = gradients[0].shape[0] // 2
    products = torch.zeros(3, n, dtype=gradients[0].dtype, device=gradients[0].device)
    for tensor in gradients:
        first, second = tensor.flatten(1)[:n], tensor.flatten(1)[n:]
        pairs = ((first, first), (second, second), (first, second))
        products = products + torch.stack([(a * b).sum(1) for a, b in pairs])
    return products[2] / (products[0] * products[1]).sqrt()

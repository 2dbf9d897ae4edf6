"""`JacobianPenalty`: keeps the output from changing much with the input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradconsist._consistency.probed import Probed
from gradconsist._consistency.trial import probe_functions, probe_model
from gradconsist._forward.batchnorm import BatchNormCalls, BatchNormPolicy
from gradconsist._forward.isolation import one_comparison, uncompiled
from gradconsist._forward.per_sample import PerSampleForward
from gradconsist._forward.randomness import GeneratorOwner, restore_generator
from gradconsist._forward.sandbox import autocast_region, our_rules
from gradconsist._forward.sparse import aliases, sparse_parameters
from gradconsist._forward.statistics import take_statistics
from gradconsist._inputs.batch import check_inputs, leaves, map_leaves
from gradconsist._inputs.cross_entropy import find_logits
from gradconsist._inputs.options import check_choice, check_count
from gradconsist._inputs.pairs import Pairs, check_one_device, check_weight
from gradconsist._inputs.parameters import trainable_parameters
from gradconsist._inputs.precision import wide
from gradconsist._refusals.graphs import check_second_derivative
from gradconsist._refusals.models import check_model
from gradconsist.errors import (
    ConfigError,
    GradModeError,
    InputTypeError,
    LossContractError,
    NonFiniteError,
    StateError,
    UnsupportedModuleError,
)
from gradconsist.types import Inputs


class JacobianPenalty(GeneratorOwner):
    """Penalises the squared Jacobian of the model's output with respect to its input.

        L_J = 1/B * sum over samples x of weight(x) * ||dz/dx||_F^2

    z(x) [K] is what `output_fn` takes from the model's output, by default the logits. The exact Frobenius norm is a sum
    over the K rows. Random projections on unit vectors v, drawn for every sample and call, estimate it:

        ||dz/dx||_F^2 = K * E ||d⟨v, z⟩/dx||^2,    v uniform on the sphere of R^K

    so `projections` backward passes replace K. The estimate and its gradient are unbiased. The variance of the estimate
    falls as 1/projections, and is 0 for K = 1.

    BatchNorm's statistics are constants and dropout is off, as in `GradientConsistencyLoss`. The model's buffers,
    modes, ``.grad`` and the random state do not change. If inputs are dicts or tuples, x is all their floating tensors.
    A call takes the time of one forward and, per projection, one backward that is differentiated again. It needs the
    memory of their graph over the whole batch.

    Args:
        model: any module from a batch to logits (or to an object with ``logits``).
        projections: number of random projections per sample, or None for the exact sum over all K outputs.
        output_fn: ``model output -> [B, ...]``, whose entries are the z of each sample; None takes the logits.
        batchnorm: "auto": a BatchNorm in train mode uses the statistics of this call's inputs, one in eval mode its
            running statistics. "batch" and "running" force one of the two.
        seed: seed of the projections' own generator.

    Raises:
        ConfigError: an option has an invalid value.
        UnsupportedModuleError: the result would not be exact for some module of the model.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(4, 3)
        >>> penalty = JacobianPenalty(model, projections=None)
        >>> loss = penalty(torch.randn(8, 4))
        >>> torch.allclose(loss, model.weight.square().sum())
        True
        >>> loss.backward()

    Source: Hoffman, Roberts and Yaida, "Robust Learning with Jacobian Regularization", 2019 (arXiv:1908.02729), eq. (3)
    without its factor 1/2, and algorithm 1.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        projections: int | None = 1,
        output_fn: Callable[[Any], Tensor] | None = None,
        batchnorm: Literal["auto", "batch", "running"] = "auto",
        seed: int = 0,
    ) -> None:
        check_model(model)
        if output_fn is not None and (not callable(output_fn) or isinstance(output_fn, type)):
            raise ConfigError(f"`output_fn` is {output_fn!r}: pass a function from the model's output, or None.")
        check_choice("batchnorm", batchnorm, ("auto", "batch", "running"))
        check_count("seed", seed, least=0)
        trainable_parameters(model)
        self.model = model
        self.projections = None if projections is None else check_count("projections", projections)
        self.output_fn = output_fn
        self.batchnorm: BatchNormPolicy = batchnorm
        self._generator = torch.Generator().manual_seed(seed)
        self._probed = Probed()

    @uncompiled
    def __call__(
        self, inputs: Inputs, weight: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Computes L_J of a batch.

        Args:
            inputs: a tensor, or a dict, tuple or list of tensors and constants, batch first, with at least one floating
                tensor.
            weight: [B], non-negative, real or boolean; None means 1. The mean runs over all B samples.
            generator: random source for the projections; None uses the penalty's own.

        Returns:
            A scalar, in float32 or wider.

        Raises:
            GradModeError: no graph can be built here: under ``no_grad``, inside a transform or a comparison.
            InputTypeError: no input tensor is floating point, so there is no derivative.
            LossContractError: the output is not a tensor with one row per sample.
            NonFiniteError: the Jacobian has NaN or infinite entries.
            ModelError: the model failed with an error of torch or Python.
        """
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            raise GradModeError("JacobianPenalty was called where no graph can be built (no_grad): call it outside.")
        check_model(self.model)
        inputs = self._differentiable(check_inputs("inputs", inputs))
        size = len(leaves(inputs)[0])
        target = leaves(inputs)[0].new_zeros(size, dtype=torch.long)
        weight = check_weight(weight, target, fused=False)
        device = check_one_device(self.model, {"inputs": leaves(inputs)[0], "weight": weight})
        sparse = sparse_parameters(self.model)
        embeddings = {name: parameter for name, parameter in self.model.named_parameters() if name in sparse}
        forward = PerSampleForward(
            self.model,
            self._sum_of_outputs,
            BatchNormCalls(self.batchnorm),
            parameters=aliases(embeddings, sparse),
            autocast=autocast_region(device),
        )
        pairs = Pairs(inputs, inputs, target, weight, device)
        source = generator or self._generator  # may be the global one, which nothing below may draw from
        own = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=source, device=source.device)))
        with one_comparison(), our_rules(self.model, device, {"inputs": inputs}):
            take_statistics(forward, inputs, inputs)  # twice, which shows the calls that normalise over samples
            probe_model(forward, pairs, torch.arange(size, device=device), self._probed)
            sparse -= self._probed.dense  # in place, because the aliases share this set
            return self._penalty(forward, pairs, own)

    def _differentiable(self, inputs: Inputs) -> Inputs:
        """Makes floating inputs require grad; a graph that they already have is kept."""
        if not any(leaf.is_floating_point() for leaf in leaves(inputs)):
            raise InputTypeError(
                "`inputs` has no floating tensor, so there is nothing to differentiate for: pass embeddings instead of"
                " token ids, and images as floats, normalised as in training."
            )

        def ready(leaf: Tensor) -> Tensor:
            if not leaf.is_floating_point():
                return leaf
            return leaf.view_as(leaf) if leaf.requires_grad else leaf.detach().clone().requires_grad_()

        converted: Inputs = map_leaves(ready, inputs)
        return converted

    def _penalty(self, forward: PerSampleForward, pairs: Pairs, generator: torch.Generator) -> Tensor:
        rows = self._outputs(forward.output(pairs.weak), len(pairs))  # [B, K]
        x = [leaf for leaf in leaves(pairs.weak) if leaf.requires_grad]
        size, width = rows.shape
        total = rows.new_zeros(size)
        directions = self._directions(rows, generator)
        for v in directions:
            # A constant v would hide functions without a second derivative: if no incoming gradient has a graph,
            # torch's `once_differentiable` silently cuts it.
            v.requires_grad_()
            # Gives each sample's own derivative, since under our rules no sample depends on another.
            found = torch.autograd.grad((rows * v).sum(), x, create_graph=True, allow_unused=True)
            squares = [part.flatten(1).to(rows.dtype).square().sum(1) for part in found if part is not None]
            total = total + torch.stack(squares).sum(0) if squares else total
        scale = 1.0 if self.projections is None else width / self.projections
        loss = (pairs.weight * total).sum() * (scale / size)
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(
                "the Jacobian penalty is NaN or infinite: `inputs` or the model has such entries, or the output jumps."
                " Skip the step; if it happens again, lower the learning rate or compute in a wider dtype."
            )
        if not loss.requires_grad:
            raise UnsupportedModuleError(
                "the model's output has no derivative for its inputs that depends on a trainable parameter: something"
                " on the way cuts the graph (`.detach()`, `.sign()`, rounding, `no_grad`), or everything is frozen. So"
                " there is nothing to penalise."
            )
        keys = check_second_derivative(loss, list(trainable_parameters(self.model).values()), fused=False)
        probe_functions(forward, pairs, torch.arange(size), self._probed, keys)
        return loss

    def _directions(self, rows: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Returns unit vectors, each [B, K] or [K]: the standard basis, or random ones."""
        size, width = rows.shape
        if self.projections is None:
            return list(torch.eye(width, dtype=rows.dtype, device=rows.device).unbind())
        drawn = torch.randn(self.projections, size, width, generator=generator)
        drawn = drawn.to(rows.device, rows.dtype)
        return list(drawn / torch.linalg.vector_norm(drawn, dim=-1, keepdim=True))

    def _outputs(self, output: Any, size: int) -> Tensor:
        """Returns z of every sample, [B, K], in float32 or wider."""
        found = find_logits(output) if self.output_fn is None else self.output_fn(output)
        if not isinstance(found, Tensor) or not found.is_floating_point() or found.shape[:1] != (size,):
            what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(output).__name__
            raise LossContractError(
                f"the model's output is {what}, expected a floating tensor with {size} rows or an object with"
                " `logits`: give `output_fn`, a function from the output to such a tensor."
            )
        return wide(found.reshape(size, -1))

    def _sum_of_outputs(self, output: Any, target: Tensor) -> Tensor:
        """Replaces the loss when the model is tried, to see if samples are independent and the graph is complete."""
        return self._outputs(output, len(target)).sum(1)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the state of the projections' generator."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` returned; raises a `StateError` for anything else."""
        if not isinstance(state, Mapping) or set(state) != {"generator"}:
            raise StateError("`state` is not that of a JacobianPenalty: pass its own state_dict.")
        restore_generator(self._generator, state["generator"])

    def __repr__(self) -> str:
        options = f"projections={self.projections!r}, batchnorm={self.batchnorm!r}"
        return f"JacobianPenalty({type(self.model).__name__}, {options})"

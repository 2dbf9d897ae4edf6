"""Looks into autograd graphs for what would be wrong in silence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from gradconsist.errors import ConfigError, UnsupportedModuleError

# Operators whose second derivative under vmap is wrong in silence, by what they leave in the graph; docs/
# torch-derivatives.md. `forward` computes them by formula wherever Python sees the call.
_WRONG_UNDER_VMAP = {
    "NativeLayerNormBackwardBackward0": "LayerNorm",
    "NativeBatchNormBackwardBackward0": "InstanceNorm or BatchNorm",
    "CudnnBatchNormBackwardBackward0": "InstanceNorm or BatchNorm",
}


# What `once_differentiable`, and torch itself, leave in a graph that cannot be differentiated.
_CUTS = ("torch::autograd::Error", "Error", "DelayedError", "NotImplemented")


def name_of(node: Any) -> str:
    """What a node computes. By its class: a custom Function may set an attribute ``name`` of its own."""
    return str(type(node).name(node))


def leaf_of(node: Any) -> Tensor | None:
    """The tensor that waits for a gradient at this node, if it is such a node."""
    return node.variable if name_of(node) == "torch::autograd::AccumulateGrad" else None


def cut_node(*tensors: Tensor) -> bool:
    """Whether the graph of `tensors` has a node that only raises."""
    return any(name_of(node) in _CUTS for node in nodes(*tensors))


def nodes(*tensors: Tensor, behind: Sequence[Tensor] = ()) -> Iterator[Any]:
    """Every node of the graph that ends in `tensors`, once, as far as to those that made `behind`."""
    seen: set[Any] = {tensor.grad_fn for tensor in behind}
    stack = [tensor.grad_fn for tensor in tensors]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(parent for parent, _ in node.next_functions)


def leaves_of(*tensors: Tensor) -> set[int]:
    """Identities of the tensors that a backward of `tensors` would reach and give a gradient."""
    return {id(leaf) for node in nodes(*tensors) if (leaf := leaf_of(node)) is not None}


def used_otherwise(loss: Tensor, tensors: Mapping[str, Tensor], kind: str) -> set[str]:
    """Names of the leaves in `tensors` that another operation than `kind`, the name of its node, uses in the graph."""
    names = {id(tensor): name for name, tensor in tensors.items()}
    found = set()
    for node in nodes(loss) if tensors else ():
        leaves = [leaf_of(parent) for parent, _ in node.next_functions if parent is not None]
        found |= {names[id(leaf)] for leaf in leaves if id(leaf) in names and name_of(node) != kind}
    return found


def check_first_derivative(loss: Tensor, own: Mapping[str, Tensor]) -> None:
    """Refuses what hides parameters from `torch.autograd.grad`, and what has a wrong second derivative.

    Reentrant checkpointing keeps the parameters inside out of the graph: `autograd.grad` reads their gradient as zero,
    without an error where no differentiated parameter lies before the checkpoint. A parameter that is used through
    another name than the module's own (a list, a closure) cannot be replaced, so engines would disagree.

    Args:
        loss: a loss of the model with copies in place of its parameters, with its graph.
        own: the model's parameters, by name, none of which should be in that graph.

    Raises:
        UnsupportedModuleError: the model checkpoints in the reentrant way, uses a parameter past its module, or
            reaches torch's own weight_norm.
    """
    names = {id(parameter): name for name, parameter in own.items()}
    for node in nodes(loss):
        name = names.get(id(leaf_of(node)))
        if name is not None:
            raise UnsupportedModuleError(
                f"parameter {name!r} is also used through a reference outside its module (a list, a closure, an alias),"
                " where it cannot be followed: use it as an attribute of its module, in the forward or in `loss_fn`."
            )
    names_of_nodes = {name_of(node) for node in nodes(loss)}
    if "WeightNormInterfaceBackward0" in names_of_nodes:
        raise UnsupportedModuleError(
            "the model calls torch's weight_norm where it cannot be replaced (a scripted function, an operator of"
            " torch.ops), and its second derivative is wrong: call torch._weight_norm or"
            " torch.nn.utils.parametrizations.weight_norm from Python, or write v * (g / v.norm(...))."
        )
    if "CheckpointFunctionBackward" in names_of_nodes:
        raise UnsupportedModuleError(
            "the model uses reentrant checkpointing, which hides parameters from torch.autograd.grad: pass"
            " use_reentrant=False to torch.utils.checkpoint.checkpoint."
        )


def check_batched(gradients: Sequence[Tensor]) -> None:
    """Refuses per-sample gradients by vmap whose derivative would be wrong.

    Args:
        gradients: per-sample gradients, with their graph.

    Raises:
        UnsupportedModuleError: the model reaches an operator of torch that is wrong under vmap.
    """
    for name in {name_of(node) for node in nodes(*gradients)} & set(_WRONG_UNDER_VMAP):
        raise UnsupportedModuleError(
            f"the model calls torch's {_WRONG_UNDER_VMAP[name]} where it cannot be replaced (a scripted function, an"
            " operator of torch.ops), and its second derivative is wrong under vmap: call torch.nn.functional's from"
            " Python, or use `engine='loop'` or 'auto'."
        )


def check_scripts(loss: Tensor) -> None:
    """Refuses scripted functions for per-sample gradients by vmap.

    A warm one differentiates by a graph of its own, which under vmap of grad loses the way to the parameters outside:
    the first derivative is right, and its own derivative is missing, in silence (seen in torch 2.6, 2.13 and 2.15).

    Args:
        loss: a loss outside vmap, with its graph, of a model that has run before.

    Raises:
        UnsupportedModuleError: a scripted function is in the graph.
    """
    if any("DifferentiableGraph" in name_of(node) for node in nodes(loss)):
        raise UnsupportedModuleError(
            "the model calls a function compiled by torch.jit.script, which vmap differentiates only once: use the"
            " Python function, or `engine='loop'` or 'auto'."
        )


def check_second_derivative(loss: Tensor, parameters: Sequence[Tensor], *, fused: bool) -> None:
    """Refuses a graph of per-sample gradients whose derivative would be incomplete.

    `once_differentiable` leaves a node that raises when it is run, and cuts the graph behind it: a derivative for named
    parameters never runs it, and misses a part without an error.

    Args:
        loss: a loss of per-sample gradients, with its graph.
        parameters: what it is differentiated for.
        fused: whether nothing else can get a gradient.

    Raises:
        UnsupportedModuleError: a function in the model has no second derivative.
        ConfigError: `fused`, and something else waits for a gradient.
    """
    expected = {id(parameter) for parameter in parameters}
    foreign: list[Tensor] = []
    # Parameters may have a history of their own, where functional_call put other tensors in their place.
    for node in nodes(loss, behind=parameters):
        if name_of(node) in _CUTS:
            raise UnsupportedModuleError(
                "the model contains a function without a second derivative (a custom autograd.Function marked"
                " once_differentiable, or an operation that torch cannot differentiate twice): write its backward with"
                " differentiable operations, or replace it."
            )
        leaf = leaf_of(node)
        if leaf is not None and id(leaf) not in expected:
            foreign.append(leaf)
    if foreign and fused:
        raise ConfigError(
            "`fused=True` forms gradients for the model's parameters only, but `loss_fn` or the model also uses a"
            f" tensor of shape {tuple(foreign[0].shape)} that requires grad: pass `fused=False`, or detach it."
        )

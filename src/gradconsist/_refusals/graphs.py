"""Searches autograd graphs for operations whose result would be silently wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from gradconsist._inputs.identity import identity
from gradconsist.errors import ConfigError, UnsupportedModuleError

# Nodes of operators whose second derivative under vmap is silently wrong (docs/torch-derivatives.md). Where the call
# comes from Python, `_forward` computes them with another formula.
_WRONG_UNDER_VMAP = {
    "NativeLayerNormBackwardBackward0": "LayerNorm",
    "NativeBatchNormBackwardBackward0": "InstanceNorm or BatchNorm",
    "CudnnBatchNormBackwardBackward0": "InstanceNorm or BatchNorm",
}

# Nodes that `once_differentiable` and torch itself put into a graph that cannot be differentiated.
_CUTS = ("torch::autograd::Error", "Error", "DelayedError", "NotImplemented")
# Torch's own types of nodes that proved harmless, since asking each node for its name takes longer than the search.
_HARMLESS: set[type] = set()
_WEIGHT_NORM = "WeightNormInterfaceBackward0"
_SHARED_TYPE = "CppFunction"  # of all nodes in C++ that have no type of their own


def name_of(node: Any) -> str:
    """Returns a node's name. It asks the class, because a custom Function may set an attribute ``name``."""
    return str(type(node).name(node))


def leaf_of(node: Any) -> Tensor | None:
    """Returns the leaf tensor whose gradient this node accumulates, or None."""
    return node.variable if name_of(node) == "torch::autograd::AccumulateGrad" else None


def cut_node(*tensors: Tensor) -> bool:
    """Tells whether the graph of `tensors` has a node that only raises an error."""
    return any(name_of(node) in _CUTS for node in nodes(*tensors))


def nodes(*tensors: Tensor, behind: Sequence[Tensor] = ()) -> Iterator[Any]:
    """Yields each node of the graph of `tensors` once, and stops at the nodes that made the tensors in `behind`."""
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
    """Returns the ids of the leaf tensors that would get a gradient from a backward of `tensors`."""
    return {id(leaf) for node in nodes(*tensors) if (leaf := leaf_of(node)) is not None}


def used_otherwise(loss: Tensor, tensors: Mapping[str, Tensor], kind: str) -> set[str]:
    """Returns the names of the leaves in `tensors` that some node other than `kind` uses in the graph of `loss`."""
    names = {id(tensor): name for name, tensor in tensors.items()}
    found = set()
    for node in nodes(loss) if tensors else ():
        leaves = [leaf_of(parent) for parent, _ in node.next_functions if parent is not None]
        found |= {names[id(leaf)] for leaf in leaves if id(leaf) in names and name_of(node) != kind}
    return found


def check_first_derivative(loss: Tensor, own: Mapping[str, Tensor]) -> None:
    """Refuses a graph that hides parameters from `torch.autograd.grad` or has a wrong second derivative.

    The loss comes from the model with copies in place of its parameters, so none of its `own` should be in that graph.

    Reentrant checkpointing keeps the parameters inside it out of the graph. `autograd.grad` then returns zero for them,
    without an error if no differentiated parameter comes before the checkpoint. A parameter that is used through a
    reference outside its module (a list, a closure) cannot be replaced, so engines would disagree.
    """
    names = {id(parameter): name for name, parameter in own.items()}
    for node in nodes(loss):
        name = names.get(id(leaf_of(node)))
        if name is not None:
            raise _reference_error(name)
    names_of_nodes = {name_of(node) for node in nodes(loss)}
    if _WEIGHT_NORM in names_of_nodes:
        raise _weight_norm_error()
    if "CheckpointFunctionBackward" in names_of_nodes:
        raise UnsupportedModuleError(
            "the model uses reentrant checkpointing, which hides parameters from torch.autograd.grad: pass"
            " use_reentrant=False to torch.utils.checkpoint.checkpoint."
        )


def check_batched(gradients: Sequence[Tensor]) -> None:
    """Refuses per-sample gradients from vmap (with their graph) whose derivative would be wrong."""
    for name in {name_of(node) for node in nodes(*gradients)} & set(_WRONG_UNDER_VMAP):
        raise UnsupportedModuleError(
            f"the model calls torch's {_WRONG_UNDER_VMAP[name]} where it cannot be replaced (a scripted function, an"
            " operator of torch.ops), and its second derivative is wrong under vmap: call torch.nn.functional's from"
            " Python, or use `engine='loop'` or 'auto'."
        )


def check_scripts(loss: Tensor) -> None:
    """Refuses scripted functions, which vmap differentiates only once.

    After its first runs a scripted function uses its own autograd graph, which under vmap of grad is not connected to
    the parameters outside. The first derivative is right; the second is silently missing (seen in torch 2.6, 2.13 and
    2.15). So the graph of a `loss` outside vmap is searched, of a model that has run before.
    """
    if any("DifferentiableGraph" in name_of(node) for node in nodes(loss)):
        raise UnsupportedModuleError(
            "the model calls a function compiled by torch.jit.script, which vmap differentiates only once: use the"
            " Python function, or `engine='loop'` or 'auto'."
        )


def check_second_derivative(
    loss: Tensor, parameters: Sequence[Tensor], *, fused: bool, own: Mapping[str, Tensor] | None = None
) -> set[str]:
    """Refuses a graph of per-sample gradients whose derivative would be incomplete.

    `once_differentiable` puts in a node that raises when it runs, and cuts the graph there. A derivative with respect
    to given parameters never runs that node, so a part is missing without an error. If the loss is `fused`, nothing
    but `parameters` can get a gradient, so another tensor that requires grad is refused, too. `own` are the model's
    parameters by name, if stand-ins should replace them everywhere. Returns the custom Functions in the graph, see
    `keys_of`.
    """
    expected = {id(parameter) for parameter in parameters}
    names = {id(parameter): name for name, parameter in (own or {}).items()}
    foreign: list[Tensor] = []
    functions: set[str] = set()
    # The search stops at the parameters: functional_call may have replaced them by tensors that have a graph.
    for node in nodes(loss, behind=parameters):
        kind = type(node)
        if kind in _HARMLESS:
            continue
        name = name_of(node)
        leaf = leaf_of(node)
        if name in _CUTS:
            raise UnsupportedModuleError(
                "the model contains a function without a second derivative (a custom autograd.Function marked"
                " once_differentiable, or an operation that torch cannot differentiate twice): write its backward with"
                " differentiable operations, or replace it."
            )
        if name == _WEIGHT_NORM:
            raise _weight_norm_error()
        if leaf is not None and id(leaf) in names:
            raise _reference_error(names[id(leaf)])
        if leaf is not None and id(leaf) not in expected:
            foreign.append(leaf)
        elif hasattr(kind, "_forward_cls"):
            if not kind._forward_cls.__module__.startswith("gradconsist."):
                functions.add(_key_in_graph(kind._forward_cls))
        elif leaf is None and kind.__name__ != _SHARED_TYPE:
            _HARMLESS.add(kind)
    if foreign and fused:
        raise ConfigError(
            "`fused=True` forms gradients for the model's parameters only, but `loss_fn` or the model also uses a"
            f" tensor of shape {tuple(foreign[0].shape)} that requires grad: detach it if it comes from outside, or"
            " pass `fused=False` if the forward makes it for a derivative of its own (`requires_grad_()` and"
            " torch.autograd.grad)."
        )
    return functions


def keys_of(function: type) -> set[str]:
    """Returns the keys of a custom Function: that of its class, and its name, which is all that vmap shows of it."""
    return {function.__name__, f"{function.__name__} {identity(function)}"}


def _key_in_graph(function: type) -> str:
    vmapped = function.__name__.removeprefix("Vmapped")
    return f"{vmapped} {identity(function)}" if vmapped == function.__name__ else vmapped


def _weight_norm_error() -> UnsupportedModuleError:
    return UnsupportedModuleError(
        "the model calls torch's weight_norm where it cannot be replaced (a scripted function, an operator of"
        " torch.ops), and its second derivative is wrong: call torch._weight_norm or"
        " torch.nn.utils.parametrizations.weight_norm from Python, or write v * (g / v.norm(...))."
    )


def _reference_error(name: str) -> UnsupportedModuleError:
    return UnsupportedModuleError(
        f"parameter {name!r} is also used through a reference outside its module (a list, a closure, an alias),"
        " where it cannot be followed: use it as an attribute of its module, in the forward or in `loss_fn`."
    )

"""Replaces the forward of layers with a rule that the user registered, and of layers that vmap refuses."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from gradconsist._forward.functional_call import call_with
from gradconsist._inputs.precision import wide_dtype
from gradconsist._refusals.failures import innermost
from gradconsist.engines.ghost.rules import Rule
from gradconsist.errors import ConfigError, LossContractError

LayerGradients = Callable[[Any, Any, Tensor], Mapping[str, Tensor]]

_REGISTERED: dict[type[nn.Module], LayerGradients] = {}


def register_rule(module_type: type[nn.Module], gradients: LayerGradients) -> None:
    """Registers a rule for a layer: its per-sample parameter gradients from its input and output gradient.

    A layer without a rule is exact too, but may be slow, because its parameters then have one copy per sample. With a
    rule, the forward runs once, for all samples as one batch, with the parameters themselves. Check a rule with
    `gradconsist.diagnostics.check_rule`.

    Args:
        module_type: the layer's class; subclasses do not inherit the rule, since their forward may differ.
        gradients: ``(module, x, d) -> {parameter name: gradients [N, *parameter shape]}`` with x the layer's input
            [N, ...] (a tuple for several), d the gradients of its output [N, ...], and parameter names as in
            ``module.named_parameters()``. It must be differentiable in x, d and, where the formula contains them, the
            module's parameters: plain torch operations are.

    Raises:
        ConfigError: `module_type` is not a module class, or has a rule already.

    Example:
        >>> class Scale(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.factor = nn.Parameter(torch.ones(3))
        ...     def forward(self, x):
        ...         return self.factor * x
        >>> register_rule(Scale, lambda module, x, d: {"factor": x * d})
        >>> unregister_rule(Scale)
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise ConfigError(f"`module_type` is {module_type!r}: pass the class of a layer, a subclass of nn.Module.")
    if not callable(gradients):
        raise ConfigError(f"`gradients` is {gradients!r}: pass a function (module, x, d) -> {{name: [N, *shape]}}.")
    if module_type in _REGISTERED:
        raise ConfigError(
            f"{module_type.__name__} has a rule already: call `unregister_rule({module_type.__name__})` first."
        )
    _REGISTERED[module_type] = gradients


def unregister_rule(module_type: type[nn.Module]) -> None:
    """Removes a registered rule.

    Args:
        module_type: the layer's class.

    Raises:
        ConfigError: the layer has no rule.
    """
    if _REGISTERED.pop(module_type, None) is None:
        raise ConfigError(f"`module_type` {module_type!r} has no registered rule.")


@contextmanager
def intercepted(
    model: nn.Module | None, run: Callable[..., Any], one_by_one: Callable[..., Any], looped: Container[str]
) -> Iterator[None]:
    """Replaces the forward of some layers inside the block.

    Layers with a registered rule run as ``run(layer, rule, forward, *args, **kwargs)``, those in `looped` as
    ``one_by_one(model, layer, forward, *args, **kwargs)``.
    """
    instead: list[tuple[nn.Module, Callable[..., Any]]] = []
    for path, layer in [] if model is None else model.named_modules():
        if path in looped:
            instead.append((layer, partial(one_by_one, model, layer, layer.forward)))
        elif type(layer) in _REGISTERED:
            instead.append((layer, partial(run, layer, _REGISTERED[type(layer)], layer.forward)))
    layers = [layer for layer, _ in instead]
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer, function in instead:
            vars(layer)["forward"] = function
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            vars(layer).pop("forward", None)
            if own is not None:
                vars(layer)["forward"] = own


def culprit(model: nn.Module | None, error: BaseException) -> str | None:
    """Finds the path of the innermost module in whose forward `error` was raised.

    None if it is the model itself, or a module that holds a BatchNorm, whose calls are counted per forward rather than
    per sample.
    """
    found = None if model is None else innermost(model, error)
    if found is None:
        return None
    path, module = found
    counted = any(isinstance(inside, nn.modules.batchnorm._BatchNorm) for inside in module.modules())
    return path if path and not counted else None


class WithState(nn.Module):
    """Runs a function of a layer with other parameters in the layer."""

    def __init__(self, layer: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.layer = layer
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        return self.function(*args, **kwargs)

    def run(self, state: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Calls the function with `state` as the layer's parameters and buffers."""
        return self.run_and_tell(state, args, kwargs)[0]

    def run_and_tell(
        self, state: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Tensor]]:
        """Does the same, and also returns the tensors in the places of `state` after the call."""
        left: dict[str, Tensor] = {}
        result = call_with(self, {f"layer.{name}": tensor for name, tensor in state.items()}, args, kwargs, left)
        return result, {name.removeprefix("layer."): tensor for name, tensor in left.items()}


@dataclass(eq=False)
class LayerCall:
    """One call of a layer with a registered rule.

    Attributes:
        layer: the layer.
        rule: its rule.
        state: its parameters and buffers during the call.
        inputs: inputs of the call.
        maps: number of input rows per sample.
    """

    layer: nn.Module
    rule: LayerGradients
    state: Mapping[str, Tensor]
    inputs: tuple[Tensor, ...]
    maps: int
    _last: tuple[Any, Mapping[str, Tensor]] | None = field(default=None, repr=False)

    def gradients(self, d: Tensor) -> Mapping[str, Tensor]:
        """Runs the rule, once for all parameters."""
        if self._last is None or self._last[0] is not d:
            # Under autocast the output is narrower than the parameters.
            dtype = wide_dtype(d)
            inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in self.inputs)
            x = inputs[0] if len(inputs) == 1 else inputs
            found = WithState(self.layer, lambda *args: self.rule(self.layer, *args)).run(self.state, x, d.to(dtype))
            self._last = (d, found)
        return self._last[1]


@dataclass(frozen=True, eq=False)
class LayerParameter(Rule):
    """The rule of one parameter of a registered layer."""

    call: LayerCall
    parameter: str

    @property
    def name(self) -> str:
        """See `Rule`."""
        return f"registered rule of {type(self.call.layer).__name__}"

    def gradients(self, x: Tensor | None, d: Tensor) -> Tensor:
        """See `Rule`."""
        found = self.call.gradients(d)
        gradient = found.get(self.parameter) if isinstance(found, Mapping) else None
        shape = (d.shape[0], *self.call.state[self.parameter].shape)
        if not isinstance(gradient, Tensor) or tuple(gradient.shape) != shape:
            what = f"shape {tuple(gradient.shape)}" if isinstance(gradient, Tensor) else "nothing"
            raise LossContractError(
                f"the registered rule of {type(self.call.layer).__name__} returned {what} for parameter"
                f" {self.parameter!r}, expected a tensor of shape {shape}: return one gradient per sample."
            )
        return gradient.unflatten(0, (-1, self.call.maps)).sum(1)

    def constant(self) -> LayerParameter:
        """See `Rule`."""
        state = {name: tensor.detach() for name, tensor in self.call.state.items()}
        inputs = tuple(x.detach() for x in self.call.inputs)
        return LayerParameter(LayerCall(self.call.layer, self.call.rule, state, inputs, self.call.maps), self.parameter)

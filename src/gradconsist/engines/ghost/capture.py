"""Records each call of an operator with a compared parameter while a batched forward runs under `torch.func.vmap`.

Inside the forward, a stand-in replaces each compared parameter: the parameter expanded, without a copy, to one row per
sample. Whatever the model does with it is exact, since the gradient for the rows is the per-sample gradient. This is
the fallback for every use without a rule. An operator with a rule that gets a stand-in runs with the parameter itself,
for all samples at once, and the call is recorded with its input and the gradient edge of its output. Which dimension
holds the samples is never guessed: vmap keeps track of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._pytree import tree_flatten, tree_unflatten

from gradconsist._forward.remembered import SampleStates
from gradconsist.engines.ghost.decomposed import RECURRENT, body
from gradconsist.engines.ghost.operators import Operators
from gradconsist.engines.ghost.record import rows
from gradconsist.engines.ghost.registered import LayerCall, LayerGradients, LayerParameter, WithState
from gradconsist.errors import UnsupportedModuleError


class Capture(Operators, TorchFunctionMode):
    """The function mode that records uses in `uses` while a forward runs; it takes the arguments of `Operators`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._paused = False
        self._packing = _packing()
        attention = F.multi_head_attention_forward
        self.replacements[attention] = self._inside(body(attention))
        self.replacements |= {function: self._inside(opened) for function, opened in RECURRENT.items()}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        replacement = None if self._paused else self.replacements.get(func)
        if replacement is None:
            return func(*args, **(kwargs or {}))
        if _packing() != self._packing:  # a rule takes the input itself, not what the hooks make of it
            raise RuntimeError("the model computes under saved-tensor hooks, which may change what a layer keeps")
        return replacement(*args, **(kwargs or {}))

    def layer(
        self, module: nn.Module, rule: LayerGradients, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Runs a layer that has a registered rule, for all samples as one batch."""
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        own = {local: self._own(tensor) for local, tensor in state.items() if id(tensor) in self._names}
        if self._paused or not own or kwargs or not all(isinstance(value, Tensor) for value in args):
            return forward(*args, **kwargs)
        if any(isinstance(inner, nn.modules.batchnorm._BatchNorm) for inner in module.modules()):
            raise UnsupportedModuleError(
                f"{type(module).__name__}, which has a registered rule, holds a BatchNorm, whose statistics are"
                " constants that a rule does not see: take the BatchNorm out, or remove the rule with"
                " `unregister_rule`."
            )
        state |= {local: alias for local, (_, alias) in own.items() if alias is not None}
        modes = _get_current_function_mode_stack()

        def compute(n: int, per_sample: list[bool], *inputs: Tensor) -> Tensor:
            samples = tuple(rows(x, each, n).flatten(0, 1) for x, each in zip(inputs, per_sample, strict=False))
            maps = samples[0].shape[0] // n
            with self._passing(modes):
                y = WithState(module, forward).run(state, *samples)
            if not isinstance(y, Tensor):
                raise UnsupportedModuleError(
                    f"{type(module).__name__}, which has a registered rule, returned a {type(y).__name__}: a rule needs"
                    " a layer that returns one tensor. Remove the rule with `unregister_rule`."
                )
            y = y.clone() if y._is_view() else y
            call = LayerCall(module, rule, state, samples, maps)
            for local, (name, alias) in own.items():
                self._note(name, alias, LayerParameter(call, local), samples, y)
            return y.unflatten(0, (n, maps))

        return self._below(compute, *args)

    def one_by_one(
        self, model: nn.Module, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Runs a layer that vmap refuses sample by sample; its parameters have one row per sample, so it stays exact.

        Every sample finds buffers and attributes in their state before the call. What the layer leaves in them then has
        one row per sample, like its output, so a second call continues from there for each sample. The output may be
        any structure of tensors.
        """
        if self._paused:
            return forward(*args, **kwargs)
        states = SampleStates(model, module)
        given, form = tree_flatten((args, kwargs, dict(module.named_parameters()), states.start))
        _check_arguments(module, (args, kwargs))
        places = [place for place, value in enumerate(given) if isinstance(value, Tensor)]
        output_form: list[Any] = []
        modes = _get_current_function_mode_stack()

        def compute(n: int, per_sample: list[bool], *tensors: Tensor) -> tuple[Tensor, ...]:
            columns = [x.unbind(0) if each else (x,) * n for x, each in zip(tensors, per_sample, strict=False)]
            outputs = []
            with self._passing(modes):
                for row in zip(*columns, strict=True):
                    filled = list(given)
                    for place, tensor in zip(places, row, strict=True):
                        filled[place] = tensor
                    own_args, own_kwargs, parameters, start = tree_unflatten(filled, form)
                    state = {**parameters, **states.lend(start)}
                    before = tree_flatten((own_args, own_kwargs))
                    output, left = WithState(module, forward).run_and_tell(state, own_args, own_kwargs)
                    _check_unchanged(module, before, tree_flatten((own_args, own_kwargs)))
                    states.collect(left)
                    flat, output_form[:] = _flat_tensors(module, output)
                    outputs.append(flat)
                return (*(torch.stack(parts) for parts in zip(*outputs, strict=True)), *states.tensors())

        flat = iter(self._below(compute, *(given[place] for place in places)))
        output = [next(flat) for _ in range(output_form[0].num_leaves)]
        states.put(flat)
        return tree_unflatten(output, output_form[0])

    @contextmanager
    def _passing(self, modes: list[Any]) -> Iterator[None]:
        """Activates `modes` again, since none is active below vmap, and pauses this one."""
        self._paused = True
        try:
            with ExitStack() as stack:
                for mode in modes:
                    stack.enter_context(mode)
                yield
        finally:
            self._paused = False

    def release(self) -> None:
        """Drops all references: the replacements are methods of this object, a cycle that would keep it alive."""
        self.replacements.clear()
        self.uses = []

    def _inside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps `function` so that this mode also sees the calls inside it."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return run


def _packing() -> Any:
    """Returns the saved-tensor hooks in force, or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _flat_tensors(module: nn.Module, output: Any) -> tuple[list[Tensor], list[Any]]:
    flat, form = tree_flatten(output)
    if not all(isinstance(leaf, Tensor) for leaf in flat):
        raise RuntimeError(f"{type(module).__name__} returns something other than tensors, and vmap refuses it")
    return flat, [form]


def _check_arguments(module: nn.Module, arguments: Any) -> None:
    """Refuses objects that a sample could change for the next one, such as a cache of keys and values."""
    for leaf in tree_flatten(arguments)[0]:
        if hasattr(leaf, "__dict__") and not (isinstance(leaf, Tensor | nn.Module | type | Enum) or callable(leaf)):
            raise RuntimeError(
                f"{type(module).__name__} gets a {type(leaf).__name__}, in which it could keep one sample's values for"
                " the next one, so it cannot run sample by sample"
            )


def _check_unchanged(module: nn.Module, before: tuple[list[Any], Any], after: tuple[list[Any], Any]) -> None:
    """Refuses a layer that fills a list or dictionary among its arguments, since each sample has its own."""
    if before[1] != after[1] or any(a is not b for a, b in zip(before[0], after[0], strict=True)):
        raise RuntimeError(f"{type(module).__name__} changes a list or a dictionary among its arguments")

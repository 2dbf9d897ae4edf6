"""Selects the parameters whose gradients are compared, and those that get a gradient.

The compared parameters (E in the formulas) are the trainable ones that `encoder` selects. L_g is differentiated for
every trainable parameter of the model, because the compared gradients depend on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import TypeAlias

from torch import nn
from torch.nn import Parameter

from gradconsist.errors import ParameterSelectionError

_COMPILED = "_orig_mod."

Encoder: TypeAlias = nn.Module | Sequence[nn.Module] | Callable[[str], bool] | None


def trainable_parameters(model: nn.Module) -> dict[str, Parameter]:
    """Returns every parameter with ``requires_grad`` by its first name in ``model.named_parameters()`` (tied: once)."""
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise ParameterSelectionError(
            f"`model` ({type(model).__name__}) has no parameter with requires_grad=True: unfreeze what you train."
        )
    return found


def holds(module: nn.Module, parameters: Iterable[Parameter]) -> bool:
    """Tells whether all `parameters` belong to `module`, so that training `module` trains them."""
    own = {id(parameter) for parameter in module.parameters()}
    return all(id(parameter) in own for parameter in parameters)


def compared_parameters(model: nn.Module, encoder: Encoder) -> dict[str, Parameter]:
    """Returns the parameters that `encoder` selects, by name and in the model's order.

    Frozen parameters are left out: they have no gradient to compare. An encoder without a trainable one is an error.
    """
    trainable = trainable_parameters(model)
    if isinstance(encoder, str):
        raise ParameterSelectionError(_not_by_name(model, encoder, "`encoder`"))
    if isinstance(encoder, nn.Module):
        encoder = [encoder]
    if isinstance(encoder, Sequence):
        wanted = _parameters_of(model, encoder)
        named = [name for name, parameter in model.named_parameters() if id(parameter) in wanted]
        unfreeze = "`for module in encoder: module.requires_grad_(True)`"
        if len(encoder) == 1:
            unfreeze = "`encoder.requires_grad_(True)`"
        chosen = {name: parameter for name, parameter in trainable.items() if id(parameter) in wanted}
        what = "the modules given as `encoder` select"
    elif encoder is None or callable(encoder):
        every = [name for name, _ in model.named_parameters()]
        names = dict.fromkeys(every) if encoder is None else _named_by(every, encoder)
        chosen = {name: parameter for name, parameter in trainable.items() if name in names}
        named = list(chosen) or list(names)
        unfreeze = "`[p.requires_grad_(True) for name, p in model.named_parameters() if encoder(name)]`"
        what = "the predicate given as `encoder` selects"
    else:
        raise ParameterSelectionError(
            f"`encoder` is of type {type(encoder).__name__}: pass a module, a sequence of modules, a predicate on"
            " parameter names such as `lambda name: name.startswith('encoder.')`, or None."
        )
    for name, parameter in chosen.items():
        if parameter.is_complex():
            raise ParameterSelectionError(
                f"the compared parameter {name!r} is {parameter.dtype}, and the cosine of complex gradients is not"
                " defined here: leave it out with `encoder`, or store its real and imaginary parts as the parameter."
            )
    if not chosen and named:
        raise ParameterSelectionError(
            f"the encoder is frozen: none of the {len(named)} parameters that `encoder` selects ({_some(named)}) has"
            f" requires_grad=True, so there is no gradient to compare. Unfreeze them with {unfreeze}, or select"
            " parameters that you train."
        )
    if not chosen:
        raise ParameterSelectionError(
            f"{what} none of the {len(trainable)} trainable parameters ({_some(list(trainable))}): check the names."
        )
    return chosen


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:5], *(["..."] if len(names) > 5 else [])])


def _not_by_name(model: nn.Module, name: str, place: str) -> str:
    paths = [path for path, _ in model.named_modules() if path]
    near = name if name in paths else next(iter(get_close_matches(name, paths, n=1)), "")
    module = f"the module itself, such as `model.get_submodule({near!r})`" if near else "the module itself"
    return (
        f"{place} is the string {name!r}: pass {module}, or a predicate on parameter names such as"
        f" `lambda name: name.startswith({name + '.'!r})`."
    )


def _named_by(names: Sequence[str], encoder: Callable[[str], bool]) -> dict[str, None]:
    """Selects names; those of a compiled module may be given with or without the prefix that torch.compile adds."""
    chosen = dict.fromkeys(name for name in names if encoder(name))
    plain = dict.fromkeys(name for name in names if encoder(name.replace(_COMPILED, "")))
    if chosen and plain and chosen != plain:
        one = next(name for name in names if (name in chosen) != (name in plain))
        raise ParameterSelectionError(
            f"`encoder` answers differently for {one!r} and {one.replace(_COMPILED, '')!r}, which are names of one"
            " parameter of a compiled module: pass modules, or the module that was compiled (`compiled._orig_mod`)."
        )
    return chosen or plain


def _parameters_of(model: nn.Module, modules: Sequence[nn.Module]) -> set[int]:
    """Returns the ids of the parameters of `modules`, which may be submodules or new containers of submodules."""
    own = {id(parameter) for parameter in model.parameters()}
    wanted: set[int] = set()
    for position, module in enumerate(modules):
        if isinstance(module, str):
            raise ParameterSelectionError(_not_by_name(model, module, f"`encoder[{position}]`"))
        if not isinstance(module, nn.Module):
            raise ParameterSelectionError(
                f"`encoder[{position}]` is of type {type(module).__name__}, not a module: pass modules, or a predicate"
                " on parameter names such as `lambda name: name.startswith('encoder.')`."
            )
        inside = {id(parameter) for parameter in module.parameters()}
        if not inside <= own:
            raise ParameterSelectionError(
                f"`encoder` contains a {type(module).__name__} whose parameters are not parameters of `model`: pass the"
                " model's own module, not a copy."
            )
        wanted |= inside
    return wanted

"""Which parameters are compared, and which are differentiated for.

Compared (E in the formulas): the trainable parameters that `encoder` names. Differentiated: every trainable parameter
of the model, because the compared gradients depend on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import nn
from torch.nn import Parameter

from gradconsist.errors import ParameterSelectionError

Encoder: TypeAlias = nn.Module | Sequence[nn.Module] | Callable[[str], bool] | None


def trainable_parameters(model: nn.Module) -> dict[str, Parameter]:
    """Every parameter with ``requires_grad``, by its first name in ``model.named_parameters()`` (tied ones once).

    Args:
        model: the model.

    Returns:
        Parameters by name.

    Raises:
        ParameterSelectionError: all parameters are frozen, or there are none.
    """
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise ParameterSelectionError(
            f"`model` ({type(model).__name__}) has no parameter with requires_grad=True: unfreeze what you train."
        )
    return found


def compared_parameters(model: nn.Module, encoder: Encoder) -> dict[str, Parameter]:
    """The trainable parameters that `encoder` names.

    Args:
        model: the model.
        encoder: a module of the model, a sequence of such modules, a predicate on the names of
            ``model.named_parameters()``, or None for every trainable parameter.

    Returns:
        Parameters by name, in the model's order. Frozen parameters are left out: they have no gradient to compare.

    Raises:
        ParameterSelectionError: nothing is selected, a module is not part of the model, all selected are frozen, or one
            of them is complex.
    """
    trainable = trainable_parameters(model)
    if encoder is None:
        encoder = _everything
    if isinstance(encoder, nn.Module):
        encoder = [encoder]
    if isinstance(encoder, Sequence):
        wanted = _parameters_of(model, encoder)
        chosen = {name: parameter for name, parameter in trainable.items() if id(parameter) in wanted}
        what = "the modules given as `encoder`"
    elif callable(encoder):
        chosen = {name: parameter for name, parameter in trainable.items() if encoder(name)}
        what = "the predicate given as `encoder`"
    else:
        raise ParameterSelectionError(
            f"`encoder` is a {type(encoder).__name__}: pass a module, a sequence of modules, a predicate on parameter"
            " names such as `lambda name: name.startswith('encoder.')`, or None."
        )
    for name, parameter in chosen.items():
        if parameter.is_complex():
            raise ParameterSelectionError(
                f"the compared parameter {name!r} is {parameter.dtype}, and the cosine of complex gradients is not"
                " defined here: leave it out by `encoder`, or keep its real and imaginary parts as the parameter."
            )
    if not chosen:
        names = ", ".join(list(trainable)[:5])
        raise ParameterSelectionError(
            f"{what} selects none of the {len(trainable)} trainable parameters ({names}, ...): check the names, or"
            " unfreeze the encoder."
        )
    return chosen


def _everything(name: str) -> bool:
    del name
    return True


def _parameters_of(model: nn.Module, modules: Sequence[nn.Module]) -> set[int]:
    """Identities of the parameters of `modules`, which may be submodules or fresh containers of them."""
    own = {id(parameter) for parameter in model.parameters()}
    wanted: set[int] = set()
    for position, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise ParameterSelectionError(
                f"`encoder[{position}]` is a {type(module).__name__}, not a module: pass modules, or a predicate on"
                " parameter names such as `lambda name: name.startswith('encoder.')`."
            )
        inside = {id(parameter) for parameter in module.parameters()}
        if not inside <= own:
            raise ParameterSelectionError(
                f"`encoder` contains a {type(module).__name__} whose parameters are not parameters of `model`: pass the"
                " model's own module, not a copy."
            )
        wanted |= inside
    return wanted

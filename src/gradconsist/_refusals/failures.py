"""Explains errors of the user's model and loss: which view, which module, what torch said, and what to do."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from gradconsist._inputs.batch import leaves, places, take
from gradconsist._inputs.model_with_loss import ModelWithLoss
from gradconsist.errors import GradConsistError, InputTypeError, ModelError, UnsupportedModuleError
from gradconsist.types import Inputs

Works = Callable[[Inputs], "bool | None"]
"""Tells whether the model runs on these inputs; None if something else keeps it from running."""

_RAW = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
# Torch's words for an input of the wrong width, the attributes that hold the right width, and where it belongs.
_WIDTHS = (
    (r"mat1 and mat2 shapes|size mismatch", ("in_features",), "as the size of the last dimension"),
    (r"channels", ("in_channels", "num_channels"), "as the size of dimension 1"),
    (r"normalized_shape", ("normalized_shape",), "as the sizes of the last dimensions"),
    (r"running_mean", ("num_features",), "as the size of dimension 1"),
    (r"input_size", ("input_size",), "as the size of the last dimension"),
    (r"embedding dimension|embed_dim", ("embed_dim",), "as the size of the last dimension"),
)
_CASTS = {
    torch.float32: ".float()",
    torch.float64: ".double()",
    torch.float16: ".half()",
    torch.bfloat16: ".bfloat16()",
}
# How exported programs say which batch size they take.
_GUARDS = re.compile(r"size\(\)\[0\] == (\d+)|shape\[0\] to be equal to (\d+)")


def innermost(model: nn.Module, error: BaseException) -> tuple[str, nn.Module] | None:
    """Finds the innermost module of `model` in whose forward `error` was raised, and its path; None if none ran."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and id(module) in paths:
            found = paths[id(module)], module
    return found


def model_failure(
    error: Exception, model: nn.Module, views: Mapping[str, Inputs], works: Works | None = None, root: str = "model"
) -> GradConsistError | None:
    """Turns an error raised by the user's model or loss into one of this library's.

    Returns None if `error` did not come from the model, or if its class belongs to neither Python nor torch: such
    exceptions are the user's own. `works` tries the model on inputs; None if it must not run again. `root` is the
    prefix of the paths of `model` in a message; "" for none.
    """
    if type(error).__module__.split(".")[0] not in ("builtins", "torch") or not isinstance(error, _RAW):
        return None
    said = f"{type(error).__name__}: {_first_line(error)}"
    loss = _failed_loss(error)
    if loss is not None:
        return ModelError(_loss_failure(*loss, said))
    place = innermost(model, error)
    if place is None:
        return None
    path, module = place
    if isinstance(error, TypeError) and path == "":
        for name, view in views.items():
            mismatch = _other_arguments(model, name, view)
            if mismatch is not None:
                return InputTypeError(mismatch)
    failing, sizes = dict(views), None
    if works is not None:
        with suppress(RuntimeError):  # a device that has failed, or is full, runs nothing more
            failing, sizes = _tried(views, works)
    where = f"`{'.'.join(part for part in (root, path) if part)}` ({type(module).__name__})"
    guard = _GUARDS.search(said)
    if guard is not None:
        sizes = guard[1] or guard[2]
    if sizes is not None:
        return UnsupportedModuleError(
            f"the model takes only batches of size {sizes}, but this library runs single samples and chunks of a call:"
            " write the forward for any batch size (`x.flatten(1)` and not `x.view(8, -1)`, `x.squeeze(1)` and not"
            " `x.squeeze()`), or export with a dynamic batch dimension (in torch.export.export:"
            " `dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)`)."
            f" {where} raised {said}"
        )
    if works is not None and not failing:
        return ModelError(
            f"the model runs on {_described(views)} alone, but failed inside the comparison, in {where}: {said}."
            " Try `engine='loop'`, which runs it on one sample at a time, with its parameters replaced by copies."
        )
    unnamed = {
        key: None for view in failing.values() if isinstance(view, Mapping) for key in view if key not in _named(model)
    }
    swallowed = f" Its forward does not name the keys {', '.join(map(repr, unnamed))}." if unnamed else ""
    remedy = _remedy(said, module, failing)
    return ModelError(f"the model failed on {_described(failing)} in {where}: {said}.{swallowed} {remedy}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return lines[0][:200].rstrip(".!")


def _failed_loss(error: Exception) -> tuple[Any, Tensor] | None:
    """Returns output and target of the call of `loss_fn` in which `error` was raised; None if it was not in one."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        values = frame.f_locals
        if frame.f_code is ModelWithLoss.forward.__code__ and "output" in values:
            return values["output"], values["target"]
    return None


def _loss_failure(output: Any, target: Tensor, said: str) -> str:
    found = f"an output {_kind(output)}" if isinstance(output, Tensor) else f"a {type(output).__name__} as output"
    return (
        f"`loss_fn` failed on {found} and a target {_kind(target)}: {said}. It is called with the model's output and"
        " the target of one or more samples, batch first: write it for these shapes and dtypes, or pass another target."
    )


def _kind(tensor: Tensor) -> str:
    return f"({tensor.dtype}, shape {tuple(tensor.shape)})"


def _described(views: Mapping[str, Inputs]) -> str:
    """Lists names, dtypes and shapes of the views; grouped if dtype and shape are equal."""
    alike: dict[str, list[str]] = {}
    for name, view in views.items():
        # A checked view is a tensor, a dict or a tuple, but a method's batch may also hold lists.
        for place, leaf in places(name, tuple(view) if isinstance(view, list) else view):
            if isinstance(leaf, Tensor):
                alike.setdefault(_kind(leaf), []).append(f"`{place}`")
    return ", ".join(f"{' and '.join(names)} {kind}" for kind, names in alike.items())


def _named(model: nn.Module) -> dict[str, inspect.Parameter]:
    """Returns the arguments that the model's forward declares, without `*args` and `**kwargs`."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters
    return {key: parameter for key, parameter in parameters.items() if parameter.kind not in several}


def _other_arguments(model: nn.Module, name: str, view: Inputs) -> str | None:
    """Returns a message if the signature of the model's forward does not fit the view, else None."""
    keywords = dict(view) if isinstance(view, Mapping) else {}
    arguments = () if isinstance(view, Mapping) else (view,) if isinstance(view, Tensor) else tuple(view)
    try:
        inspect.signature(model.forward).bind(*arguments, **keywords)
    except TypeError as error:
        reason = str(error)
    else:
        return None
    named = _named(model)
    takes = ", ".join(
        repr(key) + ("" if parameter.default is inspect.Parameter.empty else " (optional)")
        for key, parameter in named.items()
    )
    if not isinstance(view, Mapping):
        count = f"{len(arguments)} tensor{'s' if len(arguments) > 1 else ''}"
        return (
            f"`{name}` gives the model {count}, but the forward of {type(model).__name__} takes {takes}: {reason}. Pass"
            " a tuple with one tensor for each argument, or a dict with the arguments' names as keys."
        )
    missing = [
        key for key, parameter in named.items() if parameter.default is inspect.Parameter.empty and key not in keywords
    ]
    extra = [key for key in keywords if key not in named]
    parts = [f"{what} {', '.join(map(repr, keys))}" for what, keys in (("missing", missing), ("extra", extra)) if keys]
    return (
        f"`{name}` has the keys {', '.join(map(repr, keywords))}, but the forward of {type(model).__name__} takes"
        f" {takes} ({'; '.join(parts) or reason}): pass a dict with the keys that the forward takes."
    )


def _tried(views: Mapping[str, Inputs], works: Works) -> tuple[dict[str, Inputs], str | None]:
    """Returns the views on which the model fails, and the batch sizes that work if only some do."""
    failing = {name: view for name, view in views.items() if works(view) is False}
    for view in (failing or views).values():
        first, count = leaves(view)[0], len(leaves(view)[0])
        sizes = sorted({1, 2, count, 2 * count})
        # One sample repeated: if the model fails for some of these sizes, only the size can be the cause.
        rows = {size: torch.zeros(size, dtype=torch.long, device=first.device) for size in sizes}
        answers = {size: works(take(view, rows[size])) for size in sizes}
        taken = [size for size in sizes if answers[size]]
        if taken and False in answers.values():
            return failing, "2 or more" if taken == sizes[1:] else " or ".join(map(str, taken))
    return failing, None


def _remedy(said: str, module: nn.Module, views: Mapping[str, Inputs]) -> str:
    if re.search(r"\bdevice\b", said):
        return "Register the tensors that the model keeps as buffers, so that `.to(device)` moves them with it."
    if "does not require grad and does not have a grad_fn" in said:
        return (
            "Its forward calls torch.autograd.grad, but also runs without a graph here: use torch.enable_grad() around"
            " it and all that it differentiates, from `x.detach().requires_grad_()` on, and pass `fused=False`."
        )
    tensors = [leaf for view in views.values() for leaf in leaves(view) if isinstance(leaf, Tensor)]
    own = next((p.dtype for p in module.parameters(recurse=False)), None)
    if isinstance(module, nn.Embedding) and "IndexError" in said:
        return f"Give ids from 0 to {module.num_embeddings - 1} (num_embeddings={module.num_embeddings})."
    if re.search(r"dtype|scalar type|input type", said, re.IGNORECASE):
        if isinstance(module, nn.Embedding) and any(leaf.is_floating_point() for leaf in tensors):
            return "An embedding takes integers: pass ids with `.long()`."
        others = {leaf.dtype for leaf in tensors} - {own}
        if own in _CASTS and others:
            mine = next((_CASTS[dtype] for dtype in others if dtype in _CASTS), None)
            other = f", or the model with `{mine}`" if mine else ""
            return f"The layer's parameters are {own}: convert the inputs with `{_CASTS[own]}`{other}."
    for words, attributes, place in _WIDTHS:
        for attribute in attributes if re.search(words, said) else ():
            width = getattr(module, attribute, None)
            if width is not None:
                kind = type(module).__name__
                return f"The {kind} takes {attribute}={width} {place}: {_how(tensors, width)}."
    return (
        "Run the model by itself on one sample of these inputs, and give it the shapes, dtypes and keys that it was"
        " trained with."
    )


def _how(tensors: list[Tensor], width: Any) -> str:
    if any(leaf.dim() == 4 and leaf.shape[-1] == width != leaf.shape[1] for leaf in tensors):
        return "these are channels-last images: pass `x.permute(0, 3, 1, 2)`"
    return "pass inputs of the size that the model was built for, or change the layer"

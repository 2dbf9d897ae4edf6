"""`attach`: adds gradient consistency to an algorithm of ``semilearn`` (USB) without changing its code."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter, Signature, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradconsist._consistency.gradient_buffer import with_gradient
from gradconsist._inputs.parameters import trainable_parameters
from gradconsist._refusals.graphs import leaves_of
from gradconsist.adapters.usb_checks import Canary, check_algorithm, check_same_model, inner_model
from gradconsist.adapters.usb_pairs import READERS, VIEWS, ConsistencyCall, Listener, read_pair
from gradconsist.errors import ConfigError, LossContractError, StateError, UnsupportedModuleError
from gradconsist.loss import GradientConsistencyLoss
from gradconsist.types import ViewPair
from gradconsist.wrapper import GGCRWrapper, PairFunction

#: Key of the handle's state in the algorithm's checkpoints.
CHECKPOINT_KEY = "gradconsist"


def attach(
    algorithm: Any, consistency: GradientConsistencyLoss, *, pair_fn: PairFunction | None = None, **options: Any
) -> UsbHandle:
    """Adds lambda(t) * L_g to the loss of each ``algorithm.train_step``.

    The algorithm's hooks, optimizer, scheduler, EMA model and gradient scaler work as before: its ``ParamUpdateHook``
    runs one backward on the sum. The term uses the pseudo-labels and masks that the algorithm made in the step. It is
    computed after ``train_step``, in the parameters' own precision even if the algorithm uses mixed precision. The
    algorithm's logs get additional entries ``train/ggcr_...``.

    It supports FixMatch, FlexMatch, FreeMatch, SoftMatch, UDA, MeanTeacher, PiModel, MixMatch and PseudoLabel, and
    classes derived from them.

    Args:
        algorithm: the algorithm that ``semilearn.get_algorithm`` returned, before or after its model was moved to a
            device or wrapped in DistributedDataParallel.
        consistency: the term, built on ``algorithm.model`` (inside DistributedDataParallel: on
            ``algorithm.model.module``).
        pair_fn: ``(args, kwargs, output) -> ViewPair | None``, for other algorithms or other pairs. It gets the
            arguments of ``train_step`` and its return value; `UsbHandle.calls` holds the step's targets and masks.
        **options: options of `GGCRWrapper`: `weight`, `warmup_steps`, `ramp_steps`, `every`, `gate`.

    Returns:
        The handle; its ``detach()`` undoes all changes to the algorithm.

    Raises:
        ConfigError: `algorithm` is not a supported algorithm, already has a term or trains another model, or an option
            has an invalid value.
    """
    return UsbHandle(algorithm, consistency, pair_fn, options)


class UsbHandle:
    """The handle that `attach` returns.

    The algorithm's checkpoints (``get_save_dict``, ``load_model``) hold the handle's state under ``"gradconsist"``; an
    algorithm without a term ignores it. After you load a checkpoint from a run without the term, the schedule continues
    at its ``it``.

    Attributes:
        wrapper: the `GGCRWrapper` around ``train_step``; it holds the schedule, and its `step` starts at ``it``.
        calls: calls of the algorithm's ``consistency_loss`` in the running step, for a `pair_fn`; empty otherwise.
    """

    def __init__(
        self,
        algorithm: Any,
        consistency: GradientConsistencyLoss,
        pair_fn: PairFunction | None,
        options: dict[str, Any],
    ) -> None:
        check_algorithm(algorithm)
        own = vars(algorithm)
        owner = getattr(own.get("get_save_dict"), "__self__", None)  # also finds a `train_step` that was wrapped again
        if isinstance(own.get("train_step"), _Step) or isinstance(owner, UsbHandle):
            raise ConfigError("`algorithm` has a term already: detach() the first handle before attaching another.")
        kind = type(algorithm)
        self._name = next((base.__name__ for base in kind.__mro__ if base.__name__ in READERS), "")
        if not self._name and pair_fn is None:
            raise ConfigError(
                f"`algorithm` is a {kind.__name__}, whose views and pseudo-labels are not known (those of"
                f" {', '.join(READERS)} are): give `pair_fn(args, kwargs, output) -> ViewPair | None`."
            )
        self.calls: list[ConsistencyCall] = []
        self.wrapper = GGCRWrapper(self._method, consistency, pair_fn=pair_fn or self._pair, **options)
        self.wrapper.step = int(algorithm.it)
        check_same_model(algorithm, list(self._parameters().values()))
        self._algorithm = algorithm
        self._own_pairs = pair_fn is None
        self._canary = Canary()
        self._originals = {name: getattr(algorithm, name) for name in ("train_step", "get_save_dict", "load_model")}
        self._signature = signature(algorithm.train_step)
        self._output: Any = None
        self._heard = Listener(algorithm)
        self._kept = {name: own[name] for name in self._originals if name in own}
        self._in_place = _Step(self, self._signature)
        self._installed = {
            "train_step": self._in_place,
            "get_save_dict": self._get_save_dict,
            "load_model": self._load_model,
        }
        own.update(self._installed)

    def detach(self) -> None:
        """Undoes what `attach` changed in the algorithm; a second call does nothing.

        Raises:
            StateError: something else has replaced one of its methods after `attach`.
        """
        if not self._installed:
            return
        own = vars(self._algorithm)
        for name, installed in self._installed.items():
            if own.get(name) is not installed:
                raise StateError(f"`algorithm.{name}` was replaced after attach(): undo that, then detach().")
        for name in self._installed:
            del own[name]
        own.update(self._kept)
        self._installed = {}

    def state_dict(self) -> dict[str, Any]:
        """Returns the schedule's step and the state of the loss's own generator."""
        return self.wrapper.get_extra_state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned, or a checkpoint's ``"gradconsist"`` entry; else raises a `StateError`.

        It is not needed after ``algorithm.load_model``.
        """
        self.wrapper.set_extra_state(state)

    def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Runs the algorithm's step and adds the term to its loss."""
        batch = self._batch(args, kwargs)
        parameters = self._parameters()
        compared = list(parameters.values())
        check_same_model(self._algorithm, compared)
        if self._own_pairs and self.wrapper.weight > 0:  # before the algorithm changes its state
            self._check_views(batch)
        self._canary.before_step(compared)
        try:
            step = self.wrapper(*args, **kwargs)
            out, logs = self._output
        finally:
            self.calls, self._output, self._heard = [], None, Listener(self._algorithm)  # they hold the step's graph
        self._canary.after_step(compared)
        loss = step.loss
        if self._reduced():
            loss = _reduced_with(out["loss"], loss, parameters) if step.logs["ggcr_weight"] else out["loss"]
        added = {f"train/{name}": float(value) for name, value in step.logs.items()}
        return {**out, "loss": loss}, {**logs, **added}

    def _method(self, *args: Any, **kwargs: Any) -> Any:
        names = self._signature.parameters
        takes_all = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in names.values())
        taken = {name: value for name, value in kwargs.items() if takes_all or name in names}
        with self._heard.recording():
            output = self._originals["train_step"](*args, **taken)
        if not (isinstance(output, tuple) and len(output) == 2 and all(isinstance(part, Mapping) for part in output)):
            raise LossContractError(
                f"`train_step` of {type(self._algorithm).__name__} returned {type(output).__name__}: it must return"
                " (out_dict, log_dict), as those of semilearn 0.3.2 do."
            )
        self.calls, self._output = self._heard.losses, output
        self._canary.check_unsupervised(self._algorithm, self.calls)
        # With DistributedDataParallel, the term needs a separate graph; see `_reduced_with`.
        return ({**output[0], "loss": output[0]["loss"].detach()}, output[1]) if self._reduced() else output

    def _reduced(self) -> bool:
        return isinstance(self._algorithm.model, DistributedDataParallel)

    def _pair(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> ViewPair:
        del output
        return read_pair(self._algorithm, self._name, self._batch(args, kwargs), self._heard)

    def _batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return self._in_place.__signature__.bind(*args, **kwargs).arguments

    def _check_views(self, batch: Mapping[str, Any]) -> None:
        missing = [name for name in VIEWS if name not in batch]
        if missing:
            raise LossContractError(
                f"the batch has no {', '.join(missing)}, but gradient consistency compares two views: let the unlabeled"
                " data set return it (semilearn's BasicDataset does with alg='fixmatch' and a strong_transform)."
            )
        if isinstance(batch[VIEWS[0]], Mapping) and self.wrapper.consistency.model is inner_model(self._algorithm):
            raise LossContractError(
                "the views are dicts, which semilearn's networks take as one argument and gradconsist passes by"
                " keyword: build GradientConsistencyLoss on a module around `algorithm.model` whose"
                " forward(self, **inputs) returns self.model(inputs)."
            )

    def _parameters(self) -> dict[str, nn.Parameter]:
        return trainable_parameters(self.wrapper.consistency.model)

    def _get_save_dict(self) -> dict[str, Any]:
        return {**self._originals["get_save_dict"](), CHECKPOINT_KEY: self.state_dict()}

    def _load_model(self, load_path: Any) -> Any:
        checkpoint = self._originals["load_model"](load_path)
        if CHECKPOINT_KEY in checkpoint:
            self.load_state_dict(checkpoint[CHECKPOINT_KEY])
        else:
            self.wrapper.step = int(self._algorithm.it)
        return checkpoint


class _Step:
    """Replaces ``train_step``, and also accepts views that the algorithm's own does not take.

    This matters because ``process_batch`` drops from a batch what the signature of ``train_step`` does not name.
    """

    def __init__(self, handle: UsbHandle, own: Signature) -> None:
        self._handle = handle
        views = [Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in VIEWS if name not in own.parameters]
        self.__signature__ = Signature(sorted([*own.parameters.values(), *views], key=lambda each: each.kind))

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return self._handle._step(args, kwargs)


def _reduced_with(base: Tensor, total: Tensor, parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """Adds the term to `base` so that only the parameters that DistributedDataParallel expects get a gradient.

    DistributedDataParallel has seen only the graph of its forward and marked all parameters outside that graph as
    ready. It fails if one of them then appears in the backward, for example that of a layer whose output the network
    drops. So the graph of the sum leads only to the parameters of `base`, and a nonzero gradient of the term for
    another one is an error. `total` is the value of `base` plus the weighted term, with the graph of the term only.
    """
    known = leaves_of(base)
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    used, gradients = [], []
    for (name, parameter), gradient in zip(parameters.items(), found, strict=True):
        if id(parameter) in known:
            used.append(parameter)
            gradients.append(gradient)
        elif gradient is not None and bool(gradient.any()):
            raise UnsupportedModuleError(
                f"the parameter {name!r} gets a gradient from the term and none from the algorithm's own loss, so"
                " DistributedDataParallel would not reduce it: freeze it, or use one process."
            )
    return base + with_gradient(total.detach() - base.detach(), gradients, used)

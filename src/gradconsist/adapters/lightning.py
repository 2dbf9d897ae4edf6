"""Adds the term to a `LightningModule` without changing its class.

`attach` replaces four methods of one module object: `training_step` and `manual_backward`, which handle the loss, and
`on_save_checkpoint` and `on_load_checkpoint`, so that Lightning's checkpoint includes the step counter and generator.
Modules of both `lightning` and `pytorch_lightning` are recognised by their methods; this file imports neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gradconsist._inputs.parameters import holds, trainable_parameters
from gradconsist._refusals.models import process_count
from gradconsist.errors import ConfigError, LossContractError, StateError
from gradconsist.loss import GradientConsistencyLoss
from gradconsist.types import StepOutput
from gradconsist.wrapper import GGCRWrapper

CHECKPOINT_KEY = "gradconsist"
"""Key of the attachment's state in Lightning's checkpoint."""

_REPLACED = ("training_step", "manual_backward", "on_save_checkpoint", "on_load_checkpoint")


def attach(module: Any, consistency: GradientConsistencyLoss, **options: Any) -> Attachment:
    """Adds ``lambda(t) * L_g`` to the training loss of `module`, until you call the handle's ``detach()``.

    With automatic optimization, the term is added to the loss that ``training_step`` returns: a tensor, a mapping with
    ``"loss"``, or a `StepOutput`. If it returns None, the step is skipped and not counted. With manual optimization,
    the term is added to the loss that you pass to ``self.manual_backward``. Call that once per step; it also takes a
    `StepOutput`. If the pair is not in a `StepOutput`, pass a `pair_fn`: it gets the arguments of ``training_step``
    and, as `output`, what ``training_step`` returned or passed to ``manual_backward``. The ``ggcr_*`` logs and those of
    a `StepOutput` go to ``self.log_dict``.

    A step is a call of ``training_step`` in train mode. So with gradient accumulation every micro-batch counts, as in
    `GGCRWrapper`. In eval mode only the module's own step runs.

    Args:
        module: a ``LightningModule`` object whose parameters include those of ``consistency.model``.
        consistency: the term.
        **options: options of `GGCRWrapper`: weight, warmup_steps, ramp_steps, every, gate, pair_fn.

    Returns:
        The handle.

    Raises:
        ConfigError: `module` is not a LightningModule, is compiled, already has a term or does not hold the parameters
            of ``consistency.model``, or an option has an invalid value.
    """
    if not isinstance(module, nn.Module) or not all(
        callable(getattr(module, name, None)) for name in (*_REPLACED, "log_dict")
    ):
        raise ConfigError(
            f"`module` is of type {type(module).__name__}: pass a LightningModule. For a method that you call once per"
            " step, use GGCRWrapper."
        )
    if hasattr(module, "_orig_mod"):
        raise ConfigError("`module` is compiled: attach to the LightningModule that was given to torch.compile.")
    if any(isinstance(value, _Replacement) for value in vars(module).values()):
        raise ConfigError("`module` has a term attached already: call that handle's detach() first.")
    handle = Attachment(module, consistency, options)
    if not holds(module, trainable_parameters(consistency.model).values()):
        raise ConfigError(
            "`consistency` compares a model that `module` does not train: give it a submodule of `module`, and attach"
            " after the layers exist."
        )
    handle._replace()
    return handle


class Attachment:
    """The handle that `attach` returns. A deep copy or pickle of the module includes a copy of the handle.

    Attributes:
        module: the LightningModule.
        wrapper: the `GGCRWrapper` that adds the term; you may set its `weight` between steps.
    """

    def __init__(self, module: Any, consistency: GradientConsistencyLoss, options: Mapping[str, Any]) -> None:
        self.module = module
        self.wrapper = GGCRWrapper(self._method, consistency, **options)
        # Arguments of training_step, while it runs with manual optimization.
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._output: Any = None  # of the module, while the wrapper runs
        self._replaced: dict[str, _Replacement] = {}

    @property
    def step(self) -> int:
        """Number of steps so far, including the warm-up."""
        return self.wrapper.step

    def detach(self) -> None:
        """Restores the module's own methods; a second call does nothing.

        Raises:
            StateError: something else has replaced one of them after `attach`.
        """
        for name, replacement in self._replaced.items():
            if vars(self.module).get(name) is not replacement:
                raise StateError(
                    f"`module.{name}` was replaced after `attach` (by torch.compile, say): undo that, then detach."
                )
        for name, replacement in self._replaced.items():
            delattr(self.module, name)
            if replacement.own:
                setattr(self.module, name, replacement.__wrapped__)
        self._replaced = {}

    def _replace(self) -> None:
        for name in _REPLACED:
            self._replaced[name] = _Replacement(self.module, name, getattr(self, f"_{name}"))
            setattr(self.module, name, self._replaced[name])

    def _original(self, name: str) -> Callable[..., Any]:
        return self._replaced[name].__wrapped__

    # -- the step ------------------------------------------------------------------------------------------------------

    def _training_step(self, *args: Any, **kwargs: Any) -> Any:
        step = self._original("training_step")
        if not self.module.training:
            return step(*args, **kwargs)
        self._check_strategy()
        if not self.module.automatic_optimization:
            return self._manual_step(step, args, kwargs)
        try:
            loss = self._with_term(args, kwargs)
            return {**self._output, "loss": loss} if isinstance(self._output, Mapping) else loss
        except _SkippedError:
            return None
        finally:
            self._output = None

    def _method(self, *args: Any, **kwargs: Any) -> Any:
        """The method inside the wrapper: runs the module's own step, or returns the loss of ``manual_backward``."""
        if self._call is None:
            self._output = self._original("training_step")(*args, **kwargs)
            if self._output is None:
                raise _SkippedError
        if isinstance(self._output, tuple) and not isinstance(self._output, StepOutput):
            where = "training_step" if self._call is None else "manual_backward"
            raise LossContractError(
                f"`{where}` has a {type(self._output).__name__} for its loss: use a tensor, a mapping with 'loss' or a"
                " StepOutput; Lightning does not accept a tuple."
            )
        return self._output

    def _with_term(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        out: StepOutput = self.wrapper(*args, **kwargs)
        trainer = self._trainer()
        # Fabric's stand-in for a trainer has neither attribute and can always log.
        if trainer is not None and getattr(trainer, "training", True) and not getattr(trainer, "barebones", False):
            logs = {name: value.float() if isinstance(value, Tensor) else value for name, value in out.logs.items()}
            # Lightning uses the batch size only for epoch means, which are off here; passing it saves a search.
            self.module.log_dict(logs, on_step=True, on_epoch=False, batch_size=1)
        return out.loss

    def _trainer(self) -> Any:
        try:
            return self.module.trainer
        except RuntimeError:  # no trainer is attached: a step by hand
            return None

    def _check_strategy(self) -> None:
        if type(getattr(self._trainer(), "strategy", None)).__name__ == "DeepSpeedStrategy":
            raise ConfigError(
                "`strategy` is DeepSpeedStrategy, whose partitioned parameters and gradients the term does not support:"
                " use 'ddp'."
            )

    # -- manual optimization -------------------------------------------------------------------------------------------

    def _manual_step(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.wrapper.consistency.batchnorm == "observed":
            raise ConfigError(
                "`batchnorm='observed'` needs the method's forward inside the wrapper, but with manual optimization"
                " only the loss passes through: use `batchnorm='auto'`, or call a GGCRWrapper in training_step."
            )
        stepped: list[bool] = []
        trained = {id(parameter) for parameter in trainable_parameters(self.wrapper.consistency.model).values()}

        def look(optimizer: Optimizer, *_: Any) -> None:
            stepped.append(any(id(p) in trained for group in optimizer.param_groups for p in group["params"]))

        counted, hook = self.step, register_optimizer_step_pre_hook(look)
        self._call = args, kwargs
        try:
            returned = step(*args, **kwargs)
        finally:
            self._call = None
            hook.remove()
        if self.step == counted and any(stepped):
            raise LossContractError(
                "`training_step` stepped an optimizer of the model without `self.manual_backward(loss)`, so the term"
                " was not added to any loss: call it instead of `loss.backward()`."
            )
        return returned.loss if isinstance(returned, StepOutput) else returned

    def _manual_backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        backward = self._original("manual_backward")
        if self.module.automatic_optimization or not self.module.training:
            return backward(loss, *args, **kwargs)
        if self._call is None:
            raise LossContractError(
                "`manual_backward` was called a second time in one training_step, or outside of it, but the term"
                " belongs to one loss per step: add up the losses, or call a GGCRWrapper in training_step yourself."
            )
        (step_args, step_kwargs), self._output = self._call, loss
        try:
            joined = self._with_term(step_args, step_kwargs)
        finally:
            self._call = self._output = None
        return backward(joined, *args, **kwargs)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves the state; Lightning writes only the first process's checkpoint, so it gets all generators."""
        self._original("on_save_checkpoint")(checkpoint)
        state = self.wrapper.get_extra_state()
        generators = [state["consistency"]]
        if process_count() > 1:
            generators *= process_count()
            dist.all_gather_object(generators, state["consistency"])
        checkpoint[CHECKPOINT_KEY] = {"step": state["step"], "consistency": generators}

    def _on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._original("on_load_checkpoint")(checkpoint)
        state = checkpoint.get(CHECKPOINT_KEY)
        # `trainer.test(ckpt_path=...)` and the like need no term. Without a trainer, training may be about to resume.
        fitting = getattr(getattr(self._trainer(), "state", None), "fn", None) in (None, "fit")
        if state is None and not (fitting and self.module.strict_loading):
            return
        if not isinstance(state, Mapping) or not isinstance(state.get("consistency"), list):
            raise StateError(
                f"the checkpoint holds {type(state).__name__} under {CHECKPOINT_KEY!r} instead of an attached term's"
                " state: it was saved without one. To start a new term from its weights, load them before `attach`,"
                " or set `module.strict_loading = False`."
            )
        rank = dist.get_rank() if process_count() > 1 else 0
        known = state["consistency"]
        # With more processes than before, the added ones keep the generator made from their seed.
        own = known[rank] if rank < len(known) else self.wrapper.consistency.state_dict()
        self.wrapper.set_extra_state({**state, "consistency": own})


class _Replacement:
    """Replaces one method in the ``__dict__`` of one module.

    Lightning follows ``__wrapped__`` to find the signature and to see whether a module overrides a method. Unlike a
    closure, an object of a class is pickled and deep-copied together with the module.
    """

    def __init__(self, module: Any, name: str, function: Callable[..., Any]) -> None:
        self.own = name in vars(module)
        self.__wrapped__: Callable[..., Any] = getattr(module, name)
        self.function = function  # a method of the handle

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class _SkippedError(Exception):
    """Raised if the module's training_step returned None."""

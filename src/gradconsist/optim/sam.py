"""`SAM`: steps with the gradient from where the loss is about worst in a ball around the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from gradconsist._inputs.options import check_choice, check_number
from gradconsist._inputs.precision import wide
from gradconsist.errors import ConfigError, StateError


class SAM(Optimizer):
    """Wraps an optimizer to train by sharpness-aware minimisation (SAM).

    With g the gradient at the weights w, all parameters as one flat vector, a step is

        e = rho * g / ||g||                                   (adaptive: e = rho * w^2 g / || |w| g ||)
        w <- base step from w by the gradient at w + e

    and -e instead of e in a group with ``maximize=True``. The weights are saved and restored bitwise, so a step costs
    one copy of them, plus two forwards and backwards. If the gradient is zero or not finite, e is 0 and the base
    optimizer takes its normal step.

    ``step(closure)`` does all of this. If your loop needs another order, call `first_step`, `restore` and
    `second_step`: docs/guides/penalties-and-sam.md shows how with a GradScaler, several processes and BatchNorm.

    Args:
        base: any optimizer, except those that need a closure themselves (LBFGS).
        rho: radius of the ball, at least 0; a group of `base` may set its own under the key ``"rho"``.
        adaptive: scale each coordinate by its weight (ASAM); a group may set its own under ``"adaptive"``.
        model: a model whose running statistics should not change in the second forward of ``step(closure)``.

    Attributes:
        base: the optimizer that takes the steps.

    Raises:
        ConfigError: an argument has an invalid value.

    Source: Foret, Kleiner, Mobahi and Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving
    Generalization", ICLR 2021, algorithm 1; adaptive: Kwon, Kim, Park and Choi, "ASAM", ICML 2021, eq. (6) without the
    stabiliser eta.
    """

    def __init__(
        self, base: Optimizer, *, rho: float = 0.05, adaptive: bool = False, model: nn.Module | None = None
    ) -> None:
        if not isinstance(base, Optimizer) or isinstance(base, SAM | torch.optim.LBFGS):
            raise ConfigError(
                f"`base` is {base!r}: pass an optimizer that takes a step from a gradient, such as"
                " torch.optim.SGD(model.parameters(), lr=0.1)."
            )
        check_number("rho", rho, least=0.0)
        check_choice("adaptive", adaptive, (True, False))
        if model is not None and not isinstance(model, nn.Module):
            raise ConfigError(f"`model` is of type {type(model).__name__}: pass the module, or None.")
        self.base = base
        self.model = model
        self._before: dict[Tensor, Tensor] = {}
        super().__init__(base.param_groups, {**base.defaults, "rho": rho, "adaptive": adaptive})
        for group in base.param_groups:
            check_number("rho", group["rho"], least=0.0)

    # Read from the base optimizer each time, since it may replace them; torch's constructor assigns empty ones.
    param_groups: Any = property(lambda self: self.base.param_groups, lambda self, _: None)
    state: Any = property(lambda self: self.base.state, lambda self, _: None)

    @property
    def perturbed(self) -> bool:
        """Whether the weights are currently moved by e, for the second pass."""
        return bool(self._before)

    @torch.no_grad()
    def first_step(self, *, zero_grad: bool = True) -> Tensor:
        """Moves the weights by e, clears the gradients unless ``zero_grad=False``, and returns ||g|| (|| |w| g ||).

        Raises:
            ConfigError: the weights are already moved.
        """
        if self.perturbed:
            raise ConfigError("`first_step` was called twice: call `second_step()` or `restore()` in between.")
        scaled = [
            (parameter, group, _ascent(parameter, group.get("adaptive", self.defaults["adaptive"])))
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        norm = get_total_norm([length for _, _, (_, length) in scaled])
        if float(norm) > 0 and bool(torch.isfinite(norm)):
            for parameter, group, (direction, _) in scaled:
                self._before[parameter] = parameter.detach().clone()
                # Divide in float32 or wider, because a half-precision norm may overflow.
                move = direction * (group.get("rho", self.defaults["rho"]) / norm.to(direction.device))
                # What is maximised is worst where it is smallest.
                parameter.add_(move.to(parameter.dtype), alpha=-1 if group.get("maximize") else 1)
        if zero_grad:
            self.zero_grad()
        return norm

    @torch.no_grad()
    def restore(self) -> None:
        """Restores the weights bitwise; does nothing if they are not moved."""
        for parameter, value in self._before.items():
            parameter.copy_(value)
        self._before = {}

    def second_step(self) -> None:
        """Restores the weights and takes the base optimizer's step with the current gradient."""
        self.restore()
        self.base.step()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one whole step, and returns the closure's first return value: the loss at the weights themselves.

        `closure` clears the gradients, computes the loss, calls backward and returns the loss. It is called twice: if
        your method counts its calls or remembers something, restore its state before the second call.

        Raises:
            ConfigError: there is no closure.
        """
        if closure is None:
            raise ConfigError(
                "`SAM.step` needs a closure, because it evaluates the loss twice: pass one, or call `first_step` and"
                " `second_step` (with a GradScaler: `restore`, then `scaler.step(sam.base)`)."
            )
        with torch.enable_grad():
            loss = closure()
        try:
            self.first_step()
            with torch.enable_grad(), nullcontext() if self.model is None else kept_running_statistics(self.model):
                closure()
        except BaseException:
            self.restore()
            raise
        self.second_step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Returns the base optimizer's state, whose groups also hold `rho` and `adaptive`.

        Raises:
            StateError: called between the two passes, while the weights are moved.
        """
        if self.perturbed:
            raise StateError("the weights are perturbed: call `second_step()` or `restore()` before `state_dict()`.")
        return self.base.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what `state_dict` of a SAM around the same kind of optimizer returned, or raises a `StateError`."""
        groups = state_dict.get("param_groups", []) if isinstance(state_dict, Mapping) else []
        if not groups or not all({"rho", "adaptive"} <= set(group) for group in groups):
            raise StateError(
                "`state_dict` has groups without 'rho' and 'adaptive': pass what `SAM.state_dict` returned."
            )
        self.restore()
        self.base.load_state_dict(dict(state_dict))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer, with its own `rho` and `adaptive` or those of the constructor."""
        for key in ("rho", "adaptive"):
            param_group.setdefault(key, self.defaults[key])
        if not any(param_group is group for group in self.base.param_groups):  # as torch does in its constructor
            self.base.add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {"base": self.base, "model": self.model, "_before": self._before, "defaults": self.defaults}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "param_groups": state["base"].param_groups, "state": state["base"].state})

    def __repr__(self) -> str:
        return f"SAM({self.base!r})"


def _ascent(parameter: Tensor, adaptive: bool) -> tuple[Tensor, Tensor]:
    """Returns the direction of e for one parameter, and its part of the norm; in float32 or wider."""
    gradient: Any = parameter.grad
    if gradient.is_sparse:
        gradient = gradient.coalesce().to_dense()
    gradient = wide(gradient)
    if not adaptive:
        return gradient, torch.linalg.vector_norm(gradient)
    size = parameter.detach().abs().to(gradient.dtype)
    return size.square() * gradient, torch.linalg.vector_norm(size * gradient)


@contextmanager
def kept_running_statistics(model: nn.Module) -> Iterator[None]:
    """Keeps forwards in the block from changing the running statistics of BatchNorm and InstanceNorm layers.

    The layers still normalise as in their mode, but update copies. The backward may run inside or after the block.
    `model` is any module, also one wrapped by DDP.

    Example:
        >>> norm = nn.BatchNorm1d(3)
        >>> with kept_running_statistics(norm):
        ...     y = norm(torch.randn(8, 3))
        >>> norm.running_mean
        tensor([0., 0., 0.])
    """
    own = [
        (module, name, buffer)
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        # Swap in copies instead of writing values back: what autograd has saved must not change before the backward.
        for module, name, buffer in own:
            module._buffers[name] = buffer.clone()
        yield
    finally:
        for module, name, buffer in own:
            module._buffers[name] = buffer

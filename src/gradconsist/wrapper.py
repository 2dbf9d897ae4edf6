"""`GGCRWrapper`: adds gradient consistency to any semi-supervised method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradconsist._consistency.call import Blend
from gradconsist._consistency.sharing import difference, sharing_obstacle, unlabeled_elsewhere
from gradconsist._forward.isolation import uncompiled
from gradconsist._forward.observer import Observer
from gradconsist._forward.randomness import preserved_randomness
from gradconsist._inputs.options import check_choice, check_count, check_number
from gradconsist._inputs.parameters import holds, trainable_parameters
from gradconsist._inputs.schedules import warmup_then_ramp
from gradconsist._refusals.loading import check_keys
from gradconsist.errors import ConfigError, LossContractError, StateError
from gradconsist.loss import GradientConsistencyLoss
from gradconsist.types import SSLBatch, StepOutput, UnlabeledLoss, ViewPair

PairFunction = Callable[[tuple[Any, ...], dict[str, Any], Any], ViewPair | None]


class GGCRWrapper(nn.Module):
    """Adds ``lambda(t) * L_g`` to the loss of a method that you call once per step.

    ``out = wrapper(...)`` calls ``method(...)`` with the same arguments and returns a `StepOutput`. During the warm-up,
    with ``weight=0``, in eval mode, or if a step has no pair, only the method runs: its loss, gradients, buffers,
    random stream and state are bitwise the same as without the wrapper. There is one exception, which leaves no trace:
    on the first training step with pairs, the wrapper tries the term on one of them. So a missing `pair_fn`, wrong
    shapes or a model that cannot be compared show up right away, not after the warm-up.

    You keep control of the optimizer, GradScaler, gradient accumulation and the distributed wrapper
    (``DDP(wrapper)``).

    Args:
        method: any callable. It returns a `StepOutput`, a scalar tensor, a mapping with ``"loss"``, or a tuple that
            starts with one of these. If it is a module, the wrapper registers it: its parameters and state become part
            of the wrapper's.
        consistency: the term. Its ``model`` should be the one that the method trains.
        weight: lambda after warm-up and ramp.
        warmup_steps: number of steps of this wrapper before the term is added.
        ramp_steps: number of steps after the warm-up over which lambda grows linearly.
        every: add the term only on every k-th step, multiplied by k, so that its mean does not change.
        gate: "method" weights pairs as the method did (its confidence mask); "all" weights every pair 1.
        pair_fn: ``(args, kwargs, output) -> ViewPair | None``, for methods that do not return a `StepOutput` with a
            pair.
        share: whether steps with the term take the unlabeled loss from the term's own pass, so that the method forwards
            labeled and weak inputs only (FixMatch, FlexMatch, FreeMatch with ``fairness_weight=0``, SoftMatch, UDA).
            "auto" does so where the step stays the same to rounding: no BatchNorm in batch mode, no dropout or other
            chance in train mode, no option of the loss that leaves strong views out. True demands it and accepts two
            differences: with BatchNorm in batch mode, the unlabeled loss takes the comparison's joint statistics as
            constants, while the labeled loss and the running statistics lack the strong views; with ``dropout="on"``,
            the unlabeled loss has another draw. False never shares.

    Attributes:
        step: number of calls in train mode so far; part of ``state_dict()``.
        unshared: why the last step with the term computed the unlabeled loss in a separate pass; None if it did not.

    Raises:
        ConfigError: an option has an invalid value, or ``share=True`` is impossible; the latter at the first step if it
            depends on the model.

    Example:
        >>> import torch
        >>> from gradconsist import SSLBatch
        >>> from gradconsist.methods import FixMatch
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> wrapper = GGCRWrapper(FixMatch(model, threshold=0.3), GradientConsistencyLoss(model), warmup_steps=0)
        >>> u = torch.randn(6, 4)
        >>> out = wrapper(SSLBatch(torch.randn(2, 4), torch.tensor([0, 1]), u, u + 0.1))
        >>> out.loss.backward()
        >>> wrapper.step, float(out.logs["ggcr_weight"])
        (1, 0.1)
    """

    def __init__(
        self,
        method: Callable[..., Any],
        consistency: GradientConsistencyLoss,
        *,
        weight: float = 0.1,
        warmup_steps: int = 1000,
        ramp_steps: int = 0,
        every: int = 1,
        gate: Literal["method", "all"] = "method",
        pair_fn: PairFunction | None = None,
        share: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        if not callable(method):
            raise ConfigError(
                f"`method` is of type {type(method).__name__}: pass a module or function that returns a step's loss."
            )
        if not isinstance(consistency, GradientConsistencyLoss):
            raise ConfigError(f"`consistency` is of type {type(consistency).__name__}: pass a GradientConsistencyLoss.")
        if consistency.settings.reduction == "none":
            raise ConfigError("`consistency` has reduction='none': the wrapper adds a scalar, use 'mean' or 'sum'.")
        trained = trainable_parameters(consistency.settings.model).values()
        if isinstance(method, nn.Module) and not holds(method, trained):
            raise ConfigError(
                "`consistency` compares a model that `method` does not train: give both the same model object."
            )
        if pair_fn is not None and not callable(pair_fn):
            raise ConfigError(
                f"`pair_fn` is of type {type(pair_fn).__name__}: pass a function (args, kwargs, output) -> ViewPair."
            )
        self.method = method
        self.consistency = consistency
        self.weight = check_number("weight", weight, least=0.0)
        self.warmup_steps = check_count("warmup_steps", warmup_steps, least=0)
        self.ramp_steps = check_count("ramp_steps", ramp_steps, least=0)
        self.every = check_count("every", every)
        self.gate = check_choice("gate", gate, ("method", "all"))
        self.pair_fn = pair_fn
        self.share = check_choice("share", share, ("auto", True, False))
        self.step = 0
        self.unshared: str | None = None
        self._tried = False
        if share is True:
            self._shares((), {})  # raises what shows without a batch

    def current_weight(self) -> float:
        """Returns lambda for the next step: 0 in the warm-up, in eval mode and on steps that `every` skips."""
        if not self.training or (self.step - self.warmup_steps) % self.every:
            return 0.0
        return self.every * warmup_then_ramp(self.step, self.weight, self.warmup_steps, self.ramp_steps)

    def forward(self, *args: Any, **kwargs: Any) -> StepOutput:
        """Runs one step of the method with the same arguments, and adds the term if it is due.

        Returns:
            The loss, the method's pair and its logs. ``ggcr_weight`` is added to the logs, and if the term was
            computed also ``ggcr_loss``, ``ggcr_cosine``, ``ggcr_degenerate`` and ``ggcr_pairs``.

        Raises:
            LossContractError: the method returned no loss, or neither it nor `pair_fn` supplies a pair.
            GradConsistError: the term cannot be computed. Raised on the first step already, even during the warm-up.
        """
        weight = self.current_weight()
        trial = not (weight > 0 or self._tried) and self.training and self.weight > 0 and torch.is_grad_enabled()
        settings = self.consistency.settings
        observe = (weight > 0 or trial) and settings.batchnorm == "observed"
        observer = Observer(settings.model) if observe else nullcontext()
        if trial and self.share is True:
            self._shares(args, kwargs)  # raises during the warm-up already
        shared = weight > 0 and self._shares(args, kwargs)
        with observer:
            output, unlabeled = self._without_strong(args, kwargs) if shared else (self.method(*args, **kwargs), None)
        base = as_step_output(output)
        if trial:
            self._try(args, kwargs, output, base, observer)
        pair = self._pair(args, kwargs, output, base) if weight > 0 else None
        if pair is None:
            result = base._replace(logs={**base.logs, "ggcr_weight": 0.0})
        elif unlabeled is not None:
            result = self._shared_step(base, pair, weight, unlabeled)
        else:
            statistics = observer.observed(pair) if isinstance(observer, Observer) else None
            term = self.consistency.evaluate(*self._gated(pair), statistics=statistics)
            self._tried = True
            logs = {**base.logs, "ggcr_weight": weight, **self._logs(term)}
            result = StepOutput(base.loss + weight * term, pair, logs)
        if self.training:  # last, so that failed steps do not count
            self.step += 1
        return result

    @uncompiled
    def _without_strong(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, UnlabeledLoss]:
        """Runs a step of the method that leaves the strong views out."""
        with unlabeled_elsewhere(self.method, self.consistency.settings) as unlabeled:
            return self.method(*args, **kwargs), unlabeled

    def _shared_step(self, base: StepOutput, pair: ViewPair, weight: float, unlabeled: UnlabeledLoss) -> StepOutput:
        """Completes a step whose strong views the method left out."""
        factors = unlabeled.weight / len(unlabeled.weight)
        found = self.consistency.blended(self._gated(pair), Blend(weight, unlabeled.factor * factors))
        self._tried = True
        loss = (factors * found.losses).sum() + unlabeled.constant
        logs = {**base.logs, "loss_unsupervised": loss.detach(), "ggcr_weight": weight, **self._logs(found.term)}
        return StepOutput(base.loss + found.loss + unlabeled.factor * unlabeled.constant, pair, logs)

    @uncompiled
    def _shares(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Tells whether a step takes both losses from one pass."""
        if self.share is False:
            return False
        batch = args[0] if args else kwargs.get("batch")
        obstacle = self._obstacle()
        if obstacle is None and isinstance(batch, SSLBatch):  # the method refuses anything else
            own = self.consistency
            try:
                obstacle = difference(own.settings, own._probed, batch.strong, demanded=self.share is True)
            except Exception as error:  # of the model, say, which the ordinary step will raise, too
                obstacle = f"the model could not be tried ({type(error).__name__}: {error})"
        self.unshared = obstacle
        if obstacle is not None and self.share is True:
            raise ConfigError(f'`share=True` is impossible: {obstacle}. Remove that, or use `share="auto"`.')
        return obstacle is None

    def _obstacle(self) -> str | None:
        """Says what forbids a shared step, as far as it shows without running the model."""
        if self.pair_fn is not None:
            return "`pair_fn` may supply other pairs than the method trains on"
        if type(self.consistency).evaluate is not GradientConsistencyLoss.evaluate:
            return f"{type(self.consistency).__name__} overrides `evaluate`"
        return sharing_obstacle(self.method, self.consistency.settings, demanded=self.share is True)

    def _try(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, base: StepOutput, observer: object
    ) -> None:
        """Tries the term on one pair, on the first step and until a trial was conclusive."""
        # A `pair_fn` would not run yet, so what it draws must not change the random stream.
        with preserved_randomness(base.loss.device, seed=0):
            pair = self._pair(args, kwargs, output, base)
        if pair is not None:
            statistics = observer.observed(pair) if isinstance(observer, Observer) else None
            self._tried = self.consistency.try_on_one_pair(self._gated(pair), statistics)

    def _pair(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, base: StepOutput) -> ViewPair | None:
        if self.pair_fn is not None:
            pair = self.pair_fn(args, kwargs, output)
            if pair is not None and not isinstance(pair, ViewPair):
                raise LossContractError(
                    f"`pair_fn` returned {type(pair).__name__}: return ViewPair(weak, strong, target, weight), or"
                    " None for a step without a pair."
                )
            return pair
        if isinstance(output, StepOutput) or (isinstance(output, tuple) and isinstance(output[0], StepOutput)):
            return base.pair
        raise LossContractError(
            f"`method` returned {type(output).__name__}, which holds no views to compare: return a StepOutput with a"
            " ViewPair, or give `pair_fn(args, kwargs, output) -> ViewPair | None`."
        )

    def _gated(self, pair: ViewPair) -> ViewPair:
        return pair if self.gate == "method" else pair._replace(weight=None)

    def _logs(self, term: Tensor) -> dict[str, float | Tensor]:
        record = self.consistency.last
        if record is None:
            return {}
        return {
            "ggcr_loss": term.detach(),
            "ggcr_cosine": record.cosine.nanmean(),
            "ggcr_degenerate": record.degenerate.sum(),
            "ggcr_pairs": record.compared.sum(),
        }

    def get_extra_state(self) -> dict[str, Any]:
        """Returns the step counter, the loss's state, and that of a method which has a state but is not a module."""
        state: dict[str, Any] = {"step": self.step, "consistency": self.consistency.state_dict()}
        if self._has_own_state():
            state["method"] = self.method.state_dict()  # type: ignore[attr-defined]
        return state

    def set_extra_state(self, state: Any) -> None:
        """Restores what `get_extra_state` returned, or raises a `StateError`; ``load_state_dict`` calls it."""
        expected = {"step", "consistency"} | ({"method"} if self._has_own_state() else set())
        if not isinstance(state, Mapping) or set(state) != expected:
            found = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise StateError(
                f"`state_dict` holds {found} for GGCRWrapper, expected {sorted(expected)}: load the wrapper's own."
            )
        if not isinstance(state["step"], int) or state["step"] < 0:
            raise StateError(f"`state_dict` holds the step {state['step']!r}: load the wrapper's own.")
        self.consistency.load_state_dict(state["consistency"])
        self.step = state["step"]
        if "method" in expected:
            self.method.load_state_dict(state["method"])  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Restores what `state_dict` returned; arguments and result are torch's.

        Raises:
            StateError: the state belongs to something else, such as the bare model or the method.
        """
        check_keys(self, state_dict, "wrapper")
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _has_own_state(self) -> bool:
        stateful = hasattr(self.method, "state_dict") and hasattr(self.method, "load_state_dict")
        return stateful and not isinstance(self.method, nn.Module)


def as_step_output(output: Any) -> StepOutput:
    """Converts a method's return value, see `GGCRWrapper`; the result has no pair unless `output` is a `StepOutput`."""
    loss: Any = output
    if isinstance(output, StepOutput):
        loss = output.loss
    elif isinstance(output, tuple) and output:
        return as_step_output(output[0])
    elif isinstance(output, Mapping):
        loss = output.get("loss")
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise LossContractError(
            f"`method` returned {type(output).__name__} whose loss is {found}: return a StepOutput, a scalar tensor, a"
            " mapping with a scalar 'loss', or a tuple that starts with one of these."
        )
    return output if isinstance(output, StepOutput) else StepOutput(loss)

"""BatchNorm's joint statistics as a part of what L_g is differentiated for.

The gradients that are compared hold the statistics s constant, so L_g is a function F(p, s) of the parameters p and of
s. By the definition its derivative is that of F for p. But s depends on p, and what a step changes is F(p, s(p)):

    d L_g / dp = dF/dp + (ds/dp)^T dF/ds

The second summand needs dF/ds, which the chunks give like any other derivative, and one forward and backward of all
pairs for the product.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gradconsist.batch import concatenate
from gradconsist.errors import ConfigError
from gradconsist.forward import PerSampleForward
from gradconsist.fused import GradientBuffer
from gradconsist.normalization import BatchNormPolicy, Statistics
from gradconsist.types import Inputs
from gradconsist.validation import check_choice


def check_through_statistics(wanted: object, batchnorm: BatchNormPolicy, dropout: str) -> None:
    """Refuses options with which there are no statistics of the call's own to differentiate.

    Args:
        wanted: the option `through_statistics`.
        batchnorm: policy.
        dropout: "off" or "on".

    Raises:
        ConfigError: `wanted` is no boolean; the statistics are given, or their forward is another one each time.
    """
    check_choice("through_statistics", wanted, (True, False))
    if not wanted:
        return
    if batchnorm in ("running", "observed") or dropout == "on":
        given = f"batchnorm={batchnorm!r}" if dropout == "off" else "dropout='on'"
        raise ConfigError(
            f"`through_statistics=True` does not go with `{given}`: only joint statistics of the call itself, in a"
            " forward without chance, can be differentiated. Use `batchnorm='auto'` or 'batch' and `dropout='off'`."
        )


def check_can_follow(*, given: bool, float16: bool) -> None:
    """Refuses a call whose statistics cannot be differentiated.

    Args:
        given: whether the statistics are the caller's.
        float16: whether some of the call is computed in float16.

    Raises:
        ConfigError: one of both.
    """
    if given:
        raise ConfigError(
            "`through_statistics=True` met given `statistics`, whose dependence on the parameters is not known here:"
            " leave one of both out."
        )
    if float16:
        raise ConfigError(
            "`through_statistics=True` was not proven in float16, where its parts may underflow: use bfloat16 or"
            " float32."
        )


class StatisticsPath:
    """The joint statistics of a call, on the way from the parameters to L_g.

    Args:
        forward: whose BatchNorm calls answer with recorded statistics.
        weak: all weak views of the call.
        strong: all strong views.
        parameters: of the model, by name.
    """

    def __init__(
        self, forward: PerSampleForward, weak: Inputs, strong: Inputs, parameters: Mapping[str, Tensor]
    ) -> None:
        self._forward = forward
        self._inputs = weak, strong
        self._parameters = parameters

    def enter(self, *, cut: bool) -> list[Tensor]:
        """Makes the recorded statistics differentiable.

        Args:
            cut: True puts leaves in their place, for which the chunks can be differentiated, and `follow` has to
                come after the chunks; False gives them their graph, and nothing is left to do.

        Returns:
            The leaves: mean and variance of each call.
        """
        if not cut:
            # Stand-ins of their own lead to the parameters: through those of the chunks, an engine that asks autograd
            # for a sample's gradient would get the statistics' part in it, too.
            self._record({name: parameter.view_as(parameter) for name, parameter in self._parameters.items()})
            return []
        calls = self._forward.batchnorm
        calls.recorded = [
            each._replace(mean=each.mean.detach().requires_grad_(), variance=each.variance.detach().requires_grad_())
            for each in calls.recorded or []
        ]
        return _flat(calls.recorded)

    def follow(self, buffer: GradientBuffer) -> None:
        """Adds (ds/dp)^T dF/ds to the gradient of chunks that were differentiated for the leaves, too."""
        calls = self._forward.batchnorm
        used = calls.recorded
        buffer.follow(self._record(self._forward.parameters))
        calls.recorded = used

    def _record(self, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        own, self._forward.parameters = self._forward.parameters, dict(parameters)
        try:
            self._forward.output(concatenate(*self._inputs), record=True)
        finally:
            self._forward.parameters = own
        return _flat(self._forward.batchnorm.recorded or [])


def _flat(statistics: list[Statistics]) -> list[Tensor]:
    return [part for each in statistics for part in (each.mean, each.variance)]

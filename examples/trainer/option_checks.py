"""What both trainers refuse in their options, and what an option of several parts means."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gradconsist import RandomProjection
from trainer.errors import OptionError

if TYPE_CHECKING:
    from trainer.config import Config


def projection(config: Config) -> RandomProjection | None:
    """The projection that `--ggcr-projection` names, its matrices drawn from `--seed` and anew in every step.

    Args:
        config: Options.

    Returns:
        It, or None.

    Raises:
        OptionError: The option is not of the form KIND:DIM, or there is no such projection.
    """
    if config.ggcr_projection is None:
        return None
    kind, _, dim = config.ggcr_projection.partition(":")
    try:
        return RandomProjection(int(dim), kind, seed=config.seed, resample_every=1)  # type: ignore[arg-type]
    except ValueError as error:  # also of `int`
        raise OptionError(
            f"--ggcr-projection {config.ggcr_projection!r}: write KIND:DIM, for example kronecker:16 ({error})."
        ) from error


def check_options(config: Config) -> None:
    """Refuse values that no trainer can honour.

    Args:
        config: The options as given.

    Raises:
        OptionError: Naming the option, what was found and what to write instead.
    """

    def positive(*names: str) -> None:
        for name in names:
            value = getattr(config, name)
            if value is not None and not value > 0:
                raise OptionError(f"--{name.replace('_', '-')} must be above 0; found {value}.")

    def not_negative(*names: str) -> None:
        for name in names:
            value = getattr(config, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise OptionError(f"--{name.replace('_', '-')} must be 0 or more; found {value}.")

    positive("image_size", "steps", "batch_size", "unlabeled_ratio", "lr", "bn_momentum")
    positive("jacobian_projections", "sam_rho")
    positive("ggcr_every", "ggcr_max_pairs", "eval_every", "checkpoint_every", "log_every")
    positive("temperature", "stop_after_steps", "stop_after_minutes")
    not_negative("seed", "workers", "unlabeled_weight", "unlabeled_ramp", "brier_weight", "weight_decay")
    not_negative("jacobian_weight", "ggcr_weight", "ggcr_warmup", "ggcr_ramp")
    if config.ggcr_through_statistics and config.amp == "fp16":
        raise OptionError("--ggcr-through-statistics has not been verified in float16: use --amp bf16 or off.")
    if config.seed >= 2**63:
        raise OptionError(f"--seed must be below 2^63; found {config.seed}.")
    if not 0 <= config.ema < 1:
        raise OptionError(f"--ema is a decay in [0, 1), for example 0.999; found {config.ema}.")
    if config.threshold is not None and not 0 <= config.threshold <= 1:
        raise OptionError(f"--threshold is a probability in [0, 1]; found {config.threshold}.")
    if config.method_decay is not None and not 0 <= config.method_decay < 1:
        raise OptionError(f"--method-decay is a decay in [0, 1), for example 0.999; found {config.method_decay}.")
    if config.bn_momentum is not None and config.bn_momentum > 1:
        raise OptionError(f"--bn-momentum is in (0, 1] (weight of the new statistics); found {config.bn_momentum}.")
    if config.optimizer != "sam" and config.sam_rho != type(config).sam_rho:
        raise OptionError(f"--sam-rho {config.sam_rho}: --optimizer {config.optimizer} has no ball; leave it out.")
    if config.jacobian_weight == 0 and config.jacobian_projections != type(config).jacobian_projections:
        raise OptionError(
            f"--jacobian-projections {config.jacobian_projections}: there is no penalty; give --jacobian-weight, too."
        )
    projection(config)

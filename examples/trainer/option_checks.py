"""What the trainer refuses in its options, and what an option of several parts means."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from os.path import realpath
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import OptionError

if TYPE_CHECKING:
    from gradconsist import RandomProjection
    from trainer.config import Config

GROUP_NORM = "-gn"
# What numbers must be, and of which options.
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "must be above 0": (
        lambda x: x > 0,
        "image_size steps batch_size unlabeled_ratio lr bn_momentum jacobian_projections sam_rho ggcr_every "
        "ggcr_max_pairs eval_every checkpoint_every log_every temperature stop_after_steps stop_after_minutes "
        "clip_norm accumulate",
    ),
    "must be 0 or more": (
        lambda x: x >= 0,
        "seed workers unlabeled_weight unlabeled_ramp brier_weight weight_decay jacobian_weight ggcr_weight "
        "ggcr_warmup ggcr_ramp",
    ),
    "must be below 2^63": (lambda x: x < 2**63, "seed"),
    "is a decay in [0, 1), for example 0.999": (lambda x: 0 <= x < 1, "ema method_decay"),
    "is a probability in [0, 1]": (lambda x: 0 <= x <= 1, "threshold"),
    "is in (0, 1] (weight of the new statistics)": (lambda x: x <= 1, "bn_momentum"),
    "is a share in (0, 1], for example 0.01": (lambda x: 0 < x <= 1, "label_fraction"),
    "is a share in [0, 1), for example 0.2": (lambda x: 0 <= x < 1, "hold_out"),
    "is a share in (0, 1], for example 0.08": (lambda x: 0 < x <= 1, "crop_scale"),
}


def is_wide(name: str) -> bool:
    """Whether a name is meant to be that of a wide residual network."""
    return name.lower().startswith("wrn") and ":" not in name


def parse_arch(name: str) -> tuple[int, int]:
    """Read `wrn-DEPTH-WIDTH`, or `wrn-DEPTH-WIDTH-gn`."""
    match = re.fullmatch(rf"wrn-(\d+)-(\d+)({GROUP_NORM})?", name)
    if match is None:
        raise OptionError(f"--arch {name!r} is unknown: write wrn-DEPTH-WIDTH, for example wrn-28-2, or wrn-28-2-gn.")
    depth, width = int(match[1]), int(match[2])
    if depth < 10 or (depth - 4) % 6 or width < 1:
        raise OptionError(
            f"--arch {name!r}: the depth must be 10, 16, 22, 28, ... (6 n + 4) and the width at least 1; "
            f"found depth {depth} and width {width}."
        )
    return depth, width


def projection(config: Config) -> RandomProjection | None:
    """The projection that `--ggcr-projection` names, its matrices drawn from `--seed` and anew in every step."""
    if config.ggcr_projection is None:
        return None
    from gradconsist import RandomProjection  # here: it imports torch, which --help does without

    kind, _, dim = config.ggcr_projection.partition(":")
    try:
        return RandomProjection(int(dim), kind, seed=config.seed, resample_every=1)  # type: ignore[arg-type]
    except ValueError as error:  # also of `int`
        raise OptionError(
            f"--ggcr-projection {config.ggcr_projection!r}: write KIND:DIM, for example kronecker:16 ({error})."
        ) from error


def check_options(config: Config, processes: int) -> None:
    """Refuse values that the trainer cannot honour."""
    for words, (fits, names) in _RANGES.items():
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not (-math.inf < value < math.inf and fits(value)):
                raise OptionError(f"--{name.replace('_', '-')} {words}; found {value}.")
    if config.ggcr_through_statistics and config.amp == "fp16":
        raise OptionError("--ggcr-through-statistics has not been verified in float16: use --amp bf16 or off.")
    if config.optimizer != "sam" and config.sam_rho != type(config).sam_rho:
        raise OptionError(f"--sam-rho {config.sam_rho}: --optimizer {config.optimizer} has no ball; leave it out.")
    if config.jacobian_weight == 0 and config.jacobian_projections != type(config).jacobian_projections:
        raise OptionError(
            f"--jacobian-projections {config.jacobian_projections}: there is no penalty; give --jacobian-weight, too."
        )
    projection(config)
    _check_data(config)
    _check_steps(config, processes)
    if processes > 1:
        _check_processes(config, processes)


def _check_data(config: Config) -> None:
    for part in ("train", "test", "val", "unlabeled") if config.dataset == "folder" and config.output else ():
        # Not `resolve`, which raises a RuntimeError for a link to itself.
        if Path(realpath(str(config.output))).is_relative_to(realpath(Path(config.data_dir, part))):
            raise OptionError(
                f"--output {config.output} lies among the images in {part}/, where its pictures would be trained on: "
                "give a folder outside."
            )
    if isinstance(config.labels, int) and config.labels < 1:
        raise OptionError(f"--labels must be above 0, or all; found {config.labels}.")
    ways = {name: getattr(config, name) for name in ("labels", "label_fraction", "label_file")}
    given = [f"--{name.replace('_', '-')} {value}" for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise OptionError(f"{' and '.join(given)}: give one of them.")
    if config.image_size is not None and config.dataset != "folder":
        raise OptionError(f"--image-size is for --dataset folder; --dataset {config.dataset} has a size of its own.")
    if config.feed == "memory":
        if config.crop_scale != type(config).crop_scale:
            raise OptionError(f"--crop-scale {config.crop_scale} is for --feed stream; leave it out.")
        return
    if config.dataset != "folder":
        raise OptionError(f"--feed stream is for --dataset folder; {config.dataset} fits into memory: leave it out.")
    if config.image_size is None:
        raise OptionError("--feed stream needs --image-size, the side of the images that the network sees: give 224.")
    if config.eval_statistics == "anew":
        raise OptionError("--eval-statistics anew reads training images from memory: give --feed memory.")


def _check_steps(config: Config, processes: int) -> None:
    if is_wide(config.arch):
        parse_arch(config.arch)
    if config.eval_statistics == "anew" and (config.arch.endswith(GROUP_NORM) or config.norm == "group"):
        raise OptionError(f"--eval-statistics anew: {config.arch} has no BatchNorm, so no statistics; leave it out.")
    if not 0 <= config.lr_warmup < config.steps:
        raise OptionError(
            f"--lr-warmup must be 0 or more and less than --steps {config.steps}; found {config.lr_warmup}."
        )
    if config.ggcr_chunk_size != "auto" and config.ggcr_chunk_size < 1:
        raise OptionError(f"--ggcr-chunk-size must be above 0, or auto; found {config.ggcr_chunk_size}.")
    if config.accumulate > 1 and (config.optimizer == "sam" or config.method == "meanteacher"):
        what = "--optimizer sam takes its two gradients of one batch"
        what = "--method meanteacher moves its teacher with every batch" if config.optimizer != "sam" else what
        raise OptionError(f"--accumulate {config.accumulate}: {what}; leave it out, or give a larger --batch-size.")
    if config.norm == "sync" and config.ggcr_weight > 0 and config.method != "supervised":
        raise OptionError(
            "--norm sync: gradient consistency does not gather the statistics of a SyncBatchNorm. Give --norm batch "
            "(each process by its own images), --norm group (no statistics), or --ggcr-weight 0."
        )


def _check_processes(config: Config, processes: int) -> None:
    if config.method == "mixmatch":
        raise OptionError("--method mixmatch draws at random on each process, and could not be resumed exactly.")
    for name, value, nothing in (
        ("optimizer", config.optimizer == "sam", "sgd"),
        ("jacobian-weight", config.jacobian_weight > 0, "0"),
        ("ggcr-batchnorm", config.ggcr_batchnorm == "observed", "auto"),
        ("ggcr-through-statistics", config.ggcr_through_statistics, "False"),
        ("eval-statistics", config.eval_statistics == "anew", "averaged"),
    ):
        if value:
            raise OptionError(
                f"--{name} {getattr(config, name.replace('-', '_'))} is not verified on {processes} processes: give "
                f"--{name} {nothing}, or start one process."
            )
    for name in ("batch_size", "ggcr_max_pairs"):
        value = getattr(config, name)
        if value is not None and value % processes:
            below = value - value % processes
            raise OptionError(
                f"--{name.replace('_', '-')} {value} is shared by {processes} processes (WORLD_SIZE) and must be a "
                f"multiple of their number: give {below + processes}, or start another number of processes."
            )

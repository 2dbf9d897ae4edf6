"""The options of `fixmatch_imagenet.py`: those of the CIFAR trainer, as far as they differ."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import Suppress

from trainer.config import HARMLESS, SHORT_RUN_STEPS, Config, Help, method_label
from trainer.defaults import method_defaults
from trainer.errors import OptionError
from trainer.option_checks import check_options

# MixMatch draws from a generator of its own on each process, which checkpoints here do not hold.
WITHOUT = ("mixmatch",)


@dataclass(frozen=True)
class ImageNetConfig(Config):
    """Every option of `fixmatch_imagenet.py`, with the defaults of the `paper` preset."""

    preset: Annotated[Literal["paper", "fixmatch"], Help(help="Defaults to start from.")] = "paper"
    data_dir: Annotated[str, Help(help="Holds train/CLASS/*.JPEG and val/CLASS/*.JPEG (or test/).")] = "imagenet"
    labels: Annotated[
        int, Help(help="Labeled images in all, the same number of each class. 0: --label-fraction decides.")
    ] = 0
    label_fraction: Annotated[float, Help(help="Share of each class that is labeled, at least one image.")] = 0.01
    label_file: Annotated[
        str | None, Help(help="Text file that names the labeled images, one file name a line, instead of a draw.")
    ] = None
    image_size: Annotated[int, Help(help="Side of the images that the network sees.")] = 224
    crop_scale: Annotated[float, Help(help="Smallest share of a photograph's area that a random crop takes.")] = 0.08
    strong: Annotated[
        Literal["randaugment", "weak"] | None,
        Help(help="Strong view: a weak view with torchvision's RandAugment(2, 10), or a second weak view."),
    ] = None
    arch: Annotated[str, Help(help="A classifier of torchvision.models, with random weights.")] = "resnet50"
    norm: Annotated[
        Literal["batch", "group", "sync"],
        Help(
            help="batch: BatchNorm, each process by its own images. group: GroupNorm in its place, the same for any "
            "number of processes. sync: SyncBatchNorm, on CUDA and without gradient consistency."
        ),
    ] = "batch"
    bn_momentum: Annotated[float, Help(help="BatchNorm momentum (torch's sense).")] = 0.1
    ggcr_max_pairs: Annotated[
        int | None,
        Help(help="Compare at most this many random pairs of a step, over all processes."),
    ] = None
    ggcr_batchnorm: Annotated[
        Literal["auto", "running"],
        Help(help="BatchNorm's statistics in the comparison; observed ones were not tried with several processes."),
    ] = "auto"
    ggcr_encoder: Annotated[
        str, Help(help="Parameters compared: encoder (all but the head), all, or a prefix of names, such as layer4.")
    ] = "encoder"
    ggcr_chunk_size: Annotated[
        int | Literal["auto"],
        Help(help="Pairs at a time. auto: the engine's choice, halved where a CUDA device runs out of memory."),
    ] = "auto"
    batch_size: Annotated[int, Help(help="Labeled images per step, over all processes.")] = 64
    lr: Annotated[float, Help(help="Learning rate after its warm-up; decays as cos(7 pi k / 16 K).")] = 0.03
    lr_warmup: Annotated[int, Help(help="Steps in which the learning rate rises linearly.")] = 1000
    weight_decay: Annotated[float | None, Help(help="On kernels only. None: 5e-4, fixmatch preset: 3e-4.")] = None
    eval_every: Annotated[int, Help(help="Steps between evaluations on the validation images.")] = 10_000
    checkpoint_every: Annotated[int, Help(help="Steps between checkpoints.")] = 1000
    elastic: Annotated[bool, Help(help="Continue a run also with another number of processes.")] = False

    # What the CIFAR trainer has and this one has not: no option, and always the value that does nothing.
    dataset: Suppress[Literal["folder"]] = "folder"
    ggcr_through_statistics: Suppress[Literal[False]] = False
    optimizer: Suppress[Literal["sgd"]] = "sgd"
    sam_rho: Suppress[float] = Config.sam_rho
    jacobian_weight: Suppress[float] = 0.0
    jacobian_projections: Suppress[int] = 1
    eval_statistics: Suppress[Literal["averaged"]] = "averaged"
    init_from: Suppress[None] = None
    init_part: Suppress[Literal["model"]] = "model"
    init_sha256: Suppress[None] = None
    # Not an option either: how many processes torchrun started, for the run directory to know.
    processes: Suppress[int] = 1


PRESETS: dict[str, ImageNetConfig] = {
    "paper": ImageNetConfig(),
    # FixMatch's reference values for ImageNet, but for the schedule (theirs falls in steps) and the magnitude of
    # RandAugment (theirs is random).
    "fixmatch": ImageNetConfig(preset="fixmatch", ggcr_weight=0.0),
}

_FIXMATCH: dict[str, Any] = {"unlabeled_ratio": 5, "unlabeled_ramp": 0, "weight_decay": 3e-4}
_FIXMATCH_METHOD: dict[str, Any] = {"threshold": 0.7, "unlabeled_weight": 10.0}

RUN_HARMLESS = HARMLESS | {"elastic", "processes"}  # the number of processes has a check of its own


def resolve(config: ImageNetConfig, processes: int = 1) -> ImageNetConfig:
    """Check the options and settle those that are None because they depend on others.

    Args:
        config: The options as given.
        processes: W.

    Returns:
        The options that a run stores.

    Raises:
        OptionError: Naming the option, what was found and what to write instead.
    """
    check_options(config)
    _check(config, processes)
    defaults = {**method_defaults(config.method, config.preset, config.steps), "weight_decay": 5e-4}
    defaults["strong"] = "weak" if defaults["strong"] == "weak" else "randaugment"
    if config.preset == "fixmatch":
        defaults |= _FIXMATCH | (_FIXMATCH_METHOD if config.method == "fixmatch" else {})
    defaults["ema_warmup"] = config.steps < SHORT_RUN_STEPS
    settled = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    if config.method == "supervised":
        settled["ggcr_weight"] = 0.0  # no second view, so nothing to compare
    config = dataclasses.replace(config, processes=processes, **settled)
    return config if config.output else dataclasses.replace(config, output=f"runs/{run_name(config)}")


def run_name(config: ImageNetConfig) -> str:
    """Name a run after the options that one varies most.

    Args:
        config: Resolved options, except `output`.

    Returns:
        For example `imagenet-0.01-fixmatch+ggcr-resnet50-seed0`.
    """
    from pathlib import Path

    labeled = Path(config.label_file).stem if config.label_file else str(config.labels or config.label_fraction)
    return f"{Path(config.data_dir).name}-{labeled}-{method_label(config)}-{config.arch}-seed{config.seed}"


def _check(config: ImageNetConfig, processes: int) -> None:
    if config.labels < 0:
        raise OptionError(f"--labels must be 0 or more; found {config.labels}.")
    if not 0 < config.label_fraction <= 1:
        raise OptionError(f"--label-fraction is a share in (0, 1], for example 0.01; found {config.label_fraction}.")
    if not 0 < config.crop_scale <= 1:
        raise OptionError(f"--crop-scale is a share in (0, 1], for example 0.08; found {config.crop_scale}.")
    if config.label_file is not None and config.labels:
        raise OptionError(f"--label-file {config.label_file} and --labels {config.labels}: give one of them.")
    if not 0 <= config.lr_warmup < config.steps:
        raise OptionError(
            f"--lr-warmup must be 0 or more and less than --steps {config.steps}; found {config.lr_warmup}."
        )
    if config.ggcr_chunk_size != "auto" and config.ggcr_chunk_size < 1:
        raise OptionError(f"--ggcr-chunk-size must be above 0, or auto; found {config.ggcr_chunk_size}.")
    if config.method in WITHOUT:
        raise OptionError(
            f"--method {config.method} draws at random on each process, and could not be resumed exactly."
        )
    for name in ("batch_size", "ggcr_max_pairs"):
        value = getattr(config, name)
        if value is not None and value % processes:
            below = value - value % processes
            raise OptionError(
                f"--{name.replace('_', '-')} {value} is shared by {processes} processes (WORLD_SIZE) and must be a "
                f"multiple of their number: give {below + processes}, or start another number of processes."
            )
    if config.norm == "sync" and config.ggcr_weight > 0 and config.method != "supervised":
        raise OptionError(
            "--norm sync: gradient consistency does not gather the statistics of a SyncBatchNorm. Give --norm batch "
            "(each process by its own images), --norm group (no statistics), or --ggcr-weight 0."
        )

"""The options of the trainer: one frozen record, what the presets change in it, and what it means.

`None` means "depends on other options"; `resolve` settles those, and a run stores and compares the resolved record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from os.path import realpath
from pathlib import Path
from typing import Any, Literal

import tyro

from trainer.option_checks import check_options

Preset = Literal["paper", "fixmatch", "demo"]

# Options that change no trained number: a resumed run may differ in them.
HARMLESS = frozenset(
    {
        "data_dir", "output", "device", "workers", "checkpoint_every", "log_every", "resume", "tensorboard", "progress",
        "stop_after_steps", "stop_after_minutes", "preset", "config", "init_from", "elastic", "check_images",
        "skip_damaged", "csv", "wandb", "mlflow",
        "processes",  # which is checked elsewhere
    }
)  # fmt: skip

# Below this many steps the reference's slow averages (BatchNorm 0.001, EMA 0.999) would still remember the start.
SHORT_RUN_STEPS = 50_000


@dataclass(frozen=True)
class Config:
    """Every option of the trainer, with the defaults of `fixmatch_cifar.py` and its `paper` preset."""

    # The comment beside or above an option is what --help says of it.
    preset: Preset = "paper"  # Defaults to start from; options given explicitly win.
    config: str | None = None  # JSON or YAML file of options, or the config.json of a run to repeat; options given win.
    # folder: DATA_DIR/train/CLASS/**, and perhaps test/CLASS/** (or val/) and unlabeled/**.
    dataset: Literal["cifar10", "cifar100", "digits", "folder"] = "cifar10"
    # memory: images are decoded once, to one size. stream: they are decoded whenever they are needed, and views are
    # random crops of the whole photograph; folder only.
    feed: Literal["memory", "stream"] = "memory"
    data_dir: str = "data"  # Folder of the data set (downloads go there).
    output: str | None = None  # Run directory. None: runs/<a name made of the options>.
    seed: int = 0  # Decides the split, the initial weights, the order and the augmentation.
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps, ...
    workers: int | None = None  # Processes that prepare batches. None: one per spare core. Never changes results.
    # Labeled images in all, the same number of each class; all: every image in a class folder. None: --label-fraction
    # or --label-file, else all where there is an unlabeled/, else 40.
    labels: int | Literal["all"] | None = None
    label_fraction: float | None = None  # Share of each class to label, at least one image.
    # Text file that names the labeled images, a path a line (a number, where there are no files).
    label_file: str | None = None
    hold_out: float = 0.0  # Share of the labeled images of each class to keep from training and choose `best` by.
    # folder: side of the images that the network sees. None: that of all images, which must be equal.
    image_size: int | None = None
    crop_scale: float = 0.08  # stream: smallest share of a photograph's area in a random crop.
    flip: bool = True  # Mirror images at random; never for digits.
    check_images: bool | None = None  # Read every file before the first step. None: where that takes up to a minute.
    skip_damaged: bool = False  # Leave out files that cannot be read, and record them.

    method: str = "fixmatch"  # A name in gradconsist.methods in lower case, or supervised (labeled images only).
    threshold: float | None = None  # Confidence above which a pseudo-label counts. None: the method's.
    temperature: float | None = None  # Of the sharpening (mixmatch, uda). None: the method's.
    method_decay: float | None = None  # Decay of the method's own averages (teacher, statistics). None: the method's.
    unlabeled_weight: float | None = None  # mu: weight of the unsupervised loss. None: the method's.
    # Steps in which mu rises from 0; 0 for none. None: the method's, else the preset's.
    unlabeled_ramp: int | None = None
    brier_weight: float = 0.0  # fixmatch, supervised: weight of ||softmax - onehot||^2, labeled images.
    # One forward of labeled, weak and strong images; False: separate forwards. None: the method's.
    joint_forward: bool | None = None
    # Strong view: torchvision's RandAugment(2, 10), the FixMatch reference's with Cutout, or a second weak view. None:
    # the method's, else the preset's.
    strong: Literal["randaugment", "fixmatch", "weak"] | None = None

    ggcr_weight: float = 0.1  # lambda: weight of the gradient consistency; 0 is the plain method.
    ggcr_warmup: int = 1000  # Steps before the term is added.
    ggcr_ramp: int = 0  # Steps in which lambda rises linearly after the warm-up.
    ggcr_every: int = 1  # Add the term every k-th step, times k.
    ggcr_max_pairs: int | None = None  # Compare at most this many random pairs of a step.
    ggcr_engine: str = "auto"  # auto, ghost, vmap or loop.
    # Compare random projections, as KIND:DIM (kronecker:16); kinds as in RandomProjection. None: exact.
    ggcr_projection: str | None = None
    ggcr_gate: Literal["method", "all"] = "method"  # Pairs that count: the confident ones, or all.
    # What a pair adds: 1 - cosine, or the mean squared norm of its two gradients (the paper's ablation).
    ggcr_criterion: Literal["cosine", "gradient-norm"] = "cosine"
    # Hold that view's gradient constant: only the other one follows. None: both move.
    ggcr_stop_gradient: Literal["weak", "strong"] | None = None
    # BatchNorm's statistics in the comparison, as GradientConsistencyLoss takes them.
    ggcr_batchnorm: Literal["auto", "running", "observed"] = "auto"
    # Differentiate the term through BatchNorm's statistics, too, beyond its definition.
    ggcr_through_statistics: bool = False
    # Parameters compared: encoder (all but the head), all, or a prefix of parameter names.
    ggcr_encoder: str = "encoder"

    # Pairs at a time. auto: the engine's choice, halved where a CUDA device runs out of memory.
    ggcr_chunk_size: int | Literal["auto"] = "auto"

    # Weight of the squared Jacobian norm of the logits for the labeled images; 0 for none.
    jacobian_weight: float = 0.0
    jacobian_projections: int = 1  # Random projections that estimate it.

    # wrn-DEPTH-WIDTH (-gn behind it: GroupNorm), a name of torchvision.models, timm:NAME, or your own MODULE:FUNCTION,
    # called with the number of classes.
    arch: str = "wrn-28-2"
    # batch: the network's own, each process by its own images. group: GroupNorm in BatchNorm's place, the same for any
    # number of processes. sync: BatchNorm by the images of all processes, without gradient consistency.
    norm: Literal["batch", "group", "sync"] = "batch"
    # Start from these weights: a run, its model.safetensors or step-N.pt, a state_dict of the
    # network (.pt, .pth, .safetensors), or `pretrained` for those of torchvision or timm.
    init_from: str | None = None
    init_part: Literal["model", "encoder"] = "model"  # What --init-from gives: the whole model, or all but the head.
    # SHA-256 that the file of --init-from must have. None: stored, and checked on resume.
    init_sha256: str | None = None
    bn_momentum: float | None = None  # BatchNorm momentum (torch's sense). None: 0.001, more in a short run.
    steps: int = 2**20  # Optimizer steps of the whole run.
    batch_size: int = 64  # Labeled images per batch, over all processes.
    unlabeled_ratio: int | None = None  # Unlabeled images per labeled one. None: the method's, else the preset's.
    # Learning rate after its warm-up; decays as cos(7 pi k / 16 K). None: 0.03, or 5e-4 for adamw.
    lr: float | None = None
    lr_warmup: int = 0  # Steps in which the learning rate rises linearly.
    # SGD with Nesterov momentum 0.9, AdamW, or sharpness-aware minimisation around SGD.
    optimizer: Literal["sgd", "adamw", "sam"] = "sgd"
    clip_norm: float | None = None  # Scale the gradient down to at most this norm. None: never.
    accumulate: int = 1  # Batches whose mean gradient makes a step.
    sam_rho: float = 0.05  # Radius of the ball in which --optimizer sam looks for the worst loss.
    weight_decay: float | None = None  # On kernels only. None: 5e-4, or 1e-3 for cifar100.
    ema: float = 0.999  # Decay of the averaged model, which is the one evaluated; 0 for none.
    ema_warmup: bool | None = None  # Decay min(EMA, (1 + k) / (10 + k)) in the first steps. None: in a short run.
    # BatchNorm's statistics of the averaged model: averaged with its weights, or taken anew from training images at
    # each evaluation and for the exported weights.
    eval_statistics: Literal["averaged", "anew"] = "averaged"
    amp: Literal["off", "bf16", "fp16"] = "off"  # Mixed precision of the method's forward.
    channels_last: bool = False  # Memory format of the model and the images.

    eval_every: int = 1024  # Steps between evaluations on the test and held-out images.
    checkpoint_every: int = 1024  # Steps between checkpoints.
    log_every: int = 64  # Steps over which metrics.jsonl averages.
    tensorboard: bool = False  # Write TensorBoard files to OUTPUT/tensorboard.
    csv: bool = False  # Write metrics.csv at the end of each call.
    wandb: bool = False  # Log to Weights & Biases, in the project gradconsist.
    mlflow: bool = False  # Log to MLflow, in the experiment gradconsist.
    progress: Literal["auto", "bar", "lines", "none"] = "auto"  # auto: a bar on a terminal, lines elsewhere.
    resume: Literal["auto", "never"] = "auto"  # auto continues the run in OUTPUT; never refuses a used OUTPUT.
    stop_after_steps: int | None = None  # Checkpoint and stop after this many steps of this call.
    stop_after_minutes: float | None = None  # Checkpoint and stop after this time.
    elastic: bool = False  # Continue a run also with another number of processes.

    # No options: whose defaults these are, and how many processes torchrun started.
    recipe: tyro.conf.Suppress[Literal["cifar", "imagenet"]] = "cifar"
    processes: tyro.conf.Suppress[int] = 1


PRESETS: dict[Preset, dict[str, Any]] = {
    "paper": {},
    "fixmatch": {"ggcr_weight": 0.0},
    "demo": {
        "dataset": "digits", "arch": "wrn-10-1", "steps": 400, "batch_size": 20, "ggcr_warmup": 100,
        "ggcr_max_pairs": 16, "ggcr_every": 2, "ema": 0.99, "eval_every": 20, "checkpoint_every": 100, "log_every": 20,
    },
}  # fmt: skip


def preset_config(preset: Preset) -> Config:
    """Defaults of a preset."""
    return dataclasses.replace(Config(), **{"preset": preset, **PRESETS[preset]})


# By preset, the defaults of the two programs. FixMatch's values for ImageNet are the reference's, but for the schedule
# (theirs falls in steps) and the magnitude of RandAugment (theirs is random).
CIFAR: dict[str, Config] = {name: preset_config(name) for name in PRESETS}
_IMAGENET = Config(
    recipe="imagenet", dataset="folder", feed="stream", data_dir="imagenet", image_size=224, arch="resnet50",
    bn_momentum=0.1, lr_warmup=1000, eval_every=10_000, checkpoint_every=1000,
)  # fmt: skip
IMAGENET: dict[str, Config] = {
    "paper": _IMAGENET,
    "fixmatch": dataclasses.replace(_IMAGENET, preset="fixmatch", ggcr_weight=0.0),
}
_FIXMATCH: dict[str, Any] = {"unlabeled_ratio": 5, "unlabeled_ramp": 0, "weight_decay": 3e-4}
_FIXMATCH_METHOD: dict[str, Any] = {"threshold": 0.7, "unlabeled_weight": 10.0}

# What each method gets where the command line says nothing: its paper's or reference's values (sources as in
# `gradconsist.methods`), else the preset's. The share of a ramp is 40 % of the run, the practice of TorchSSL and USB.
RAMP_SHARE = 0.4
# MixMatch's ramp in the reference code: 1,024 x 1,024 images of 64 a step. A short run has 40 % of its steps instead.
MIXMATCH_RAMP = 16_384

_TWO_WEAK_VIEWS = {"unlabeled_ratio": 1, "strong": "weak", "unlabeled_ramp": RAMP_SHARE}

METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "fixmatch": {"threshold": 0.95, "unlabeled_weight": 1.0, "joint_forward": True},
    "flexmatch": {"threshold": 0.95, "unlabeled_weight": 1.0, "joint_forward": True},
    "freematch": {"method_decay": 0.999, "unlabeled_weight": 1.0, "joint_forward": True},
    "softmatch": {"method_decay": 0.999, "unlabeled_weight": 1.0, "joint_forward": True},
    "uda": {"threshold": 0.8, "temperature": 0.4, "unlabeled_weight": 1.0, "joint_forward": True},
    "mixmatch": {"temperature": 0.5, "unlabeled_weight": 100.0, "joint_forward": False, **_TWO_WEAK_VIEWS},
    "meanteacher": {"method_decay": 0.99, "unlabeled_weight": 50.0, **_TWO_WEAK_VIEWS},
    "pimodel": {"unlabeled_weight": 10.0, "joint_forward": True, **_TWO_WEAK_VIEWS},
    # One view is trained on; the strong one, the preset's, is for gradient consistency.
    "temporalensembling": {
        "method_decay": 0.6, "unlabeled_weight": 30.0, "unlabeled_ratio": 1, "unlabeled_ramp": RAMP_SHARE,
    },
    "pseudolabel": {"threshold": 0.95, "unlabeled_weight": 1.0, "unlabeled_ratio": 1, "unlabeled_ramp": RAMP_SHARE},
    "supervised": {},
}  # fmt: skip

PRESET_DEFAULTS: dict[str, dict[str, Any]] = {
    "paper": {"unlabeled_ramp": 5000, "unlabeled_ratio": 7, "strong": "randaugment"},
    "fixmatch": {"unlabeled_ramp": 0, "unlabeled_ratio": 7, "strong": "fixmatch"},
    "demo": {"unlabeled_ramp": 100, "unlabeled_ratio": 3, "strong": "fixmatch"},
}


def method_defaults(method: str, preset: str, steps: int) -> dict[str, Any]:
    """Values of the options that depend on the method."""
    values = PRESET_DEFAULTS[preset] | METHOD_DEFAULTS.get(method, {})
    if values["unlabeled_ramp"] == RAMP_SHARE:
        share = int(RAMP_SHARE * steps)
        values["unlabeled_ramp"] = min(MIXMATCH_RAMP, share) if method == "mixmatch" else share
    return values


def resolve(config: Config, processes: int = 1) -> Config:
    """Check the options and settle those that are None because they depend on others."""
    check_options(config, processes)
    defaults = method_defaults(config.method, config.preset, config.steps)
    if config.feed == "stream" and defaults["strong"] == "fixmatch":
        defaults["strong"] = "randaugment"
    defaults["weight_decay"] = 1e-3 if config.dataset == "cifar100" else 5e-4
    if config.recipe == "imagenet" and config.preset == "fixmatch":
        defaults |= _FIXMATCH | (_FIXMATCH_METHOD if config.method == "fixmatch" else {})
    if (config.labels, config.label_fraction, config.label_file) == (None, None, None):
        if config.dataset == "folder" and Path(config.data_dir, "unlabeled").is_dir():
            defaults["labels"] = "all"
        else:
            defaults |= {"label_fraction": 0.01} if config.recipe == "imagenet" else {"labels": 40}
    defaults["lr"] = 5e-4 if config.optimizer == "adamw" else 0.03
    # (1 - m)^steps is what remains of the initial statistics: at most e^-20 of them at the end of any run.
    defaults["bn_momentum"] = min(0.1, max(0.001, 20 / config.steps))
    defaults["ema_warmup"] = config.steps < SHORT_RUN_STEPS
    settled = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    if config.method == "supervised":
        settled["ggcr_weight"] = 0.0  # no second view, so nothing to compare
    config = dataclasses.replace(config, processes=processes, **settled)
    return config if config.output else dataclasses.replace(config, output=f"runs/{run_name(config)}")


def run_name(config: Config) -> str:
    """Name a run after the options that one varies most."""
    data = Path(realpath(config.data_dir)).name if config.dataset == "folder" else config.dataset
    labeled = Path(config.label_file).stem if config.label_file else config.labels or config.label_fraction
    arch = config.arch.replace(":", "-").replace("/", "-")
    return f"{data}-{labeled}-{method_label(config)}-{arch}-seed{config.seed}"


def method_label(config: Config) -> str:
    """Name of what is trained, as legends and tables print it."""
    term = "ggcr" if config.ggcr_criterion == "cosine" else config.ggcr_criterion
    parts = [config.method]
    parts += [term] if config.ggcr_weight > 0 else []
    parts += ["jacobian"] if config.jacobian_weight > 0 else []
    parts += [config.optimizer] if config.optimizer != "sgd" else []
    return "+".join(parts)


def option_differences(there: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What differs between two runs' options, as `--lr: 0.1 there, 0.2 now`."""
    for name in sorted(there.keys() | now.keys()):
        before, after = (options.get(name, "(absent)") for options in (there, now))
        if before != after:
            yield f"--{name.replace('_', '-')}: {before} there, {after} now"

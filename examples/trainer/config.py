"""The options of the trainer: one frozen record, what the presets change in it, and what it means.

`None` means "depends on other options"; `resolve` settles those, and a run stores and compares the resolved record.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from trainer.defaults import method_defaults
from trainer.option_checks import check_options

Preset = Literal["paper", "fixmatch", "demo"]
DatasetName = Literal["cifar10", "cifar100", "digits", "folder"]
Help = tyro.conf.arg

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

    preset: Annotated[Preset, Help(help="Defaults to start from; options given explicitly win.")] = "paper"
    config: Annotated[
        str | None, Help(help="JSON or YAML file of options, or the config.json of a run to repeat; options given win.")
    ] = None
    dataset: Annotated[
        DatasetName,
        Help(help="folder: DATA_DIR/train/CLASS/**, and perhaps test/CLASS/** (or val/) and unlabeled/**."),
    ] = "cifar10"
    feed: Annotated[
        Literal["memory", "stream"],
        Help(
            help="memory: images are decoded once, to one size. stream: they are decoded whenever they are needed, and "
            "views are random crops of the whole photograph; folder only."
        ),
    ] = "memory"
    data_dir: Annotated[str, Help(help="Folder of the data set (downloads go there).")] = "data"
    output: Annotated[str | None, Help(help="Run directory. None: runs/<a name made of the options>.")] = None
    seed: Annotated[int, Help(help="Decides the split, the initial weights, the order and the augmentation.")] = 0
    device: Annotated[str, Help(help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto"
    workers: Annotated[
        int | None, Help(help="Processes that prepare batches. None: one per spare core. Never changes results.")
    ] = None
    labels: Annotated[
        int | Literal["all"] | None,
        Help(
            help="Labeled images in all, the same number of each class; all: every image in a class folder. None: "
            "--label-fraction or --label-file, else all where there is an unlabeled/, else 40."
        ),
    ] = None
    label_fraction: Annotated[float | None, Help(help="Share of each class to label, at least one image.")] = None
    label_file: Annotated[
        str | None,
        Help(help="Text file that names the labeled images, a path a line (a number, where there are no files)."),
    ] = None
    hold_out: Annotated[
        float, Help(help="Share of the labeled images of each class to keep from training and choose `best` by.")
    ] = 0.0
    image_size: Annotated[
        int | None,
        Help(help="folder: side of the images that the network sees. None: that of all images, which must be equal."),
    ] = None
    crop_scale: Annotated[float, Help(help="stream: smallest share of a photograph's area in a random crop.")] = 0.08
    flip: Annotated[bool, Help(help="Mirror images at random; never for digits.")] = True
    check_images: Annotated[
        bool | None, Help(help="Read every file before the first step. None: where that takes up to a minute.")
    ] = None
    skip_damaged: Annotated[bool, Help(help="Leave out files that cannot be read, and record them.")] = False

    method: Annotated[
        str, Help(help="A name in gradconsist.methods in lower case, or supervised (labeled images only).")
    ] = "fixmatch"
    threshold: Annotated[
        float | None, Help(help="Confidence above which a pseudo-label counts. None: the method's.")
    ] = None
    temperature: Annotated[float | None, Help(help="Of the sharpening (mixmatch, uda). None: the method's.")] = None
    method_decay: Annotated[
        float | None,
        Help(help="Decay of the method's own averages (teacher, statistics). None: the method's."),
    ] = None
    unlabeled_weight: Annotated[float | None, Help(help="mu: weight of the unsupervised loss. None: the method's.")] = (
        None
    )
    unlabeled_ramp: Annotated[
        int | None, Help(help="Steps in which mu rises from 0; 0 for none. None: the method's, else the preset's.")
    ] = None
    brier_weight: Annotated[
        float, Help(help="fixmatch, supervised: weight of ||softmax - onehot||^2, labeled images.")
    ] = 0.0
    joint_forward: Annotated[
        bool | None,
        Help(help="One forward of labeled, weak and strong images; False: separate forwards. None: the method's."),
    ] = None
    strong: Annotated[
        Literal["randaugment", "fixmatch", "weak"] | None,
        Help(
            help="Strong view: torchvision's RandAugment(2, 10), the FixMatch reference's with Cutout, or a second "
            "weak view. None: the method's, else the preset's."
        ),
    ] = None

    ggcr_weight: Annotated[float, Help(help="lambda: weight of the gradient consistency; 0 is the plain method.")] = 0.1
    ggcr_warmup: Annotated[int, Help(help="Steps before the term is added.")] = 1000
    ggcr_ramp: Annotated[int, Help(help="Steps in which lambda rises linearly after the warm-up.")] = 0
    ggcr_every: Annotated[int, Help(help="Add the term every k-th step, times k.")] = 1
    ggcr_max_pairs: Annotated[int | None, Help(help="Compare at most this many random pairs of a step.")] = None
    ggcr_engine: Annotated[str, Help(help="auto, ghost, vmap or loop.")] = "auto"
    ggcr_projection: Annotated[
        str | None,
        Help(help="Compare random projections, as KIND:DIM (kronecker:16); kinds as in RandomProjection. None: exact."),
    ] = None
    ggcr_gate: Annotated[Literal["method", "all"], Help(help="Pairs that count: the confident ones, or all.")] = (
        "method"
    )
    ggcr_criterion: Annotated[
        Literal["cosine", "gradient-norm"],
        Help(
            help="What a pair adds: 1 - cosine, or the mean squared norm of its two gradients (the paper's ablation)."
        ),
    ] = "cosine"
    ggcr_stop_gradient: Annotated[
        Literal["weak", "strong"] | None,
        Help(help="Hold that view's gradient constant: only the other one follows. None: both move."),
    ] = None
    ggcr_batchnorm: Annotated[
        Literal["auto", "running", "observed"],
        Help(help="BatchNorm's statistics in the comparison, as GradientConsistencyLoss takes them."),
    ] = "auto"
    ggcr_through_statistics: Annotated[
        bool, Help(help="Differentiate the term through BatchNorm's statistics, too, beyond its definition.")
    ] = False
    ggcr_encoder: Annotated[
        str, Help(help="Parameters compared: encoder (all but the head), all, or a prefix of parameter names.")
    ] = "encoder"

    ggcr_chunk_size: Annotated[
        int | Literal["auto"],
        Help(help="Pairs at a time. auto: the engine's choice, halved where a CUDA device runs out of memory."),
    ] = "auto"

    jacobian_weight: Annotated[
        float, Help(help="Weight of the squared Jacobian norm of the logits for the labeled images; 0 for none.")
    ] = 0.0
    jacobian_projections: Annotated[int, Help(help="Random projections that estimate it.")] = 1

    arch: Annotated[
        str,
        Help(
            help="wrn-DEPTH-WIDTH (-gn behind it: GroupNorm), a name of torchvision.models, timm:NAME, or your own "
            "MODULE:FUNCTION, called with the number of classes."
        ),
    ] = "wrn-28-2"
    norm: Annotated[
        Literal["batch", "group", "sync"],
        Help(
            help="batch: the network's own, each process by its own images. group: GroupNorm in BatchNorm's place, the "
            "same for any number of processes. sync: BatchNorm by the images of all processes, without gradient "
            "consistency."
        ),
    ] = "batch"
    init_from: Annotated[
        str | None,
        Help(
            help="Start from these weights: a run, its model.safetensors or step-N.pt, a state_dict of the network "
            "(.pt, .pth, .safetensors), or `pretrained` for those of torchvision or timm."
        ),
    ] = None
    init_part: Annotated[
        Literal["model", "encoder"], Help(help="What --init-from gives: the whole model, or all but the head.")
    ] = "model"
    init_sha256: Annotated[
        str | None, Help(help="SHA-256 that the file of --init-from must have. None: stored, and checked on resume.")
    ] = None
    bn_momentum: Annotated[
        float | None, Help(help="BatchNorm momentum (torch's sense). None: 0.001, more in a short run.")
    ] = None
    steps: Annotated[int, Help(help="Optimizer steps of the whole run.")] = 2**20
    batch_size: Annotated[int, Help(help="Labeled images per batch, over all processes.")] = 64
    unlabeled_ratio: Annotated[
        int | None, Help(help="Unlabeled images per labeled one. None: the method's, else the preset's.")
    ] = None
    lr: Annotated[
        float | None,
        Help(help="Learning rate after its warm-up; decays as cos(7 pi k / 16 K). None: 0.03, or 5e-4 for adamw."),
    ] = None
    lr_warmup: Annotated[int, Help(help="Steps in which the learning rate rises linearly.")] = 0
    optimizer: Annotated[
        Literal["sgd", "adamw", "sam"],
        Help(help="SGD with Nesterov momentum 0.9, AdamW, or sharpness-aware minimisation around SGD."),
    ] = "sgd"
    clip_norm: Annotated[float | None, Help(help="Scale the gradient down to at most this norm. None: never.")] = None
    accumulate: Annotated[int, Help(help="Batches whose mean gradient makes a step.")] = 1
    sam_rho: Annotated[float, Help(help="Radius of the ball in which --optimizer sam looks for the worst loss.")] = 0.05
    weight_decay: Annotated[float | None, Help(help="On kernels only. None: 5e-4, or 1e-3 for cifar100.")] = None
    ema: Annotated[float, Help(help="Decay of the averaged model, which is the one evaluated; 0 for none.")] = 0.999
    ema_warmup: Annotated[
        bool | None, Help(help="Decay min(EMA, (1 + k) / (10 + k)) in the first steps. None: in a short run.")
    ] = None
    eval_statistics: Annotated[
        Literal["averaged", "anew"],
        Help(
            help="BatchNorm's statistics of the averaged model: averaged with its weights, or taken anew from training "
            "images at each evaluation and for the exported weights."
        ),
    ] = "averaged"
    amp: Annotated[Literal["off", "bf16", "fp16"], Help(help="Mixed precision of the method's forward.")] = "off"
    channels_last: Annotated[bool, Help(help="Memory format of the model and the images.")] = False

    eval_every: Annotated[int, Help(help="Steps between evaluations on the test and held-out images.")] = 1024
    checkpoint_every: Annotated[int, Help(help="Steps between checkpoints.")] = 1024
    log_every: Annotated[int, Help(help="Steps over which metrics.jsonl averages.")] = 64
    tensorboard: Annotated[bool, Help(help="Write TensorBoard files to OUTPUT/tensorboard.")] = False
    csv: Annotated[bool, Help(help="Write metrics.csv at the end of each call.")] = False
    wandb: Annotated[bool, Help(help="Log to Weights & Biases, in the project gradconsist.")] = False
    mlflow: Annotated[bool, Help(help="Log to MLflow, in the experiment gradconsist.")] = False
    progress: Annotated[
        Literal["auto", "bar", "lines", "none"], Help(help="auto: a bar on a terminal, lines elsewhere.")
    ] = "auto"
    resume: Annotated[
        Literal["auto", "never"], Help(help="auto continues the run in OUTPUT; never refuses a used OUTPUT.")
    ] = "auto"
    stop_after_steps: Annotated[int | None, Help(help="Checkpoint and stop after this many steps of this call.")] = None
    stop_after_minutes: Annotated[float | None, Help(help="Checkpoint and stop after this time.")] = None
    elastic: Annotated[bool, Help(help="Continue a run also with another number of processes.")] = False

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
    data = Path(config.data_dir).resolve().name if config.dataset == "folder" else config.dataset
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

"""Weights that leave a run (`model.safetensors`) and weights that a run starts from (`--init-from`)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trainer.checkpoint import load_latest, read_checkpoint
from trainer.config import Config
from trainer.errors import CheckpointError, OptionError, reason
from trainer.evaluation import shorter_side
from trainer.files import read_json, regular_size, write_atomically
from trainer.models import PRETRAINED, build_network, classifier_head
from trainer.split import normalisation


def export_weights(path: Path, model: nn.Module, about: dict[str, Any]) -> None:
    """Write parameters and buffers as safetensors, atomically; what one must know of them is JSON under `about`."""
    # Plain memory layout: the format knows no other, and the file does not depend on --channels-last. Each tensor on
    # its own: the format refuses tied ones.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    # One key: the library writes several in a random order, and equal runs should leave equal files.
    content = safetensors.torch.save(tensors, {"about": json.dumps(about)})
    write_atomically(path, lambda file: file.write(content))


def load_model(path: Path | str) -> tuple[nn.Module, dict[str, Any]]:
    """Build the model that a run trained, ready for inference.

    The path is a run's directory, finished or not, its `model.safetensors`, or a checkpoint `step-N.pt` in it.

    Returns:
        The averaged model in eval mode, from images `[N, 3, H, W]` normalised by `mean` and `std` to logits `[N, K]`;
        and what is known about it: `arch`, `norm`, `classes` in the order of the logits, `mean` and `std` in units of
        255, `image_size`, `shorter_side` (what images are scaled to before the centre is cut), `steps` and more.
    """
    path = Path(path)
    if path.is_dir() and (path / "model.safetensors").exists():
        path = path / "model.safetensors"
    try:
        if path.is_dir() or path.suffix == ".pt":
            about, weights = _unfinished(path)
        else:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["about"])
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        normalisation(about)
        if len(about["image_size"]) != 2 or not min(about["image_size"]) > 0:
            raise ValueError(f"images of {about['image_size']}")
        norm = about.get("norm", "batch")
        # Statistics over all processes are a BatchNorm's in one.
        config = Config(arch=str(about["arch"]), norm="batch" if norm == "sync" else norm, bn_momentum=0.1)
        model = build_network(config, len(about["classes"]))
        model.load_state_dict(weights)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is not the export of a run ({reason(error, where=False)}): "
            "give a run's directory, its model.safetensors or a checkpoints/step-N.pt."
        ) from error
    return model.eval().requires_grad_(False), about


def _unfinished(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What an export would hold, from the run directory and a checkpoint of it."""
    if path.is_dir():
        folder, state = path, load_latest(path / "checkpoints")
        if state is None:
            raise ValueError("it holds no checkpoint yet")
    else:
        folder, state = path.parent.parent, read_checkpoint(path, path.read_bytes())
    if state["options"].get("eval_statistics") == "anew":
        print("note: of --eval-statistics anew only model.safetensors has BatchNorm's statistics; these are averaged "
              "ones, and other numbers than the log's follow from them.", file=sys.stderr)  # fmt: skip
    about = describe(state["options"], read_json(folder / "split.json"), state["step"])
    return about, {str(name): value.detach() for name, value in state["average"]["model"].items()}


def describe(options: dict[str, Any], split: dict[str, Any], steps: int) -> dict[str, Any]:
    """What one must know to use the weights of a run, from its options and `split.json`."""
    size, data = split.get("image_size") or [options["image_size"]] * 2, options["dataset"]
    return {
        "format": 2,
        **{key: options[key] for key in ("arch", "norm", "seed")},
        **{key: split[key] for key in ("classes", "mean", "std")},
        "image_size": size,
        "shorter_side": shorter_side(min(size), options["feed"]),
        "dataset": f"folder {Path(options['data_dir']).resolve().name}" if data == "folder" else data,
        "labels": len(split["labeled"]),
        "steps": steps,
    }


def read_start(config: Config) -> tuple[Config, dict[str, Tensor] | None]:
    """Read the weights that `--init-from` names, and settle `--init-sha256`.

    Returns the options with the file's digest, and the weights by name; None without `--init-from`, or where the
    network brings its own.
    """
    if config.init_from is None:
        for name in ("init_part", "init_sha256"):
            if getattr(config, name) != getattr(Config, name):
                raise OptionError(f"--{name.replace('_', '-')} has nothing to act on: give --init-from, too.")
        return config, None
    if config.init_from == PRETRAINED:
        if config.init_part == "encoder" or config.init_sha256 is not None:
            raise OptionError(f"--init-from {PRETRAINED} has a new head, and the library checks it: give it alone.")
        return config, None
    path = Path(config.init_from)
    if path.is_dir():  # a run: its export, else its newest checkpoint
        records = sorted(path.glob("checkpoints/step-*.json"))
        export = path / "model.safetensors"
        if export.exists() or records:
            path = export if export.exists() else records[-1].with_suffix(".pt")
    try:
        regular_size(path)
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise OptionError(
            f"--init-from {path} cannot be read ({error}): give a run, a model.safetensors or a state_dict."
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    if config.init_sha256 not in (None, digest):
        raise OptionError(f"--init-from {path} has the SHA-256 {digest}, not --init-sha256 {config.init_sha256}.")
    weights = _weights(path, content)
    for name, value in weights.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise OptionError(f"--init-from {path}: {name} holds values that are not finite.")
    return dataclasses.replace(config, init_sha256=digest), weights


def _weights(path: Path, content: bytes) -> dict[str, Tensor]:
    if path.suffix not in (".pt", ".pth", ".bin") and not content.startswith(b"PK"):  # what torch.save writes is a zip
        try:
            return safetensors.torch.load(content)
        except SafetensorError as error:
            raise OptionError(
                f"--init-from {path} is neither a checkpoint (.pt, .pth) nor a safetensors file ({error})."
            ) from error
    state: Any = read_checkpoint(path, content)
    if isinstance(state.get("average"), dict):
        state = state["average"].get("model")
    for key in ("state_dict", "model", "model_state_dict"):  # as other programs wrap theirs
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise OptionError(f"--init-from {path} is no checkpoint of a trainer and no state_dict: it has no weights.")
    return {str(name).removeprefix("module."): value.detach() for name, value in state.items()}  # of DDP


def load_start(model: nn.Module, weights: dict[str, Tensor], config: Config) -> None:
    """Put weights into a new model; all of them, or all but the head's."""
    own, head = model.state_dict(), classifier_head(model)[0] + "."
    wanted = {name for name in own if config.init_part == "model" or not name.startswith(head)}
    found = {name for name in weights if config.init_part == "model" or not name.startswith(head)}
    shapes = [name for name in own if name in wanted & found and weights[name].shape != own[name].shape]
    wrong = [f"{name} is {list(weights[name].shape)} there and {list(own[name].shape)} here" for name in shapes]
    wrong += [
        f"{name} is {str(weights[name].dtype).removeprefix('torch.')} there, of which floats cannot be made"
        for name in sorted(wanted & found)
        if own[name].is_floating_point() and not weights[name].is_floating_point()
    ]
    wrong += [f"{name} is absent there" for name in sorted(wanted - found)]
    wrong += [f"{name} is unknown here" for name in sorted(found - wanted)]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        remedy = "--init-part encoder starts with a new head" if all(head in text for text in wrong) else (
            "give the --arch that it was trained with"
        )  # fmt: skip
        raise OptionError(
            f"--init-from {config.init_from} does not fit --arch {config.arch}: {'; '.join(wrong[:3])}{more}: {remedy}."
        )
    model.load_state_dict({name: weights[name] for name in wanted}, strict=False)

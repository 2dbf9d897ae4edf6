"""Weights that leave a run (`model.safetensors`) and weights that a run starts from (`--init-from`)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trainer.checkpoint import read_checkpoint
from trainer.config import Config
from trainer.errors import CheckpointError, OptionError
from trainer.files import regular_size, write_atomically
from trainer.models import WideResNet, build_model

_HEAD = "head."


def export_weights(path: Path, model: nn.Module, about: dict[str, Any]) -> None:
    """Write parameters and buffers as safetensors, atomically.

    Args:
        path: The file.
        model: The model.
        about: What one must know to use them; stored as JSON under the metadata key `about`.

    Raises:
        OSError: Where the disk refuses; `path` is then what it was.
    """
    # Plain memory layout: the format knows no other, and the file does not depend on --channels-last.
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    # One key: the library writes several in a random order, and equal runs should leave equal files.
    content = safetensors.torch.save(tensors, {"about": json.dumps(about)})
    write_atomically(path, lambda file: file.write(content))


def load_model(path: Path) -> tuple[WideResNet, dict[str, Any]]:
    """Build the model that a run exported, ready for inference.

    Args:
        path: A run's `model.safetensors`.

    Returns:
        The model in eval mode, from images `[N, 3, H, W]` normalised by `mean` and `std` to logits `[N, K]`; and what
        the file says about itself: `arch`, `classes` in the order of the logits, `mean` and `std` in units of 255,
        `image_size`, `steps` and where it comes from.

    Raises:
        CheckpointError: Where the file is no such export.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = json.loads(file.metadata()["about"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        model = build_model(about["arch"], len(about["classes"]), momentum=0.1)
        model.load_state_dict(weights)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is not the export of a run ({type(error).__name__}: {str(error).splitlines()[0]}): "
            "give the model.safetensors of a finished run."
        ) from error
    return model.eval().requires_grad_(False), about


def read_start(config: Config) -> tuple[Config, dict[str, Tensor] | None]:
    """Read the weights that `--init-from` names, and settle `--init-sha256`.

    Args:
        config: Resolved options.

    Returns:
        The options with the file's digest, and the averaged weights by name; None without `--init-from`.

    Raises:
        OptionError: Where the file is absent, of neither kind, holds values that are not finite, or is another one
            than `--init-sha256` says.
        CheckpointError: Where a checkpoint holds more than tensors and plain values.
    """
    if config.init_from is None:
        for name in ("init_part", "init_sha256"):
            if getattr(config, name) != getattr(Config, name):
                raise OptionError(f"--{name.replace('_', '-')} has nothing to act on: give --init-from, too.")
        return config, None
    path = Path(config.init_from)
    try:
        regular_size(path)
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise OptionError(
            f"--init-from {path} cannot be read ({error}): give a run's model.safetensors or checkpoints/step-N.pt."
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    if config.init_sha256 not in (None, digest):
        raise OptionError(f"--init-from {path} has the SHA-256 {digest}, not --init-sha256 {config.init_sha256}.")
    weights = _averaged_weights(path, content)
    for name, value in weights.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise OptionError(f"--init-from {path}: {name} holds values that are not finite.")
    return dataclasses.replace(config, init_sha256=digest), weights


def _averaged_weights(path: Path, content: bytes) -> dict[str, Tensor]:
    if path.suffix == ".pt":
        state = read_checkpoint(path, content)
        try:
            return {str(name): value.detach() for name, value in state["average"]["model"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise OptionError(f"--init-from {path} is no checkpoint of a trainer: it has no averaged model.") from error
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise OptionError(
            f"--init-from {path} is neither a checkpoint (.pt) nor a safetensors file ({error})."
        ) from error


def load_start(model: nn.Module, weights: dict[str, Tensor], config: Config) -> None:
    """Put weights into a new model; all of them, or all but the head's.

    Args:
        model: The model.
        weights: From `read_start`.
        config: Resolved options.

    Raises:
        OptionError: Naming the tensors that do not fit.
    """
    own = model.state_dict()
    wanted = {name for name in own if config.init_part == "model" or not name.startswith(_HEAD)}
    found = {name for name in weights if config.init_part == "model" or not name.startswith(_HEAD)}
    shapes = [name for name in own if name in wanted & found and weights[name].shape != own[name].shape]
    wrong = [f"{name} is {list(weights[name].shape)} there and {list(own[name].shape)} here" for name in shapes]
    wrong += [f"{name} is absent there" for name in sorted(wanted - found)]
    wrong += [f"{name} is unknown here" for name in sorted(found - wanted)]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        remedy = "--init-part encoder starts with a new head" if all(_HEAD in text for text in wrong) else (
            "give the --arch that it was trained with"
        )  # fmt: skip
        raise OptionError(
            f"--init-from {config.init_from} does not fit --arch {config.arch}: {'; '.join(wrong[:3])}{more}: {remedy}."
        )
    model.load_state_dict({name: weights[name] for name in wanted}, strict=False)

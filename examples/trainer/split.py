"""Which training images are labeled and which are held out: drawn from the seed or named by a file, stored, checked."""

from __future__ import annotations

import gzip
import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.config import Config
from trainer.datasets import DataSet, Images
from trainer.errors import DatasetError, OptionError, ResumeError
from trainer.files import finite, read_json, readable, regular_size, write_atomically, write_json
from trainer.folder import FileRecord
from trainer.streams import Stream, permutation

FILES = "files.jsonl.gz"


@dataclass(frozen=True)
class Split:
    """Which training images are for what; the unlabeled set is all but the held-out ones, the labeled ones included."""

    labeled: Tensor  # Sorted indices into the training images.
    held_out: Tensor  # Sorted indices of labeled images that are not trained on.
    digest: str  # SHA-256 of the class names, all training labels and these indices.
    data_digest: str  # SHA-256 of the data set.


def choose_labeled(data: DataSet, config: Config) -> Split:
    """The labeled images that the options ask for."""
    if config.label_file is not None:
        labeled = read_list(Path(config.label_file), data)
    elif config.labels == "all":
        labeled = torch.nonzero(data.train_y >= 0).flatten()
    elif config.labels is not None:
        return _held_out(data, draw_split(data, config.labels, config.seed).labeled, config)
    else:
        per_class = (_class_sizes(data) * float(config.label_fraction or 0)).round().long().clamp(min=1)
        labeled = draw_labeled(data, per_class.tolist(), config.seed)
    return _held_out(data, labeled, config)


def draw_split(data: DataSet, labels: int, seed: int) -> Split:
    """Choose the same number of labeled images from each class."""
    count = len(data.classes)
    if labels % count or labels < count:
        lower = max(labels // count, 1) * count
        raise OptionError(
            f"--labels {labels} cannot be balanced over {count} classes: give a multiple of {count}, for example "
            f"{lower} or {lower + count}; --label-fraction and --labels all take classes as they are."
        )
    per_class, sizes = labels // count, _class_sizes(data)
    smallest = int(sizes.argmin())
    if sizes[smallest] < per_class:
        raise OptionError(
            f"--labels {labels} asks for {per_class} labeled images of each class, but class "
            f"{data.classes[smallest]!r} has {sizes[smallest]}: give at most {int(sizes[smallest]) * count}, or all."
        )
    return make_split(data, draw_labeled(data, [per_class] * count, seed))


def _class_sizes(data: DataSet) -> Tensor:
    return torch.bincount(data.train_y[data.train_y >= 0], minlength=len(data.classes))


def draw_labeled(data: DataSet, per_class: Sequence[int], seed: int) -> Tensor:
    """Choose images of each class at random."""
    chosen = []
    for number, wanted in enumerate(per_class):
        members = torch.nonzero(data.train_y == number).flatten()
        order = permutation(seed, Stream.SPLIT, number, len(members))
        chosen.append(members[torch.from_numpy(order[:wanted])])
    return torch.cat(chosen)


def _held_out(data: DataSet, labeled: Tensor, config: Config) -> Split:
    """Take `--hold-out` of the labeled images of each class away, at least one."""
    if config.hold_out == 0:
        return make_split(data, labeled)
    labeled, taken = labeled.sort().values, []
    for number, name in enumerate(data.classes):
        members = labeled[data.train_y[labeled] == number]
        count = max(1, round(config.hold_out * len(members)))
        if count >= len(members):
            raise OptionError(
                f"--hold-out {config.hold_out} takes {count} of the {len(members)} labeled images of class {name!r} "
                "and leaves none to train on: give a smaller share, or more labels."
            )
        order = permutation(config.seed, Stream.HELD_OUT, number, len(members))
        taken.append(members[torch.from_numpy(order[:count])])
    held = torch.cat(taken)
    return make_split(data, labeled[~torch.isin(labeled, held)], held)


def make_split(data: DataSet, labeled: Tensor, held_out: Tensor | None = None) -> Split:
    """The split of these labeled and held-out images, with its digests."""
    held_out = torch.empty(0, dtype=torch.int64) if held_out is None else held_out.sort().values
    labeled = labeled.sort().values
    digest = hashlib.sha256("\n".join(data.classes).encode())
    for part in (data.train_y, labeled, *([held_out] if len(held_out) else [])):
        digest.update(part.numpy().astype("<i8").tobytes())
    return Split(labeled, held_out, digest.hexdigest(), data.digest())


def read_list(path: Path, data: DataSet) -> Tensor:
    """Read a list of labeled images, such as the published ones of 1 % and 10 % of ImageNet.

    It is a text, one name a line: `n01440764_10026.JPEG`, `n01440764/n01440764_10026.JPEG` or a longer path that ends
    like this; or the number of a training image, where the data set has no files. Empty lines do not count.
    """
    try:
        lines = _lines(path)
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(
            f"--label-file {path} cannot be read ({error}): give a text file of image names, or of numbers also a "
            ".npy or .json file."
        ) from error
    # Below train/, in Unicode's composed form; images without a label cannot be named.
    names = None if data.files is None else [_parts(name)[1:] for name in data.files.train]
    by_name: dict[str, list[int]] = {}
    for index, parts in enumerate(names or [(str(k),) for k in range(len(data.train_y))]):
        if data.train_y[index] >= 0:
            by_name.setdefault(parts[-1], []).append(index)
    found: dict[int, int] = {}
    for line, text in enumerate(lines, 1):
        if not text:
            continue
        where, candidates = f"--label-file {path}, line {line}: {text!r}", list[int]()
        for form in dict.fromkeys((text, text.replace("\\", "/"))):  # the second as Windows writes it
            parts = _parts(form)
            candidates = candidates or by_name.get(parts[-1], [])
            if names is not None:
                candidates = [k for k in candidates if _ends_alike(names[k], parts)]
        if not candidates:
            what = "training image" if names is None else "training image in a class folder"
            raise DatasetError(f"{where} is no {what}: write the names (or numbers) that they have there.")
        if len(candidates) > 1:
            raise DatasetError(f"{where} is the name of images of several classes: write CLASS/NAME.")
        if candidates[0] in found:
            raise DatasetError(f"{where} is the image of line {found[candidates[0]]}, too: name each once.")
        found[candidates[0]] = line
    chosen = torch.tensor(sorted(found), dtype=torch.int64)
    counts = torch.bincount(data.train_y[chosen], minlength=len(data.classes))
    empty = [name for name, count in zip(data.classes, counts.tolist(), strict=True) if not count]
    if empty:
        raise OptionError(
            f"--label-file {path} names {len(chosen)} images of {len(counts) - len(empty)} of the {len(counts)} "
            f"classes, none of {', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}: "
            "name at least one of each, or remove the class."
        )
    return chosen


def _lines(path: Path) -> list[str]:
    """Names or numbers of a list: a text, an array (USB's form), or JSON numbers, perhaps as `label` (FixMatch's)."""
    regular_size(path)
    if path.suffix == ".npy":
        found = np.load(path, allow_pickle=False).reshape(-1).tolist()
    elif path.suffix == ".json":
        held = read_json(path)
        found = held.get("label") if isinstance(held, dict) else held
    else:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    if not isinstance(found, list) or not all(type(number) is int for number in found):
        raise ValueError("it holds something else than whole numbers")
    return [str(number) for number in found]


def _parts(name: str) -> tuple[str, ...]:
    return Path(unicodedata.normalize("NFC", name)).parts


def _ends_alike(parts: tuple[str, ...], given: tuple[str, ...]) -> bool:
    """Whether a name below train/ and a given one end alike; the given one may not lie in another part."""
    count = min(len(parts), len(given))
    return parts[-count:] == given[-count:] and given[: -len(parts)][-1:] not in (("test",), ("val",), ("unlabeled",))


def store_or_check(path: Path, split: Split, data: DataSet) -> tuple[list[float], list[float]]:
    """Write `split.json`, or compare the whole of it with what is trained on now."""
    if not path.exists():
        if any(path.parent.glob("checkpoints/*.pt")):  # it is written before the first of them
            raise ResumeError(f"{path} is missing from a run with checkpoints: restore it, or give another --output.")
        record = split_record(split, data)
        if data.files is not None:  # first: split.json vouches for it
            rows = [[name, *known, *data.files.contents.get(name, ())] for name, known in data.files.manifest.items()]
            lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
            write_atomically(path.with_name(FILES), lambda file: file.write(gzip.compress(lines, 6, mtime=0)))
        write_json(path, record)
        return record["mean"], record["std"]
    stored = _stored(path)
    record = split_record(split, data)
    if data.files and data.files.reasons:  # statistics are those of all images: some went bad since
        record |= {key: stored.get(key) for key in ("mean", "std")}
    for key in dict.fromkeys(("sha256", "data_sha256", *record, *stored)):
        if stored.get(key) != record.get(key):
            what = {"sha256": "labeled split", "data_sha256": "data set (pixels or labels)"}.get(key, f"entry {key!r}")
            shas = f" (SHA-256 {stored.get(key)} there, {record[key]} now)" if key.endswith("sha256") else ""
            raise ResumeError(
                f"{path}: the {what} differs from the one that this run started with{shas}. "
                "Restore the data (and the file) as they were, or give another --output to start a new run."
            )
    try:
        return normalisation(stored)
    except (KeyError, TypeError, ValueError) as error:
        raise ResumeError(f"{path}: mean or std is damaged ({error}): restore it, or give another --output.") from error


def normalisation(stored: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and deviation of the channels in what a run stored; any error of a number's where they are none."""
    mean, std = [finite(value) for value in stored["mean"]], [finite(value, 0) for value in stored["std"]]
    if len(mean) != 3 or len(std) != 3:
        raise ValueError("three numbers each are expected")
    return mean, std


def split_record(split: Split, data: DataSet) -> dict[str, Any]:
    """What `split.json` holds."""
    mean, deviation = data.channel_statistics
    record: dict[str, Any] = {
        "sha256": split.digest,
        "data_sha256": split.data_digest,
        "classes": data.classes,
        "labeled": split.labeled.tolist(),
        "held_out": split.held_out.tolist(),
        "mean": mean,
        "std": deviation,
    }
    if isinstance(data, Images):
        record["image_size"] = list(data.train_x.shape[1:3])
    if data.files is not None:
        for key, index in (("labeled", split.labeled), ("held_out", split.held_out)):
            record[f"{key}_files"] = [data.files.train[k] for k in index.tolist()]
        record["training_files"] = len(data.files.train)
        record["left_out"] = data.files.left_out
    return record


def files_before(folder: Path) -> FileRecord | None:
    """What a run directory says of the files of its run."""
    if not (folder / "split.json").exists():
        return None
    stored = _stored(folder / "split.json")
    if "training_files" not in stored:
        return None
    path = folder / FILES
    with readable(path):
        rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
        manifest = {str(name): (int(label), str(mark)) for name, label, mark, *_ in rows}
        contents = {
            str(name): (str(digest), str(stamp)) for name, _, _, *more in rows for digest, stamp in [more] * bool(more)
        }
        left_out = {str(name): str(reason) for name, reason in stored["left_out"].items()}
        record = FileRecord(list(manifest)[: int(stored["training_files"])], manifest, left_out, contents=contents)
        if record.digest() != stored["data_sha256"]:
            raise ValueError("it is not the list that split.json names")
    return record


def _stored(path: Path) -> dict[str, Any]:
    with readable(path):
        stored = read_json(path)
        if not isinstance(stored, dict):
            raise ValueError(f"it holds a {type(stored).__name__}")
    return stored

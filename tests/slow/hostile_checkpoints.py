"""The parts of `hostile_files.py` that need no training: checkpoints, records, run files and forged pickles."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from victims import ROOT

from trainer.checkpoint import load_latest, save_checkpoint
from trainer.cli import read_options
from trainer.config import HARMLESS, Config, preset_config, resolve
from trainer.datasets import load_images
from trainer.errors import CheckpointError, ResumeError, TrainerError
from trainer.loader import ToModel
from trainer.rundir import check_run
from trainer.runlog import MetricsFile, books
from trainer.split import draw_split, split_record, store_or_check
from trainer.step import Trainer
from trainer.training import main
from trainer.weights import export_weights, load_model, read_start

sys.path.insert(0, str(ROOT / "tests"))
from support import forgeries

Case = tuple[str, str, str]
OPTIONS: dict[str, Any] = {
    "labels": 20, "batch_size": 4, "unlabeled_ratio": 2, "steps": 12, "method": "supervised", "eval_every": 12,
    "checkpoint_every": 3, "log_every": 2, "workers": 0, "progress": "none",
}  # fmt: skip


def config(folder: Path, **changes: Any) -> Config:
    """Options of a run of seconds."""
    return dataclasses.replace(preset_config("demo"), **{**OPTIONS, "output": str(folder), **changes})


def begun(folder: Path, **changes: Any) -> Path:
    """The directory of a run with checkpoints at 3 and 6 of 12 steps."""
    quietly(lambda: main(config(folder, **{"stop_after_steps": 6, **changes})))
    return folder


def quietly(action: Callable[[], Any]) -> tuple[Any, str]:
    """The result of an action, and what it said on stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        result = action()
    return result, said.getvalue()


def loading(folder: Path) -> str:
    """What reading a checkpoint whose newest file is damaged comes to; right is the one before, or a refusal."""
    try:
        state, said = quietly(lambda: load_latest(folder))
    except CheckpointError:
        return "ok: refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if state["step"] == 6:
        return "believed"
    return "ok: the one before" if "skipping a damaged checkpoint" in said else "the one before, without a word"


def truncated(work: Path, quick: bool) -> Iterator[Case]:
    folder = begun(work / "run") / "checkpoints"
    for suffix, row in ((".pt", "checkpoint, cut"), (".json", "its record, cut")):
        path = folder / f"step-00000006{suffix}"
        content = path.read_bytes()
        size = len(content)
        ends = set(range(64)) | set(range(size - 64, size)) | set(range(0, size, 4096))
        if suffix == ".json":
            ends = set(range(len(content.rstrip())))
        for end in sorted(ends)[:: 40 if quick else 1]:
            path.write_bytes(content[:end])
            yield row, f"{end} of {size} bytes", loading(folder)
        path.write_bytes(content)


def flip(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def flipped(work: Path, quick: bool) -> Iterator[Case]:
    run = begun(work / "run")
    folder, numbers = run / "checkpoints", random.Random(0)

    def bits(path: Path, count: int | None) -> Iterator[int]:
        content = path.read_bytes()
        total = 8 * len(content)
        for bit in range(total) if count is None else [numbers.randrange(total) for _ in range(count)]:
            path.write_bytes(flip(content, bit))
            yield bit
        path.write_bytes(content)

    few = 20 if quick else None
    for bit in bits(folder / "step-00000006.pt", few or 2000):
        yield "checkpoint, a bit", f"bit {bit}", loading(folder)
    record = folder / "step-00000006.json"
    meaning = json.loads(record.read_text())
    counting = {key: value for key, value in meaning.items() if key != "step"}
    for bit in bits(record, few):
        answer = loading(folder)
        with contextlib.suppress(ValueError):
            # White space is white space, and the step is in the name.
            same = {key: json.loads(record.read_text()).get(key) for key in meaning if key != "step"} == counting
            answer = "ok: nothing that counts" if answer == "believed" and same else answer
        yield "its record, a bit", f"bit {bit}", answer
    yield from _flipped_run_files(run, bits, few or 500)


def _flipped_run_files(run: Path, bits: Callable[[Path, int], Iterator[int]], count: int) -> Iterator[Case]:
    settled = resolve(config(run))
    images = load_images(settled)
    split = draw_split(images, settled.labels, settled.seed)
    state = load_latest(run / "checkpoints")

    def trained(path: Path) -> Any:
        options = json.loads(path.read_text())["options"]
        return {key: value for key, value in options.items() if key not in HARMLESS}

    before = trained(run / "config.json")
    checks: dict[str, Callable[[Path], Any]] = {
        "config.json": lambda _: check_run(settled, torch.device("cpu")),
        "split.json": lambda path: store_or_check(path, split, images),
        "metrics.jsonl": lambda path: MetricsFile(path, *books(state)[1:]).close(),
    }
    for name, check in checks.items():
        path = run / name
        stated = {key: split_record(split, images)[key] for key in ("sha256", "data_sha256")}
        for bit in bits(path, count):
            try:
                quietly(lambda path=path, check=check: check(path))
            except (ResumeError, CheckpointError):
                answer = "ok: refused"
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"
            else:
                same = name == "config.json" and trained(path) == before
                same = same or (name == "split.json" and json.loads(path.read_text()).items() >= stated.items())
                answer = "ok: nothing that counts" if same else "believed"
            yield f"{name}, a bit", f"bit {bit}", answer


def plant(folder: Path, content: bytes) -> None:
    """A forged checkpoint with a record that vouches for it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step-00000009.pt").write_bytes(content)
    record = {"format": 1, "step": 9, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "step-00000009.json").write_text(json.dumps(record))


def _memory() -> int:
    """The largest resident size of this process so far, in bytes, since it was last asked to forget."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def pickles(work: Path, quick: bool) -> Iterator[Case]:
    forgeries.BOMB = 2**22 if quick else 2**28
    for name, forge in forgeries.PICKLES.items():
        canary, folder = work / "canary", work / "checkpoints"
        plant(folder, forge(canary))
        Path("/proc/self/clear_refs").write_text("5")
        memory, seconds = _memory(), time.process_time()
        try:
            load_latest(folder)
            answer = "believed"
        except CheckpointError:
            answer = "ok: refused"
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        seconds, memory = time.process_time() - seconds, _memory() - memory
        if canary.exists():
            answer = "it ran"
            canary.rmdir()
        if seconds > 1 or memory > 200e6:
            answer = f"{answer} after {seconds:.1f} s and {memory / 1e6:.0f} MB"
            answer = answer.removeprefix("ok: ")
        yield "forged pickles", name, answer


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=12,
)
_VALUES = _JSON | st.just(torch.zeros(3)) | st.just(torch.zeros(2, 2, dtype=torch.uint8)) | st.binary(max_size=8)


def fuzz(work: Path, quick: bool) -> Iterator[Case]:
    """Each reader gets what it should refuse, or take; anything but an error by name is wrong."""
    run = begun(work / "run")
    settled = resolve(config(run))
    images = load_images(settled)
    split = draw_split(images, settled.labels, settled.seed)
    folder = run / "checkpoints"
    state = load_latest(folder) or {}
    whole = {name: (run / name).read_bytes() for name in ("config.json", "split.json")}
    record = json.loads((folder / "step-00000006.json").read_text())
    trainer = Trainer.fresh(
        settled, 10, ToModel(*images.channel_statistics, torch.device("cpu"), channels_last=False), 10
    )
    canonical = json.loads(whole["config.json"])

    def changed(value: dict[str, Any]) -> st.SearchStrategy[Any]:
        """A dictionary with some values replaced, or something else altogether."""
        some = st.dictionaries(st.sampled_from(sorted(value)), _JSON, max_size=3).map(lambda other: {**value, **other})
        return some | _JSON

    def write(name: str, value: Any) -> None:
        (run / name).write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())

    def read_config(value: Any) -> None:
        write("config.json", value)
        check_run(settled, torch.device("cpu"))

    def read_split(value: Any) -> None:
        write("split.json", value)
        store_or_check(run / "split.json", split, images)

    def read_record(value: Any) -> None:
        write("checkpoints/step-00000006.json", value)
        load_latest(folder)

    def read_checkpoint(content: bytes) -> None:
        plant(work / "planted", content)
        load_latest(work / "planted")

    def read_state(changes: dict[str, Any]) -> None:
        foreign = {**state, **changes}
        trainer.load_state_dict(foreign)
        books(foreign)

    def read_options_file(value: Any) -> None:
        write("options.json", value)
        given = {**read_options(run / "options.json", Config), "output": str(run / "new")}
        resolve(dataclasses.replace(preset_config("demo"), **given))

    def read_weights(content: bytes) -> None:
        (run / "foreign.safetensors").write_bytes(content)
        read_start(config(run, init_from=str(run / "foreign.safetensors")))

    def read_model(content: bytes) -> None:
        (run / "foreign.safetensors").write_bytes(content)
        load_model(run / "foreign.safetensors")

    def mixed(content: bytes) -> st.SearchStrategy[bytes]:
        """Any bytes, or these with some put in or put over others."""
        at, some = st.integers(0, len(content)), st.binary(min_size=1, max_size=64)
        within = st.tuples(at, some).map(lambda it: content[: it[0]] + it[1] + content[it[0] :])
        over = st.tuples(at, some).map(lambda it: content[: it[0]] + it[1] + content[it[0] + len(it[1]) :])
        return st.binary() | within | over

    pt = (folder / "step-00000006.pt").read_bytes()
    export_weights(run / "model.safetensors", trainer.model, {"format": 1, "arch": settled.arch, "classes": ["a"] * 10})
    weights = (run / "model.safetensors").read_bytes()
    header = weights[: 8 + int.from_bytes(weights[:8], "little")]
    readers: list[tuple[str, Callable[[Any], None], st.SearchStrategy[Any], int]] = [
        ("config.json", read_config, changed(canonical) | st.binary(), 2000),
        ("split.json", read_split, changed(json.loads(whole["split.json"])) | st.binary(), 2000),
        ("a checkpoint's record", read_record, changed(record) | st.binary(), 2000),
        ("a checkpoint whose record vouches for it", read_checkpoint, mixed(pt), 1000),
        ("--config", read_options_file, changed(dataclasses.asdict(config(run))) | st.binary(), 2000),
        ("--init-from, safetensors", read_weights, mixed(header).map(lambda it: it + weights[len(header) :]), 1000),
        ("load_model, safetensors", read_model, mixed(header).map(lambda it: it + weights[len(header) :]), 1000),
        ("an item of the state", read_state, st.dictionaries(st.sampled_from(sorted(state)), _VALUES, min_size=1), 500),
    ]
    for name, reader, strategy, examples in readers:
        yield from _examples(name, reader, strategy, 20 if quick else examples)


def _examples(
    name: str, reader: Callable[[Any], None], strategy: st.SearchStrategy[Any], examples: int
) -> Iterator[Case]:
    answers: list[str] = []

    @settings(
        max_examples=examples, database=None, deadline=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def one(value: Any) -> None:
        try:
            quietly(lambda: reader(value))
            answers.append("ok: taken")
        except TrainerError:
            answers.append("ok: refused")
        except Exception as error:
            answers.append(f"{type(error).__name__}: {str(error)[:100]}")

    one()
    for number, answer in enumerate(answers):
        yield f"fuzz, {name}", f"example {number}", answer


def resaved(folder: Path, **changes: Any) -> None:
    """Rewrite the newest checkpoint of a run with other items, as a whole file."""
    state = load_latest(folder / "checkpoints") or {}
    save_checkpoint(folder / "checkpoints", state["step"], {**state, **changes})


def copied(folder: Path, to: Path) -> Path:
    """A copy of a run directory."""
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(folder, to, symlinks=True))

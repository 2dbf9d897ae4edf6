"""The run: data, trainer, evaluations, checkpoints, on one process or many."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from gradconsist.errors import GradConsistError
from trainer import methods
from trainer.checkpoint import forget_older, load_latest, remove_leftovers, save_checkpoint
from trainer.config import method_label
from trainer.errors import TrainerError
from trainer.evaluation import summarize
from trainer.files import write_json
from trainer.imagenet.batches import StepPhotographs, spare_cores_each, worker_count
from trainer.imagenet.config import RUN_HARMLESS, ImageNetConfig, resolve
from trainer.imagenet.evaluation import PROTOCOL, evaluate
from trainer.imagenet.files import PhotographFolder
from trainer.imagenet.labels import choose_labeled
from trainer.imagenet.networks import build_network
from trainer.imagenet.start import check_same_files, is_finished
from trainer.imagenet.step import ProcessTrainer
from trainer.loader import StepImages, ToModel, step_batches
from trainer.plotting import draw_curves
from trainer.processes import OtherProcessError, join, leave
from trainer.rundir import check_run, create_run, exclusive
from trainer.runlog import MetricsFile, Progress, append_line, books, duration, tensorboard_writer
from trainer.runs import read_run
from trainer.split import Split, store_or_check
from trainer.stopping import StopRequest
from trainer.waiting import LoaderWatch
from trainer.weights import export_weights

MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet's channels, as torchvision has them


def run(config: ImageNetConfig) -> int:
    """Train as the options say, continuing what the run directory holds.

    Args:
        config: The options, as given.

    Returns:
        The process's exit status: 0, or 128 + the signal that stopped it.
    """
    processes = join(config.device)
    config = resolve(config, processes.world)
    methods.check_method(config)
    folder = Path(str(config.output))
    finished = processes.on_first(lambda: is_finished(config, processes))
    if finished:
        return 0
    photographs = processes.together(lambda: PhotographFolder(Path(config.data_dir)))
    split = processes.together(lambda: choose_labeled(photographs, config))
    check_same_files(processes, split)
    torch.manual_seed(config.seed)
    to_model = ToModel(MEAN, DEVIATION, processes.device, channels_last=config.channels_last)
    model = processes.together(lambda: build_network(config, len(photographs.classes), processes))
    trainer = ProcessTrainer(config, model, to_model, len(photographs.train), processes)
    with contextlib.ExitStack() as stack:

        def take() -> None:
            # Only now is everything known to fit: a refused start leaves no run directory behind.
            stack.enter_context(exclusive(folder))
            if not check_run(config, processes.device, RUN_HARMLESS):  # again: another run may have come first
                create_run(config, processes.device)
            store_or_check(folder / "split.json", split, photographs.classes)

        processes.on_first(take)
        return _Execution(folder, photographs, split, trainer).train()


class _Execution:
    """One process's part of a run."""

    def __init__(self, folder: Path, photographs: PhotographFolder, split: Split, trainer: ProcessTrainer) -> None:
        self.config = config = trainer.config
        self.processes = processes = trainer.processes
        self.folder, self.photographs, self.trainer = folder, photographs, trainer
        self.checkpoints = folder / "checkpoints"
        state = self._load()
        if state is not None:
            processes.together(lambda: trainer.load_state_dict(state))
            processes.on_first(lambda: forget_older(self.checkpoints, trainer.step))
        self.seconds, size, digest = books(state)  # of training, over all calls
        self.saved = trainer.step if state else -1
        self.dataset = StepPhotographs(photographs.train, split, config, processes)
        self.workers = worker_count(config.workers, processes.local_world)
        term_later = config.ggcr_weight > 0 and trainer.step < config.ggcr_warmup < config.steps
        spare = spare_cores_each(processes.local_world)
        self.watch = LoaderWatch(self.workers, spare, term_later=term_later)
        self.metrics: MetricsFile | None = None
        self.board = None

        def open_files() -> None:
            self.metrics = MetricsFile(folder / "metrics.jsonl", size, digest)
            if config.tensorboard:
                self.board = tensorboard_writer(folder, trainer.step)

        processes.on_first(open_files)
        self.progress = Progress(config.progress if processes.first else "none", trainer.step, config.steps)
        self._banner(split)

    def _load(self) -> dict[str, Any] | None:
        """The latest whole checkpoint, which process 0 alone reads: others may not see the run directory."""
        state: dict[str, Any] | None = None

        def read() -> None:
            nonlocal state
            remove_leftovers(self.checkpoints)
            state = load_latest(self.checkpoints)

        self.processes.on_first(read)
        buffer = io.BytesIO()
        if state is not None and self.processes.world > 1:
            torch.save(state, buffer)
        content = self.processes.bytes_from_first(buffer.getvalue())
        if content and not self.processes.first:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return state

    def _banner(self, split: Split) -> None:
        config, trainer, say = self.config, self.trainer, self.progress.say
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        say(
            f"{method_label(config)} on {self.photographs.name} ({len(self.photographs.train):,} training images, "
            f"{len(self.photographs.classes)} classes, {len(split.labeled):,} labels), {config.arch} at "
            f"{config.image_size} ({parameters:,} parameters, norm {config.norm}), {self.processes.world} x "
            f"{self.processes.device.type}, {torch.get_num_threads()} threads + {self.workers} workers each"
        )
        say(f"split SHA-256 {split.digest}")
        say(f"run directory {self.folder}" + (f", continuing at step {trainer.step}" if trainer.step else ""))
        if config.ggcr_weight > 0 and config.steps <= config.ggcr_warmup:
            say(f"note: --ggcr-warmup {config.ggcr_warmup} >= --steps {config.steps}: the term is never added.")

    def train(self) -> int:
        config, trainer = self.config, self.trainer
        pin = trainer.to_model.device.type == "cuda"
        self.batches = step_batches(self.dataset, trainer.step, config.steps, workers=self.workers, pin=pin, ahead=2)
        reason, exit_code = None, 0
        with StopRequest(config) as stop:
            try:
                clock = time.monotonic()
                while trainer.step < config.steps and reason is None:
                    trainer.train_step(self._fetch)
                    now = time.monotonic()
                    self.seconds += now - clock
                    advice = self.watch.add(self.waited, now - clock - self.waited)
                    if advice is not None:
                        self.progress.say(advice)
                    self._after_step()
                    reason, exit_code = self._agree(stop.after_step(), stop.exit_code)
                    clock = time.monotonic()
                self._save()
            finally:
                del self.batches  # ends the workers
                self.progress.close()
                if self.metrics is not None:
                    self.metrics.close()
                if self.board is not None:
                    self.board.close()
        if trainer.step < config.steps:
            self.progress.say(f"stopped by {reason} at step {trainer.step} of {config.steps}; checkpoint written.")
            self.progress.say("Start the same command again to continue.")
            return exit_code
        self.processes.on_first(self._finish)
        return 0

    def _fetch(self) -> StepImages:
        """The next step's images; how long they took is in `waited`."""
        start = time.monotonic()
        images = next(self.batches)
        self.waited = time.monotonic() - start
        return images

    def _agree(self, reason: str | None, exit_code: int) -> tuple[str | None, int]:
        """Stop together: a signal or a clock may reach one process only."""
        code = self.processes.maximum(-1 if reason is None else exit_code)
        return (None, 0) if code < 0 else (reason or "another process", code)

    def _after_step(self) -> None:
        config, trainer = self.config, self.trainer
        step, last = trainer.step, trainer.step == config.steps
        if step % config.log_every == 0 or last:
            means = trainer.meter.flush()
            self._record("train", means)
            self.progress.show(loss=means.get("loss"), mask=means.get("mask_rate"), images_per_s=self._rate())
        self.progress.advance()
        if step % config.eval_every == 0 or last:
            numbers = evaluate(
                trainer.average.model,
                self.photographs.test,
                trainer.to_model,
                self.processes,
                size=config.image_size,
                workers=self.workers,
            )
            trainer.evaluations.append(numbers["test_accuracy"])
            self._record("eval", dict(numbers))
            self.progress.show(top1=numbers["test_accuracy"], top5=numbers["test_accuracy_top5"])
            self.progress.line()
        if step % config.checkpoint_every == 0 or last:
            self._save()

    def _record(self, kind: str, numbers: dict[str, float | None]) -> None:
        step = self.trainer.step
        if self.metrics is not None:
            self.metrics.write({"kind": kind, "step": step, **numbers})
        if self.board is not None:
            for name, value in numbers.items():
                if value is not None:
                    self.board.add_scalar(name if kind == "eval" else f"train/{name}", value, step)

    def _rate(self) -> float:
        """Images per second of training so far, over all processes; also one line of timing.jsonl."""
        rate = (self.config.batch_size + self.dataset.unlabeled_batch) * self.trainer.step / max(self.seconds, 1e-9)
        if self.processes.first:
            line = {
                "step": self.trainer.step,
                "seconds": round(self.seconds, 3),
                "images_per_second": round(rate, 1),
                "waiting": round(self.watch.share, 4),
            }
            append_line(self.folder / "timing.jsonl", line)
        return rate

    def _save(self) -> None:
        step = self.trainer.step
        if self.saved == step:
            return
        state = self.trainer.state_dict()

        def write() -> None:
            # The lines must be on the disk before the checkpoint that counts on them.
            assert self.metrics is not None  # the first process has it
            lines = {"metrics_bytes": self.metrics.sync(), "metrics_sha256": self.metrics.sha256}
            save_checkpoint(self.checkpoints, step, {**state, **lines, "seconds": self.seconds})

        self.processes.on_first(write)
        self.saved = step

    def _finish(self) -> None:
        config, trainer = self.config, self.trainer
        numbers = summarize(trainer.evaluations)
        summary: dict[str, Any] = {
            "protocol": PROTOCOL,
            "method": method_label(config),
            "dataset": self.photographs.name,
            "labels": len(self.dataset.labeled),
            "arch": config.arch,
            "seed": config.seed,
            "processes": self.processes.world,
            "steps": trainer.step,
            "evaluations": len(trainer.evaluations),
            **numbers,
            "seconds": round(self.seconds, 1),
        }
        export_weights(self.folder / "model.safetensors", trainer.average.model, self._about_weights())
        draw_curves([read_run(self.folder)], self.folder / "curves.png")
        write_json(self.folder / "summary.json", summary)  # last: its presence says that the run is finished
        self.progress.say(
            f"finished in {duration(self.seconds)} of training: top-1 accuracy last {numbers['last']:.4f}, "
            f"median of last 20 evaluations {numbers['median_last_20']:.4f}, best {numbers['best']:.4f}"
        )
        self.progress.say(f"curves: {os.path.join(self.folder, 'curves.png')}, weights: model.safetensors beside it")

    def _about_weights(self) -> dict[str, Any]:
        """What one must know to use the weights, whose names are torchvision's."""
        config = self.config
        return {
            "format": 1,
            "arch": config.arch,
            "norm": config.norm,
            "classes": self.photographs.classes,
            "mean": MEAN,
            "std": DEVIATION,
            "image_size": [config.image_size, config.image_size],
            "dataset": self.photographs.name,
            "method": method_label(config),
            "labels": len(self.dataset.labeled),
            "seed": config.seed,
            "steps": self.trainer.step,
        }


def main(config: ImageNetConfig) -> int:
    """Run, and turn what is refused into one message and an exit status.

    Args:
        config: The options, as given.

    Returns:
        The exit status.
    """
    try:
        return run(config)
    except OtherProcessError as error:  # that process has said why
        return error.exit_code
    except (TrainerError, GradConsistError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    except OSError as error:
        print(
            f"error: {error}. Checkpoints are untouched: mend this and start the same command again.", file=sys.stderr
        )
        return 1
    except RuntimeError as error:
        if not re.search(r"gloo|NCCL|[Cc]onnection", str(error)):
            raise
        print(
            f"error: another process is gone ({str(error).splitlines()[0][:200]}). Checkpoints are untouched.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:  # before the first step; later, the loop answers it with a checkpoint
        print("interrupted before training began; nothing was changed.", file=sys.stderr)
        return 130
    finally:
        leave()

"""The run: data, trainer, evaluations, checkpoints, and what is left in the run directory at the end."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradconsist.errors import GradConsistError
from trainer import methods
from trainer.checkpoint import forget_older, load_latest, remove_leftovers, save_checkpoint
from trainer.config import Config, method_label, resolve
from trainer.datasets import Images, load_images
from trainer.errors import OptionError, TrainerError
from trainer.evaluation import PROTOCOL, evaluate, summarize, with_fresh_statistics
from trainer.files import write_json
from trainer.loader import StepDataset, ToModel, spare_cores, step_batches, worker_count
from trainer.plotting import draw_curves
from trainer.rundir import check_run, create_run, exclusive, last_accuracy
from trainer.runlog import MetricsFile, Progress, append_line, books, duration, tensorboard_writer
from trainer.runs import read_run
from trainer.split import Split, draw_split, store_or_check
from trainer.step import Trainer
from trainer.stopping import StopRequest
from trainer.waiting import LoaderWatch
from trainer.weights import export_weights, read_start


def run(config: Config) -> int:
    """Train as the options say, continuing what the run directory holds.

    Args:
        config: The options, as given.

    Returns:
        The process's exit status: 0, or 128 + the signal that stopped it.
    """
    config = resolve(config)
    methods.check_method(config)
    config, start = read_start(config)
    device = _device(config.device)
    folder = Path(str(config.output))
    known = check_run(config, device)
    if known and (folder / "summary.json").exists():
        print(f"{folder} is finished: test accuracy {last_accuracy(folder):.4f}. Give another --output for a new run.")
        return 0
    images = load_images(config)
    split = draw_split(images, config.labels, config.seed)
    mean, deviation = images.channel_statistics()
    to_model = ToModel(mean, deviation, device, channels_last=config.channels_last)
    trainer = Trainer(config, len(images.classes), to_model, len(images.train_y), start)
    # Only now is everything known to fit: a refused start leaves no run directory behind.
    with exclusive(folder):
        if not known and not check_run(config, device):  # again: another process may have come first
            create_run(config, device)
        store_or_check(folder / "split.json", split, images.classes)
        return _Execution(folder, images, split, trainer).train()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"--device {name!r} is not usable here ({str(error).splitlines()[0]}): try cpu.") from error
    return device


class _Execution:
    """One process's part of a run."""

    def __init__(self, folder: Path, images: Images, split: Split, trainer: Trainer) -> None:
        self.config = config = trainer.config
        self.folder, self.images, self.trainer = folder, images, trainer
        self.checkpoints = folder / "checkpoints"
        remove_leftovers(self.checkpoints)
        state = load_latest(self.checkpoints)
        if state is not None:
            trainer.load_state_dict(state)
            forget_older(self.checkpoints, trainer.step)
        self.seconds, size, digest = books(state)  # of training, over all calls
        self.metrics = MetricsFile(folder / "metrics.jsonl", size, digest)
        self.saved = trainer.step if state else -1
        self.dataset = StepDataset(images, split, config)
        self.workers = worker_count(config.workers)
        term_later = config.ggcr_weight > 0 and trainer.step < config.ggcr_warmup < config.steps
        self.watch = LoaderWatch(self.workers, spare_cores(), term_later=term_later)
        self.board = tensorboard_writer(folder, trainer.step) if config.tensorboard else None
        self.progress = Progress(config.progress, trainer.step, config.steps)
        self._banner(split)

    def _banner(self, split: Split) -> None:
        config, trainer, say = self.config, self.trainer, self.progress.say
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        height, width = self.images.train_x.shape[1:3]
        say(
            f"{method_label(config)} on {self.images.name} ({len(self.images.train_y):,} training images "
            f"{height}x{width}, {len(self.images.classes)} classes, {config.labels} labels), "
            f"{config.arch} ({parameters:,} parameters), {trainer.to_model.device}, "
            f"{torch.get_num_threads()} threads + {self.workers} workers"
        )
        say(f"split SHA-256 {split.digest}")
        say(f"run directory {self.folder}" + (f", continuing at step {trainer.step}" if trainer.step else ""))
        if config.ggcr_weight > 0 and config.steps <= config.ggcr_warmup:
            say(f"note: --ggcr-warmup {config.ggcr_warmup} >= --steps {config.steps}: the term is never added.")

    def train(self) -> int:
        config, trainer = self.config, self.trainer
        pin = trainer.to_model.device.type == "cuda"
        batches = step_batches(self.dataset, trainer.step, config.steps, workers=self.workers, pin=pin)
        reason = None
        with StopRequest(config) as stop:
            try:
                clock = time.monotonic()
                for batch in batches:
                    loaded = time.monotonic()
                    trainer.train_step(batch)
                    now = time.monotonic()
                    self.seconds += now - clock
                    advice = self.watch.add(loaded - clock, now - loaded)
                    if advice is not None:
                        self.progress.say(advice)
                    self._after_step()
                    reason = stop.after_step()
                    if reason is not None:
                        break
                    clock = time.monotonic()
                self._save()
            finally:
                del batches  # ends the workers
                self.progress.close()
                self.metrics.close()
                if self.board is not None:
                    self.board.close()
        if trainer.step < config.steps:
            self.progress.say(f"stopped by {reason} at step {trainer.step} of {config.steps}; checkpoint written.")
            self.progress.say("Start the same command again to continue.")
            return stop.exit_code
        self._finish()
        return 0

    def _after_step(self) -> None:
        config, trainer = self.config, self.trainer
        step, last = trainer.step, trainer.step == config.steps
        if step % config.log_every == 0 or last:
            means = trainer.meter.flush()
            self._record("train", means)
            rate = self._rate()
            self.progress.show(loss=means.get("loss"), mask=means.get("mask_rate"), images_per_s=rate)
        self.progress.advance()
        if step % config.eval_every == 0 or last:
            images = self.images
            numbers = evaluate(
                self._evaluated(), images.test_x, images.test_y, trainer.to_model, classes=images.classes
            )
            trainer.evaluations.append(numbers["test_accuracy"])
            self._record("eval", dict(numbers))
            self.progress.show(test=numbers["test_accuracy"])
            self.progress.line()
        if step % config.checkpoint_every == 0 or last:
            self._save()

    def _evaluated(self) -> nn.Module:
        """The averaged model, with the statistics that --eval-statistics names."""
        model = self.trainer.average.model
        if self.config.eval_statistics == "averaged":
            return model
        return with_fresh_statistics(model, self.images.train_x, self.trainer.to_model)

    def _record(self, kind: str, numbers: dict[str, float | None]) -> None:
        step = self.trainer.step
        self.metrics.write({"kind": kind, "step": step, **numbers})
        if self.board is not None:
            for name, value in numbers.items():
                if value is not None:
                    self.board.add_scalar(name if kind == "eval" else f"train/{name}", value, step)

    def _rate(self) -> float:
        """Images per second of training so far; also one line of timing.jsonl, with the share of waiting for images."""
        per_step = self.config.batch_size + self.dataset.unlabeled_batch
        rate = per_step * self.trainer.step / max(self.seconds, 1e-9)
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
        # The lines must be on the disk before the checkpoint that counts on them.
        lines = {"metrics_bytes": self.metrics.sync(), "metrics_sha256": self.metrics.sha256}
        save_checkpoint(self.checkpoints, step, {**state, **lines, "seconds": self.seconds})
        self.saved = step

    def _finish(self) -> None:
        config, trainer = self.config, self.trainer
        numbers = summarize(trainer.evaluations)
        summary: dict[str, Any] = {
            "protocol": PROTOCOL + f"; BatchNorm statistics {config.eval_statistics}",
            "method": method_label(config),
            "dataset": self.images.name,
            "labels": config.labels,
            "arch": config.arch,
            "seed": config.seed,
            "steps": trainer.step,
            "evaluations": len(trainer.evaluations),
            **numbers,
            "seconds": round(self.seconds, 1),
        }
        export_weights(self.folder / "model.safetensors", self._evaluated(), self._about_weights())
        draw_curves([read_run(self.folder)], self.folder / "curves.png")
        write_json(self.folder / "summary.json", summary)  # last: its presence says that the run is finished
        self.progress.say(
            f"finished in {duration(self.seconds)} of training: test accuracy last {numbers['last']:.4f}, "
            f"median of last 20 evaluations {numbers['median_last_20']:.4f}, best {numbers['best']:.4f}"
        )
        self.progress.say(f"curves: {os.path.join(self.folder, 'curves.png')}, weights: model.safetensors beside it")

    def _about_weights(self) -> dict[str, Any]:
        """What one must know to use the weights."""
        config, images = self.config, self.images
        mean, deviation = images.channel_statistics()
        return {
            "format": 1,
            "arch": config.arch,
            "classes": images.classes,
            "mean": mean,
            "std": deviation,
            "image_size": list(images.train_x.shape[1:3]),
            "dataset": images.name,
            "method": method_label(config),
            "labels": config.labels,
            "seed": config.seed,
            "steps": self.trainer.step,
        }


def main(config: Config) -> int:
    """Run, and turn what is refused into one message and an exit status.

    Args:
        config: The options, as given.

    Returns:
        The exit status.
    """
    try:
        return run(config)
    except (TrainerError, GradConsistError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    except OSError as error:
        print(
            f"error: {error}. Checkpoints are untouched: mend this and start the same command again.", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:  # before the first step; later, the loop answers it with a checkpoint
        print("interrupted before training began; nothing was changed.", file=sys.stderr)
        return 130

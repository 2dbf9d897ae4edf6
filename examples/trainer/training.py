"""The run: data, trainer, evaluations, checkpoints, and what is left in the run directory, on one process or many."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import io
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer import methods
from trainer.checkpoint import forget_older, load_latest, remove_leftovers, save_checkpoint
from trainer.config import Config, method_label, resolve
from trainer.datasets import DataSet, Images
from trainer.errors import TrainerError
from trainer.evaluation import PROTOCOL, evaluate, images_of, summarize, with_fresh_statistics
from trainer.files import read_json, write_json
from trainer.folder import LEFT_OUT
from trainer.launch import StopRequest, guarded
from trainer.loader import LoaderWatch, StepImages, ToModel, batches_of, spare_cores, step_batches, worker_count
from trainer.loggers import Loggers, check_loggers, write_csv
from trainer.panels import draw_curves
from trainer.processes import is_of_processes, join, leave
from trainer.rundir import check_run, check_same_files, create_run, exclusive, is_finished, load, record_left_out
from trainer.runlog import MetricsFile, Progress, append_line, books, duration
from trainer.runs import read_run
from trainer.split import Split, choose_labeled, store_or_check
from trainer.statistics import FINAL
from trainer.step import Trainer
from trainer.weights import describe, export_weights, read_start


def run(config: Config) -> int:
    """Train as the options say, continuing what the run directory holds."""
    processes = join(config.device)
    config = resolve(config, processes.world)
    methods.check_method(config)
    processes.on_first(lambda: check_loggers(config))
    config, start = processes.together(lambda: read_start(config))
    folder = Path(str(config.output))
    if processes.on_first(lambda: is_finished(folder, config, processes)):
        return 0
    data = load(folder, config, processes)
    split = processes.together(lambda: choose_labeled(data, config))
    check_same_files(processes, split)
    size = data.train_x.shape[1:3] if isinstance(data, Images) else [int(config.image_size or 0)] * 2
    to_model = ToModel(*data.channel_statistics, processes.device, channels_last=config.channels_last)
    count, samples = len(data.classes), len(data.train_y)
    trainer = Trainer.fresh(config, count, to_model, samples, start, processes=processes, size=size)
    with contextlib.ExitStack() as stack:

        def take() -> list[list[float]]:
            # Only now is everything known to fit: a refused start leaves no run directory behind.
            stack.enter_context(exclusive(folder))
            if not check_run(config, processes.device):  # again: another run may have come first
                create_run(config, processes.device)
            statistics = list(store_or_check(folder / "split.json", split, data))
            record_left_out(folder, data, split)
            return statistics

        # As the run began with them: images that were lost since are not in those of today.
        mean, deviation = processes.on_first(take)
        trainer.to_model = ToModel(mean, deviation, processes.device, channels_last=config.channels_last)
        return _Execution(folder, data, split, trainer).train()


class _Execution:
    """One process's part of a run."""

    def __init__(self, folder: Path, data: DataSet, split: Split, trainer: Trainer) -> None:
        self.config = config = trainer.config
        self.processes = processes = trainer.processes
        self.folder, self.data, self.split, self.trainer = folder, data, split, trainer
        self.checkpoints = folder / "checkpoints"
        state = self._load()
        if state is not None:
            processes.together(lambda: trainer.load_state_dict(state))
            processes.on_first(lambda: forget_older(self.checkpoints, trainer.step))
        self.seconds, size, digest = processes.together(lambda: books(state))  # of training, over all calls
        self.saved = trainer.step if state else -1
        self.dataset = batches_of(data, split, config, processes)
        self.workers = worker_count(config, processes.local_world)
        self._prepare_evaluations()
        term_later = config.ggcr_weight > 0 and trainer.step < config.ggcr_warmup < config.steps
        self.watch = LoaderWatch(self.workers, spare_cores(processes.local_world), term_later=term_later)
        self.metrics: MetricsFile | None = None
        self.loggers = Loggers()

        def open_files() -> None:
            self.metrics = MetricsFile(folder / "metrics.jsonl", size, digest)
            self.loggers = Loggers(config, folder, trainer.step)

        processes.on_first(open_files)
        self.progress = Progress(config.progress if processes.first else "none", trainer.step, config.steps)
        self._banner()

    def _load(self) -> dict[str, Any] | None:
        """The latest whole checkpoint, which process 0 alone reads: others may not see the run directory."""
        state: dict[str, Any] | None = None

        def read() -> None:
            nonlocal state
            remove_leftovers(self.checkpoints)
            state = load_latest(self.checkpoints)

        self.processes.on_first(read)
        if self.processes.world == 1:
            return state
        buffer = io.BytesIO()
        if state is not None:
            torch.save(state, buffer)
        content = self.processes.bytes_from_first(buffer.getvalue())
        if content and not self.processes.first:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return state

    def _prepare_evaluations(self) -> None:
        """What is evaluated, by its name in the log: test images, held-out ones, both or none."""
        record = self.folder / LEFT_OUT if self.config.skip_damaged else None
        parts: dict[str, Tensor | None] = {"test": None} if len(self.data.test_y) else {}
        parts |= {"held_out": self.split.held_out} if len(self.split.held_out) else {}
        size = int(self.config.image_size or 0)
        every = {n: images_of(self.data, index, self.processes, size=size, record=record) for n, index in parts.items()}
        self.evaluated = {name: images for name, images in every.items() if images.count}  # all may be lost

    def _banner(self) -> None:
        config, trainer, say, data = self.config, self.trainer, self.progress.say, self.data
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        bare = int((data.train_y < 0).sum())
        size = "x".join(map(str, data.train_x.shape[1:3])) if isinstance(data, Images) else f"at {config.image_size}"
        say(
            f"{method_label(config)} on {data.name} ({len(data.train_y):,} training images {size}, "
            + (f"{bare:,} of them from unlabeled/, " if bare else "")
            + f"{len(data.classes)} classes, {len(self.split.labeled):,} labels"
            + (f", {len(self.split.held_out):,} held out" if len(self.split.held_out) else "")
            + f"), {config.arch} ({parameters:,} parameters, norm {config.norm}), {self.processes.world} x "
            f"{self.processes.device}, {torch.get_num_threads()} threads + {self.workers} workers each"
        )
        say(f"split SHA-256 {self.split.digest}")
        say(f"run directory {self.folder}" + (f", continuing at step {trainer.step}" if trainer.step else ""))
        if config.ggcr_weight > 0 and config.steps <= config.ggcr_warmup:
            say(f"note: --ggcr-warmup {config.ggcr_warmup} >= --steps {config.steps}: the term is never added.")
        if not self.evaluated:
            say("note: there is no test/ (or val/), so the run ends without accuracy; --hold-out 0.2 gives one.")

    def train(self) -> int:
        config, trainer = self.config, self.trainer
        pin = trainer.to_model.device.type == "cuda"
        ahead, k = 2 if config.feed == "stream" else 4, config.accumulate
        self.batches = step_batches(
            self.dataset, k * trainer.step, k * config.steps, workers=self.workers, pin=pin, ahead=ahead
        )
        reason, exit_code = None, 0
        with StopRequest(config) as stop:
            try:
                while trainer.step < config.steps and reason is None:
                    self.waited, clock = 0.0, time.monotonic()
                    trainer.train_step(self._fetch)
                    seconds = time.monotonic() - clock
                    self.seconds += seconds
                    advice = self.watch.add(self.waited, seconds - self.waited)
                    if advice is not None:
                        self.progress.say(advice)
                    self._after_step()
                    reason, exit_code = self.processes.agree(stop.after_step(), stop.exit_code)
                self._save()
            finally:
                del self.batches  # ends the workers
                self.progress.close()
                if self.metrics is not None:
                    self.metrics.close()
                self.loggers.close()
        if config.csv:
            self.processes.on_first(lambda: write_csv(self.folder))
        if trainer.step < config.steps:
            self.progress.say(f"stopped by {reason} at step {trainer.step} of {config.steps}; checkpoint written.")
            self.progress.say("Start the same command again to continue.")
            return exit_code
        self.processes.on_first(self._finish)
        return 0

    def _fetch(self) -> StepImages:
        """The next batch's images; how long those of this step took is in `waited`."""
        start = time.monotonic()
        images = next(self.batches)
        self.waited += time.monotonic() - start
        return images

    def _after_step(self) -> None:
        config, trainer = self.config, self.trainer
        step, last = trainer.step, trainer.step == config.steps
        if step % config.log_every == 0 or last:
            means = trainer.meter.flush()
            self._record("train", means)
            self.progress.show(loss=means.get("loss"), mask=means.get("mask_rate"), images_per_s=self._rate())
        self.progress.advance()
        if self.evaluated and (step % config.eval_every == 0 or last):
            self._evaluate()
        if step % config.checkpoint_every == 0 or last:
            self._save()

    def _evaluate(self) -> None:
        model = self._evaluated_model()
        numbers: dict[str, float] = {}
        for name, images in self.evaluated.items():
            scores = evaluate(
                model, images, self.trainer.to_model, len(self.data.classes), processes=self.processes,
                workers=self.workers if self.config.feed == "stream" else 0,
            )  # fmt: skip
            numbers |= scores.numbers(name, self.data.classes)
            self.progress.show(**{name: scores.accuracy})
        accuracies = {name: numbers[f"{name}_accuracy"] for name in self.evaluated}
        self.trainer.evaluations.append(accuracies)
        self._record("eval", dict(numbers))
        self.progress.line()

    def _evaluated_model(self) -> nn.Module:
        """The averaged model, with the statistics that --eval-statistics names."""
        model = self.trainer.average.model
        if self.config.eval_statistics == "averaged" or not isinstance(self.data, Images):
            return model
        return with_fresh_statistics(model, self.data.train_x, self.trainer.to_model)

    def _record(self, kind: str, numbers: dict[str, float | None]) -> None:
        step = self.trainer.step
        if self.metrics is not None:
            self.metrics.write({"kind": kind, "step": step, **numbers})
            self.loggers.write(kind, step, numbers)

    def _rate(self) -> float:
        """Images per second of training so far, over all processes; also one line of timing.jsonl."""
        per_step = self.config.accumulate * (self.config.batch_size + self.dataset.unlabeled_batch)
        rate = per_step * self.trainer.step / max(self.seconds, 1e-9)
        if self.processes.first:
            done = {"step": self.trainer.step, "seconds": round(self.seconds, 3)}
            speed = {"images_per_second": round(rate, 1), "waiting": round(self.watch.share, 4)}
            append_line(self.folder / "timing.jsonl", done | speed)
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
        trainer = self.trainer
        known = describe(dataclasses.asdict(self.config), read_json(self.folder / "split.json"), trainer.step)
        known["method"] = method_label(self.config)
        export_weights(self.folder / "model.safetensors", self._evaluated_model(), known)
        numbers: dict[str, Any] = dict.fromkeys(FINAL)
        protocol, said, curves = "no test images", "", ""
        if trainer.evaluations:
            kind = "test" if "test" in self.evaluated else "held_out"
            what = {"test": "test accuracy", "held_out": "accuracy on held-out images"}[kind]
            judged = [numbers["held_out"] for numbers in trainer.evaluations if "held_out" in numbers]
            protocol = f"{PROTOCOL}; BatchNorm statistics {self.config.eval_statistics}"
            if judged:
                protocol = protocol.replace("on the test images, so it is optimistic", "on held-out training images")
            if kind == "held_out":
                protocol = protocol.replace("test accuracy", "accuracy on held-out training images")
            numbers = dict(summarize([numbers[kind] for numbers in trainer.evaluations], judged))
            texts = zip(("last", "median of last 20 evaluations", "best"), numbers.values(), strict=True)
            said = f": {what} " + ", ".join(f"{name} {value:.4f}" for name, value in texts)
            curves = f"curves: {self.folder / 'curves.png'}, "
            draw_curves([read_run(self.folder)], self.folder / "curves.png")
        summary: dict[str, Any] = {
            "protocol": protocol,
            **{key: known[key] for key in ("method", "dataset", "labels", "arch", "seed", "steps")},
            "processes": self.processes.world,
            "evaluations": len(trainer.evaluations),
            **numbers,
            "seconds": round(self.seconds, 1),
        }
        write_json(self.folder / "summary.json", summary)  # last: its presence says that the run is finished
        self.progress.say(f"finished in {duration(self.seconds)} of training{said}")
        self.progress.say(f"{curves}weights: {self.folder / 'model.safetensors'}")


@atexit.register
def _end_workers() -> None:
    """Workers leave signals to the trainer: one that a dead disk holds would keep Python from ending for ever."""
    for worker in multiprocessing.active_children():
        worker.kill()


def main(config: Config) -> int:
    """Run, and turn what is refused into one line and an exit status."""

    def action() -> int:
        try:
            return run(config)
        except OSError as error:
            raise TrainerError(
                f"{error}. Checkpoints are untouched: mend this and start the same command again."
            ) from error
        except (torch.OutOfMemoryError, MemoryError) as error:
            text = str(error).splitlines()[0]
            more = "--image-size, --batch-size, --ggcr-max-pairs or --ggcr-chunk-size"
            raise TrainerError(f"{text} Give a smaller {more}.") from error
        except RuntimeError as error:
            if not is_of_processes(error):
                raise
            text = str(error).splitlines()[0][:200]
            raise TrainerError(f"another process is gone ({text}). Checkpoints are untouched.") from error
        finally:
            leave()

    return guarded(action)

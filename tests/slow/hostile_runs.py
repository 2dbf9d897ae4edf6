"""The parts of `hostile_files.py` about runs: full disks, odd places, other runs, and NaN."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hostile_checkpoints import Case, begun, config, copied, quietly, resaved
from victims import before_operations, canonical, digests, forked, slow_disk

import trainer.step
from trainer.checkpoint import load_latest
from trainer.files import read_json, write_json
from trainer.training import main

ARGUMENTS = (
    "--preset demo --labels 20 --batch-size 4 --steps 5 --method supervised --checkpoint-every 2 --eval-every 5"
    " --log-every 2 --workers 0 --progress none"
)


def start(run: Path, prepare: Callable[[Path], object] = lambda _: None, more: str = "") -> tuple[int, str]:
    """Run the program, with more options, in a fork until it ends: its status, and what it said."""
    log = run.parent / f"{run.name}.log"
    log.unlink(missing_ok=True)
    victim = forked([*ARGUMENTS.split(), *more.split(), "--output", str(run)], log, prepare=lambda: prepare(run))
    if not victim.wait(300, 0.01):
        victim.kill()
        return 99, "it hangs"
    return int(victim.status or 0), log.read_text(errors="replace")


def complaint(status: int, said: str, expected: set[int]) -> str:
    """What is wrong with an answer; nothing, where it is one error by name and the right status."""
    if "holds a run with other options" in said:
        return "the program's own mistake"
    if "Traceback" in said:
        return "a traceback: " + said.strip().splitlines()[-1]
    if status not in expected:
        return f"status {status}: {said[-200:]}"
    return "" if "error: " in said else "no word"


def full(work: Path, quick: bool) -> Iterator[Case]:
    """Only what needs space fails: opening for writing, fsync, rename, mkdir; not the removal of files."""
    count = work / "count"

    def counting(run: Path) -> None:
        descriptor = os.open(count, os.O_WRONLY | os.O_CREAT)
        before_operations(run, lambda _: os.write(descriptor, b"."))

    start(work / "whole", counting)
    whole, size = digests(work / "whole"), max(path.stat().st_size for path in (work / "whole").rglob("*.pt"))

    def recovered(run: Path, first: tuple[int, str]) -> str:
        answer = complaint(*first, {1, 2})
        if left := [path.name for path in run.rglob("*.tmp")]:
            answer = answer or f"left behind: {left}"
        status, said = start(run)
        if not answer and (status or digests(run) != whole):
            answer = f"not recovered: {said[-200:] or 'another result'}"
        shutil.rmtree(run, ignore_errors=True)
        return answer or f"ok: status {first[0]}, then recovered"

    for number in range(0, count.stat().st_size, 12 if quick else 1):

        def filled(run: Path, number: int = number) -> None:
            def act(operation: int) -> None:
                if operation >= number and not _removes():
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            before_operations(run, act)

        run = work / f"full{number}"
        first = start(run, filled)
        if first[0] == 0 and "error" not in first[1]:  # the last operations remove what is no longer needed
            yield "disk full from an operation on", f"operation {number}", "ok: not needed any more"
            continue
        yield "disk full from an operation on", f"operation {number}", recovered(run, first)
    limits = [0, 100, 1000, 3000, 10_000, size // 2, size - 1]
    for limit in limits[:2] if quick else limits:
        run = work / f"limit{limit}"
        log = run.parent / f"{run.name}.log"

        def limited(_: Path, limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit + 1000 if limit < 1000 else limit, resource.RLIM_INFINITY))

        first = start(run, limited)
        yield "no file may grow beyond a limit", f"{limit} bytes", recovered(run, first)
        log.unlink(missing_ok=True)


def _removes() -> bool:
    """Whether the operation under way is a removal, which a full disk allows."""
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != "hook":
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and frame.f_locals["event"] == "os.remove"


def _unprivileged(_: Path) -> None:
    """Let permissions count for this process though it is root's: without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    if os.getuid() != 0:
        return
    library, version = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)
    held = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, twice
    if library.capget(version, held) == 0:
        held[0] &= ~0b110
        if library.capset(version, held) == 0:
            return
    raise OSError(ctypes.get_errno(), "capabilities cannot be dropped")


def _interrupted(_: Path) -> None:
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)


def places(work: Path, quick: bool) -> Iterator[Case]:
    start(work / "whole")
    whole = digests(work / "whole")
    stopped = work / "stopped"
    start(stopped, more="--stop-after-steps 4")
    newest = "checkpoints/step-00000004"

    def case(name: str, change: Callable[[Path], object], expected: set[int], prepare: Any = _unprivileged) -> Case:
        folder = work / "open"
        for path in [folder, *folder.rglob("*")]:  # of the case before, to be removed by any user
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        run = copied(stopped, folder / "run")
        change(run)
        status, said = start(run, prepare)
        if expected == {0}:
            right = status == 0 and digests(run) == whole
            return "places", name, "ok: equal in the end" if right else f"status {status}: {said[-200:]}"
        return "places", name, complaint(status, said, expected) or f"ok: status {status}"

    def gone(path: Path) -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def swap(run: Path, name: str, make: Callable[[Path], object]) -> None:
        gone(run / name)
        make(run / name)

    yield case("new run in a folder without write permission", lambda run: (gone(run), run.parent.chmod(0o555)), {2})
    yield case("run directory without write permission", lambda run: run.chmod(0o555), {1, 2})
    yield case("checkpoint folder without write permission", lambda run: (run / "checkpoints").chmod(0o555), {1})
    yield case("config.json without read permission", lambda run: (run / "config.json").chmod(0), {1})
    yield case("split.json without read permission", lambda run: (run / "split.json").chmod(0), {1})
    yield case("metrics.jsonl without read permission", lambda run: (run / "metrics.jsonl").chmod(0), {1})
    yield case("newest checkpoint without read permission", lambda run: (run / f"{newest}.pt").chmod(0), {0})
    yield case("newest checkpoint a link to nowhere", lambda run: swap(run, f"{newest}.pt", _nowhere), {0})
    yield case("newest record a link to nowhere", lambda run: swap(run, f"{newest}.json", _nowhere), {0})
    yield case("newest checkpoint a pipe", lambda run: swap(run, f"{newest}.pt", os.mkfifo), {0})
    yield case("newest checkpoint endless", lambda run: swap(run, f"{newest}.pt", _endless), {0})
    yield case("newest checkpoint a folder", lambda run: swap(run, f"{newest}.pt", os.mkdir), {1})
    yield case("checkpoint folder a file", lambda run: swap(run, "checkpoints", Path.touch), {1})
    yield case("run directory a file", lambda run: swap(run, ".", lambda _: run.touch()), {2})
    yield case("config.json a pipe", lambda run: swap(run, "config.json", os.mkfifo), {1})
    yield case("a slow disk", lambda _: None, {0}, lambda _: slow_disk(0.1))
    yield case("a signal every 3 ms", lambda _: None, {0}, _interrupted)


def _nowhere(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def _endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def refusal(run: Path, words: str, **changes: Any) -> str:
    """The answer of the trainer in this process, which should hold these words."""
    status, said = quietly(lambda: main(config(run, **changes)))
    if status not in (1, 2) or "\nerror: " not in f"\n{said}":
        return f"status {status}: {said[-200:]}"
    return "ok: refused" if words in said else f"other words: {said[:200]}"


def mismatch(work: Path, quick: bool) -> Iterator[Case]:
    stopped = begun(work / "stopped")
    other = begun(work / "other", method="fixmatch", arch="wrn-10-2", optimizer="sam", labels=30)
    run = work / "run"

    def edited(**options: Any) -> Path:
        """The run as if its config.json had been written with other options."""
        copied(stopped, run)
        stored = read_json(run / "config.json")
        write_json(run / "config.json", {**stored, "options": {**stored["options"], **options}})
        return run

    for options in ({"arch": "wrn-10-2"}, {"labels": 30}, {"lr": 0.1}, {"seed": 1}, {"method": "fixmatch"}):
        yield "another configuration", str(options), refusal(stopped, "holds a run with other options", **options)
    fit = "the checkpoint does not fit this run"
    yield "a checkpoint of", "another architecture", refusal(edited(arch="wrn-10-2"), fit, arch="wrn-10-2")
    for part in ("method", "average", "optimizer"):
        copied(stopped, run)
        resaved(run, **{part: (load_latest(other / "checkpoints") or {})[part]})
        yield "a checkpoint of", f"another run: {part}", refusal(run, fit)
    folder = copied(stopped, run)
    state = load_latest(folder / "checkpoints") or {}
    heads = {key: value for key, value in state["method"].items() if "head" in key}
    resaved(run, method={**state["method"], **{key: torch.cat([value, value[:1]]) for key, value in heads.items()}})
    yield "a checkpoint of", "11 classes", refusal(run, fit)
    for path in ("config.json", "checkpoints/step-00000006.json"):
        copied(stopped, run)
        write_json(run / path, {**read_json(run / path), "format": 2})
        yield "a later format", path, refusal(run, "this trainer reads 1")
    copied(stopped, run)
    for name in ("step-00000003.json", "step-00000006.json"):
        (run / "checkpoints" / name).unlink()
    yield "lost", "both records", refusal(run, "without their records")
    copied(stopped, run)
    (run / "config.json").unlink()
    yield "lost", "config.json", refusal(run, "without its config.json")
    copied(stopped, run)
    (run / "metrics.jsonl").unlink()
    yield "lost", "metrics.jsonl", refusal(run, "has 0 bytes, but the checkpoint was taken when")
    for key in ("sha256", "data_sha256"):
        copied(stopped, run)
        write_json(run / "split.json", {**read_json(run / "split.json"), key: "0" * 64})
        yield "another", f"split.json: {key}", refusal(run, "differs from the one that this run started with")


def not_finite(work: Path, quick: bool) -> Iterator[Case]:
    """Poison step 8: nothing is updated, and the checkpoint of step 6 stays."""
    for value in (float("nan"), float("inf"), float("-inf")):
        for where, poison in (("a parameter", _weight), ("a gradient", _gradient), ("the term", _term)):
            for amp in ("off", "bf16"):
                run = work / f"{where} {value} {amp}"
                options = {"amp": amp, "checkpoint_every": 6}
                if poison is _term:
                    options |= {"method": "fixmatch", "threshold": 0.12, "ggcr_warmup": 2, "ggcr_every": 1}
                begun(run, **options)
                before = _checkpoints(run)
                wrong: list[str] = []
                with mock.patch.object(trainer.step.Trainer, "train_step", _poisoned(poison, value, wrong)):
                    answer = refusal(run, "step 8: the ", **options)
                if _checkpoints(run) != before:
                    answer = "the checkpoint changed"
                yield f"{where} at step 8", f"{value}, amp {amp}", (wrong or [answer])[0]


def _poisoned(
    poison: Callable[[Any, float], Callable[[], object]], value: float, wrong: list[str]
) -> Callable[..., None]:
    """A step that is poisoned when it is the 8th, and notes whether the averaged model moved."""
    step = trainer.step.Trainer.train_step

    def poisoned(trainer: Any, images: Any) -> None:
        if trainer.step < 8:
            step(trainer, images)
            return
        undo = poison(trainer, value)
        before = canonical(trainer.average.state_dict())
        try:
            step(trainer, images)
        finally:
            undo()
            if canonical(trainer.average.state_dict()) != before:
                wrong.append("the averaged model moved")

    return poisoned


def _weight(trainer: Any, value: float) -> Callable[[], object]:
    with torch.no_grad():
        trainer.model.head.bias[0] = value
    return lambda: None


def _gradient(trainer: Any, value: float) -> Callable[[], object]:
    return trainer.model.head.weight.register_hook(lambda given: given * value).remove


def _term(trainer: Any, value: float) -> Callable[[], object]:
    kind = type(trainer.method.consistency)
    compare = kind.evaluate
    poisoned = mock.patch.object(kind, "evaluate", lambda *given, **named: compare(*given, **named) * value)
    poisoned.start()
    return poisoned.stop


def _checkpoints(run: Path) -> list[str]:
    """Of the checkpoint files."""
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((run / "checkpoints").glob("*"))]

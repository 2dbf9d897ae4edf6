"""What the measurements share: options, clocks, alternation, errors against the float64 oracle, tables.

A program measures steps side by side: every step runs once to warm up (its first call is noted), then rounds follow in
which each step runs once, in an order that rotates from round to round; ratios are taken within a round. A step that
raises is a row too, with the reason.
"""

from __future__ import annotations

import argparse
import copy
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from support.compare import cosine_error, relative
from support.oracle import Judge, Verdict

Row = dict[str, Any]
Result = TypeVar("Result")


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every measurement has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="small sizes and few rounds: shows that it runs, no more")
    made.add_argument("--output", type=Path, help="write rows, setting and environment as JSON")
    made.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    made.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, for a machine that is shared"
    )
    made.add_argument("--device", default="cpu")
    return made


def parse(made: argparse.ArgumentParser, **quick: Any) -> argparse.Namespace:
    """Parses the command line; with --quick, `quick` replaces the defaults that were not given."""
    if "--quick" in sys.argv[1:]:
        made.set_defaults(**quick)
    options = made.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def setting(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options that a result depends on, for the JSON file."""
    return {name: getattr(options, name) for name in (*names, "quick", "clock", "device")} | {"dtype": "float32"}


@dataclass
class Timing:
    """Seconds of every step.

    Attributes:
        first: of the first call, allocation, probes and choice of kernels included.
        rounds: of the later calls, round by round.
        failed: reasons, of the steps that raised.
    """

    first: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def ratios(self, name: str, base: str) -> list[float]:
        """Within each round, the time of one step over another's."""
        return [mine / other for mine, other in zip(self.rounds[name], self.rounds[base], strict=True)]

    def row(self, name: str, base: str | None = None) -> Row:
        """Medians and ranges of one step, and its ratios to `base`; the reason where there is none."""
        if name in self.failed:
            return {"variant": name, "reason": self.failed[name]}
        row: Row = {"variant": name, "reason": None, **_spread("seconds", self.rounds[name])}
        if base is not None and base not in self.failed:
            row |= _spread("ratio", self.ratios(name, base))
        return row | {"first_call_seconds": self.first[name]}


def _spread(name: str, values: Sequence[float]) -> Row:
    return {f"{name}_median": statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def alternate(
    steps: Mapping[str, Callable[[], object]], rounds: int, *, clock: str = "wall", device: str = "cpu"
) -> Timing:
    """Times `steps` in alternation after one warm-up call each."""
    timing = Timing()
    for name, step in steps.items():
        seconds, why = attempted(lambda step=step: timed(step, clock, device))  # type: ignore[misc]
        if seconds is None:
            timing.failed[name] = why
        else:
            timing.first[name] = seconds
    alive = list(timing.first)
    timing.rounds = {name: [] for name in alive}
    for round_ in range(rounds):
        shift = round_ % max(1, len(alive))
        for name in alive[shift:] + alive[:shift]:
            timing.rounds[name].append(timed(steps[name], clock, device))
    return timing


def timed(step: Callable[[], object], clock: str, device: str) -> float:
    """Seconds of one call."""
    read = time.process_time if clock == "cpu" else time.perf_counter
    start = read()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return read() - start


def attempted(call: Callable[[], Result]) -> tuple[Result | None, str]:
    """The result, or None and the reason: what a library refuses is part of a comparison."""
    try:
        return call(), ""
    except (ImportError, RuntimeError, NotImplementedError, ValueError, MemoryError) as error:
        return None, reason(error)


def reason(error: BaseException) -> str:
    """Why a step failed, in one line and without the paths of the machine that it ran on."""
    text = re.sub(r"(?:/[\w.+-]+)+/([\w.+-]+)", r"\1", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:300]}"


@dataclass
class Reference:
    """What the tests' oracle, a float64 loop over samples, says of a few pairs of a batch.

    BatchNorm's constants are taken from the whole batch, as the timed call takes them. Which part of an error is
    float32's own, the row of the per-sample loop tells: where an activation lies within rounding of its kink, the
    gradient jumps in any float32 computation.
    """

    model: nn.Module
    weak: Tensor
    strong: Tensor
    target: Tensor
    count: int
    compared: Callable[[str], bool] | None = None
    labeled: Tensor | None = None
    _verdicts: dict[tuple[str | None, str | None], Verdict] = field(default_factory=dict)

    def verdict(self, stop_gradient: str | None = None, *, observed: str | None = None) -> Verdict:
        """Cosines and gradient of the first `count` pairs; `observed`: FixMatch's "joint" or "split" forward."""
        key = stop_gradient, observed
        if key not in self._verdicts:
            assert self.labeled is not None or observed is None
            strong = None if observed is None else torch.cat([self.labeled, self.strong]).cpu()  # type: ignore[list-item]
            ours: dict[Any, Any] = {None: [self.weak, self.strong], "joint": [self.weak, strong], "split": [self.weak]}
            few = (tensor[: self.count].cpu() for tensor in (self.weak, self.strong, self.target))
            judge = Judge(
                copy.deepcopy(self.model).cpu(), *few, compared=self.compared, stop_gradient=stop_gradient,
                observed=torch.cat([part.cpu() for part in ours[observed]]),
                observed_strong=strong if observed == "split" else None,
            )  # fmt: skip
            self._verdicts[key] = judge.verdict()
        return self._verdicts[key]

    def errors(
        self,
        term: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
        stop_gradient: str | None = None,
        *,
        observed: str | None = None,
    ) -> Row:
        """Errors of a term ``(weak, strong, target, weight) -> (loss, cosines)``: all pairs, `count` of them weighted.

        Returns:
            The largest error of a cosine, and the relative error of the gradient as one vector.
        """
        verdict = self.verdict(stop_gradient, observed=observed)
        weight = torch.zeros(len(self.target), device=self.target.device)
        weight[: self.count] = 1.0
        self.model.zero_grad()
        loss, cosines = term(self.weak, self.strong, self.target, weight)
        loss.backward()
        gradient = flat_gradient(self.model) * (len(self.target) / self.count)  # the oracle divides by its own pairs
        self.model.zero_grad()
        return {
            "cosine_error": cosine_error(cosines[: self.count].cpu(), verdict.cosine),
            "gradient_error": relative(gradient, verdict.flat),
        }


def flat_gradient(model: nn.Module) -> Tensor:
    """``.grad`` of all trainable parameters as one float64 vector."""
    parts = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    return torch.cat([part.detach().reshape(-1).double().cpu() for part in parts])


def show(rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Prints rows; `columns` maps keys to formats, as in {"seconds_median": "8.3f"}. Reasons go last."""
    for row in rows:
        cells = [_cell(row.get(key), form) for key, form in columns.items()]
        note = row.get("reason") or row.get("note") or ""
        print("  ".join([*cells, note]).rstrip(), flush=True)


def heading(columns: Mapping[str, str]) -> None:
    """The line above the rows of `show`."""
    print("  ".join(_cell(key.removesuffix("_median"), _text_form(form)) for key, form in columns.items()), flush=True)


def _cell(value: object, form: str) -> str:
    return format("-", _text_form(form)) if value is None else format(value, form)


def _text_form(form: str) -> str:
    width = re.match(r"[<>]?\d+", form)
    sided = "" if form[:1] in "<>" else ">"
    return sided + (width.group() if width else "8")

"""The page that says how far the library can be trusted: a figure and a command for each claim."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from shared import APPENDIX

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


class Claim(NamedTuple):
    """A row of the scorecard."""

    name: str
    figure: str
    command: str


def scorecard() -> str:
    """The page."""
    rows = [
        _matrix(), _sweep(), _directional(), *_properties(), _seeded(), _inputs(), _state(), _threads(), _processes(),
        *_soak(), *_faults(),
    ]  # fmt: skip
    table = "\n".join(f"| {row.name} | {row.figure} | `{row.command}` |" for row in rows)
    return f"""{APPENDIX}# Scorecard: what was tried to break it

What was tried to find a wrong number, an error that does not help, or something left behind, with the figure that came
out and the command that repeats it. Written by `python docs/generators/make_pages.py` from result files and from the
tests' own tables. Everything ran on a CPU.

| claim | figure | command |
| --- | --- | --- |
{table}

## Run on a simulated GPU only

`tests/gpu` runs these on [a CUDA device in software](../guides/gpus.md) and compares them with the CPU: torch's CUDA
build hands out `cuda:0` tensors, and every operator runs on the CPU. So device placement, autocast, random state and
control flow are tested; CUDA's own kernels are not.

- **Half precision**: autocast and whole models in float16 and bfloat16, with a `GradScaler`.
- **Out of memory**: torch's allocator runs out, `chunk_size="auto"` halves the chunk, and the result stays the same.
- **DistributedDataParallel** over gloo with CUDA tensors, and the trainers, killed and resumed.

## Unproven

- **CUDA's kernels**: their rounding, TF32, cuDNN's recurrent layers, fused attention, `torch.compile` there. Nothing is
  known about speed.
- **NCCL**, and processes on more than one machine: what is shown ran with gloo on one.
- **Another thread that trains the same model** during a comparison sees other tensors in the place of its parameters.
  Comparisons wait for each other; a foreign forward cannot be made to.
- Under `torch.utils.flop_counter.FlopCounterMode`, `engine="ghost"`, `"vmap"` and `"auto"` fail with an error of
  torch's; the loop works.
"""


def _matrix() -> Claim:
    result = _result("matrix")
    counts = result["counts"]
    return Claim(
        "[Modules, layers and whole models](matrix.md) by engines by precisions",
        f"{sum(counts.values())} cells in {result['calls']} calls: {counts.get('pass', 0)} pass,"
        f" {counts.get('dtype', 0)} as far off as the oracle in that precision, {counts.get('refused', 0)} refused,"
        f" **{counts.get('wrong', 0)} silently wrong**",
        "python tests/slow/matrix.py --output benchmarks/results/matrix.json",
    )


def _sweep() -> Claim:
    found = {path.stem.split("torch")[1]: _read(path) for path in RESULTS.glob("sweep_derivatives_torch*.json")}
    versions = sorted(found, key=lambda version: [int(part) for part in version.split(".")])
    results = list(found.values())
    torch_wrong, ours = zip(*((len(r["wrong"]["torch"]), len(r["wrong"]["library"])) for r in results), strict=True)
    return Claim(
        "[Torch's own second derivatives](derivative-sweep.md), and what the engines make of them",
        f"{max(len(result['rows']) for result in results)} layers and functions on torch {', '.join(versions)}:"
        f" torch wrong in {max(torch_wrong)}, the library in **{max(ours)}**",
        "python benchmarks/derivatives/sweep_derivatives.py",
    )


def _directional() -> Claim:
    result = _result("directional")
    models = result["smooth"]
    worst = max(row["max"] for row in models)
    return Claim(
        "Gradient of the term against finite differences, float64",
        f"{len(models)} smooth models x {models[0]['directions']} directions: worst {worst:.1e} (bound"
        f" {result['bound']:.0e})",
        "python tests/slow/directional.py",
    )


def _properties() -> list[Claim]:
    path = RESULTS / "properties.json"
    if not path.exists():
        return []
    result = _read(path)
    effective = sum(row.get("effective", 0) for row in result["rows"])
    return [
        Claim(
            f"Laws {result['laws'][0]} to {result['laws'][-1]} on models that hypothesis makes up",
            f"{len(result['rows'])} laws by engine, {effective} effective examples, {result['broken']} broken",
            f"python tests/slow/properties.py --examples {result['setting']['examples']}",
        )
    ]


def _seeded() -> Claim:
    result = _result("seeded_bugs")
    left = [bug["name"] for bug in result["bugs"] if bug["verdict"] != "killed"]
    survivors = f"; not killed: {', '.join(left)}" if left else ""
    return Claim(
        "Seeded bugs that the suite kills", f"**{result['killed']} / {result['seeded']}**{survivors}",
        "python tests/slow/seeded_bugs.py",
    )  # fmt: skip


def _inputs() -> Claim:
    table = _tests("test_bad_inputs").TABLE
    kinds = [type(row).__name__ for row in table]
    errors, handled = kinds.count("Bad") + kinds.count("Refused"), kinds.count("Handled")
    return Claim(
        "Bad inputs with class and message",
        f"{len(table)} rows: {errors} errors that say what to do, {handled} handled and held against the oracle,"
        f" {kinds.count('Elsewhere')} held by other tests, which are named",
        "python -m pytest tests/core/inputs/test_bad_inputs.py",
    )


def _state() -> Claim:
    module = _tests("test_state_checks")
    points, checks = len(module.POINTS), len(module.CHECKS)
    return Claim(
        "Nothing of the user's changed, after success, errors and interrupts",
        f"{points} points x {checks} checks = {points * checks}, for each engine, fused and not, and a control that"
        " each check sees a change",
        "python -m pytest tests/core/test_state_checks.py",
    )


def _threads() -> Claim:
    rows = _result("concurrency")["rows"]
    return Claim(
        "Two threads that compare at the same time, on one model and on two",
        f"{sum(row['comparisons'] for row in rows)} comparisons, {sum(row['differing'] for row in rows)} that differ"
        " from what each is alone",
        "python tests/slow/concurrency.py",
    )


def _processes() -> Claim:
    result = _result("distributed")
    worst = ", ".join(f"{error:.1e} on {world}" for world, error in result["worst_error"].items())
    wrong = sum(row.get("right") is False for row in result["rows"])
    return Claim(
        "[Several processes](../guides/distributed.md) against one on the joined batch, float64",
        f"{len(result['rows'])} cases by engine, {wrong} wrong; worst {worst}",
        "python tests/slow/distributed.py",
    )


def _soak() -> list[Claim]:
    rows = _result("soak")["rows"]
    tried = [row for row in rows if row.get("control") is None]
    steps, survived = (sum(row[key] for row in tried) for key in ("steps", "errors_survived"))
    most = max(row["lines"]["rss"]["high"] for row in tried)
    hooks = sum(row["counts"]["hooks"][-1] for row in tried)
    controls = [row for row in rows if row.get("control") is not None]
    caught = sum(bool(row["leaks"]) for row in controls)
    figure = (
        f"{len(tried)} settings, {steps} steps, {survived} errors among them: at most {most:.0f} B more memory a step,"
        f" {hooks} hooks left; deliberate leaks seen: {caught} of {len(controls)}"
    )
    return [Claim("Long runs with errors: what stays behind", figure, "python tests/slow/soak.py")]


def _faults() -> list[Claim]:
    kills, hostile = _result("kills"), _result("hostile_files")
    total = {name: sum(row[name] for row in kills["parts"]) for name in ("kills", "inside a save", "runs", "equal")}
    forgotten = [row for row in kills["control"] if row["item"] != "nothing"]
    claims = [
        Claim(
            "[The trainers killed](../guides/faults.md) by SIGKILL at moments that nobody chose, and resumed",
            f"{total['kills']} kills, {total['inside a save']} of them inside a save: **{total['equal']} of"
            f" {total['runs']}** runs equal to the uninterrupted one by SHA-256; {sum(r['noticed'] for r in forgotten)}"
            f" of {len(forgotten)} forgotten items of the state noticed",
            "python tests/slow/kills.py",
        )
    ]
    names = {
        "Damaged files of a run: detected": ("truncated", "flipped", "mismatch"),
        "Forged pickles and archives: refused, nothing run or written": ("pickles", "archives"),
        "Damaged data sets, fuzzed readers: an error that names the file": ("data", "fuzz"),
        "Full disks, odd places, NaN: nothing lost": ("full", "places", "not finite"),
    }
    for name, parts in names.items():
        rows = [row for row in hostile["rows"] if row["part"] in parts]
        if not rows:
            continue
        right, cases = (sum(row[key] for row in rows) for key in ("right", "cases"))
        command = f"python tests/slow/hostile_files.py --only {' '.join(map(json.dumps, parts))}"
        claims.append(Claim(f"[{name}](../guides/faults.md)", f"{right} / {cases}", command))
    return claims


def _tests(name: str) -> Any:
    """A module of tests/core, for the sake of its table."""
    for folder in ("tests/core/inputs", "tests/core", "tests"):
        if str(ROOT / folder) not in sys.path:
            sys.path.insert(0, str(ROOT / folder))
    return __import__(name)


def _result(name: str) -> dict[str, Any]:
    return _read(RESULTS / f"{name}.json")


def _read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    return result

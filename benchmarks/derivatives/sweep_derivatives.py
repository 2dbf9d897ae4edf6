"""Sweeps the installed torch for derivatives that are wrong in silence, and the library for whether they reach it.

    python benchmarks/derivatives/sweep_derivatives.py                        # all rows, minutes; prints what is wrong
    python benchmarks/derivatives/sweep_derivatives.py --only norm --verbose  # rows whose name contains "norm"
    python benchmarks/derivatives/sweep_derivatives.py --output benchmarks/results/sweep_derivatives_torch2.13.0.json

A row is one layer (the files `sweep_*.py` beside this one), in float64. Of torch itself:

    first     gradcheck of the layer in its input and its parameters
    second    gradgradcheck of the same
    loop      d/dtheta of a scalar of per-sample gradients, <g_w, g_s>, |g_w|^2 and |g_s|^2, by autograd twice
    vmap      the same with per-sample gradients by torch.func.vmap(grad), differentiated from outside
    batched   the same with a forward under vmap, differentiated twice from outside
    float32   the loop in float32, against float64: other kernels, and missing second derivatives, show here

and of the library, the gradient of L_g by each engine. Truth for the last five are central differences of the scalar,
which rest on plain first derivatives of single samples. The exit status is 1 if an engine returns a wrong gradient (not
if torch is wrong: what the library computes by another formula, or refuses by name, is no error), or if torch.nn
or torch.nn.functional has a name that no row runs.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks/shared"))
import sweep_algebra
import sweep_functions
import sweep_layers
import sweep_losses
import sweep_weights
from environment import write_result
from sweep_checks import LIBRARY, STEPS, TOLERANCE, TORCH, Cell, build, compositions, orders
from sweep_row import Row

# Names without a derivative of their own, each with the reason.
EXCLUDED = {
    **dict.fromkeys(("Module", "Container", "Sequential", "ModuleList", "ModuleDict"), "container"),
    **dict.fromkeys(("ParameterList", "ParameterDict"), "container"),
    **dict.fromkeys(("RNNBase", "RNNCellBase"), "base class"),
    "DataParallel": "refused by name (guards.py)",
    "one_hot": "integers",
    **dict.fromkeys(("grouped_mm", "scaled_grouped_mm"), "half precision or float8 kernels of CUDA devices"),
    **dict.fromkeys(("scaled_mm", "scaled_addmm", "scaled_addmm_"), "half precision or float8 kernels of CUDA devices"),
    "multi_head_attention_forward": "called by its module",
    **dict.fromkeys(("assert_int_or_pair", "boolean_dispatch", "handle_torch_function"), "no function"),
    **dict.fromkeys((name for name in vars(F) if name.startswith("has_torch_function")), "no function of tensors"),
}


def all_rows() -> list[Row]:
    return [
        *sweep_layers.rows(),
        *sweep_functions.rows(),
        *sweep_weights.rows(),
        *sweep_losses.rows(),
        *sweep_algebra.rows(),
        *sweep_weights.random_rows(),
    ]


def names_of_torch() -> set[str]:
    """What torch.nn and torch.nn.functional offer, without what is excluded for a reason."""
    modules = (n for n, kind in vars(nn).items() if inspect.isclass(kind) and issubclass(kind, nn.Module))
    functions = (
        name
        for name, f in vars(F).items()
        if callable(f) and not inspect.isclass(f) and not name.startswith("_") and f.__module__ != "typing"
    )
    # A lazy module becomes its plain class in the first forward.
    wanted = {f"nn.{name}" for name in modules if name not in EXCLUDED and not name.startswith("Lazy")}
    return wanted | {f"F.{name}" for name in functions if name not in EXCLUDED}


class _Trace(TorchFunctionMode):
    """The functions of torch.nn.functional that a forward calls, by identity."""

    def __init__(self) -> None:
        super().__init__()
        self.known = {id(function): name for name, function in vars(F).items() if callable(function)}
        self.seen: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if id(func) in self.known:
            self.seen.add(f"F.{self.known[id(func)]}")
        return func(*args, **(kwargs or {}))


def covered(row: Row) -> set[str]:
    """What one row runs."""
    network, x, _ = build(row)
    with _Trace() as trace:
        network(x)
    own = {f"nn.{type(module).__name__}" for module in network.modules()}
    return own | trace.seen | set(row.covers)


def run(row: Row) -> dict[str, Cell]:
    cells = orders(row)
    if row.alone:
        return cells | compositions(row)
    return cells | dict.fromkeys((*TORCH[2:], *LIBRARY), Cell("-"))


def table(results: dict[str, dict[str, Cell]]) -> Iterator[str]:
    columns = (*TORCH, *LIBRARY)
    yield "| layer | " + " | ".join(columns) + " |"
    yield "| --- |" + " --- |" * len(columns)
    for name, cells in results.items():
        if any(cell.verdict not in ("right", "-") for cell in cells.values()):
            yield f"| {name} | " + " | ".join(str(cells[column]) for column in columns) + " |"


def record(name: str, cells: dict[str, Cell]) -> dict[str, Any]:
    """A row of the file: the cells that are not right, and the largest error in float64 of those that are."""
    rest = {
        column: {key: value for key, value in asdict(cell).items() if value is not None}
        for column, cell in cells.items()
        if cell.verdict != "right"
    }
    errors = [cell.error or 0.0 for c, cell in cells.items() if cell.verdict == "right" and "float32" not in c]
    return {"name": name, "error": max(errors, default=0.0), "not_right": rest}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the cells as JSON")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name contains one of these")
    parser.add_argument("--verbose", action="store_true", help="print every row, and every message")
    options = parser.parse_args()
    logging.getLogger("gradconsist").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # of torch: missing batching rules, scripting
    start = time.perf_counter()
    chosen = [row for row in all_rows() if any(part.lower() in row.name.lower() for part in options.only)]
    results: dict[str, dict[str, Cell]] = {}
    seen: set[str] = set()
    for row in chosen:
        cells = results[row.name] = run(row)
        seen |= covered(row)
        if options.verbose:
            print(f"{row.name}: " + ", ".join(f"{key} {cell}" for key, cell in cells.items()), flush=True)
            for key, cell in cells.items():
                if cell.message:
                    print(f"    {key}: {cell.message}")
    print("\n".join(table(results)))
    wrong = {
        kind: [name for name, cells in results.items() if any(cells[c].verdict == "wrong" for c in columns)]
        for kind, columns in (("torch", TORCH), ("library", LIBRARY))
    }
    missing = sorted(names_of_torch() - seen) if options.only == [""] else []
    print(
        f"\ntorch {torch.__version__}: {len(results)} rows, {len(wrong['torch'])} where torch is wrong, "
        f"{len(wrong['library'])} where the library is; {time.perf_counter() - start:.0f} s"
    )
    for name in wrong["library"]:
        print(f"WRONG AND NEITHER HANDLED NOR REFUSED: {name}")
    for name in missing:
        print(f"NO ROW RUNS: {name}")
    if options.output is not None:
        rows = [record(name, cells) for name, cells in results.items()]
        facts = {"tolerance": TOLERANCE, "steps": STEPS, "wrong": wrong, "uncovered": missing, "excluded": EXCLUDED}
        write_result(options.output, {**facts, "rows": rows})
    return 1 if wrong["library"] or missing else 0


if __name__ == "__main__":
    sys.exit(main())

"""Where the time of one exact step goes, by kind of operation.

    python benchmarks/cost/profile_step.py --output benchmarks/results/profile.json

torch.profiler runs over a few steps of FixMatch with the term in its default settings, and over as many without it.
Each operator's own time (without what it calls) is put under one kind; what remains of the step's wall time is Python
and the dispatcher. "floor" is the share that the arithmetic of convolutions and matrix products has in the whole.
The profiler itself costs time, mostly Python's, so absolute seconds are for shares only: step_cost.py has the times.

Errors are those of the term, and of the per-sample loop beside it, on a few of the same pairs against the tests'
float64 loop.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks/shared"))
from environment import write_result
from harness import Row, heading, parse, parser, setting, show
from models import spec
from steps import PLAIN, Step, make_batch, reference_for

# The first pattern that an operator's name matches decides. Names are those of the innermost ATen operators.
KINDS = {
    "convolution, forward type": r"mkldnn_convolution$|^aten::(slow_conv|thnn_conv|cudnn_convolution|_conv)",
    "matrix products": r"^aten::(mm|addmm|bmm|baddbmm|_?scaled_dot|matmul|linear|dot|einsum)",
    "statistics and normalisation": r"batch_norm|group_norm|layer_norm|var_mean|^aten::var|^aten::std",
    "sums": r"^aten::(sum|mean|logsumexp|_?log_softmax|_?softmax|nll_loss|max|argmax|any|all|cross_entropy)",
    "pooling": r"pool",
    "copies and fills": (
        r"^aten::(copy_|clone|contiguous|cat|_cat|stack|fill_|zero_|zeros|ones|empty|new_|index|gather|scatter"
        r"|constant_pad|im2col|col2im|_to_copy|repeat|narrow_copy|resize)"
    ),
    "views": r"^aten::(view|reshape|as_strided|expand|permute|transpose|t$|select|slice|unsqueeze|squeeze|flatten"
    r"|unflatten|narrow|split|chunk|detach|alias|_unsafe_view|diagonal|movedim|result_type|_reshape_alias|unbind)",
    "pointwise": r"^aten::",
}
SPLIT = {
    (True, False): "convolution, gradient of the input",
    (False, True): "convolution, gradient of the weight",
    (True, True): "convolution, both gradients at once",
}
GROUPED = "convolution, per sample (samples as groups)"
OTHER = "Python, dispatcher, autograd"
COLUMNS = {"variant": "<18", "kind": "<46", "seconds": "9.3f", "share": "7.3f", "calls": "8.0f"}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--model", default="wrn-28-2", help="see benchmarks/cost/models.py")
    made.add_argument("--variant", default="default", help="see benchmarks/cost/steps.py")
    made.add_argument("--labeled", type=int, default=8)
    made.add_argument("--pairs", type=int, default=56)
    made.add_argument("--steps", type=int, default=3)
    made.add_argument("--oracle-pairs", type=int, default=1)
    options = parse(made, labeled=1, pairs=7, steps=1)
    torch.manual_seed(0)
    model = spec(options.model).build().to(options.device)
    batch = make_batch(options.model, options.labeled, options.pairs, device=options.device)
    rows: list[Row] = []
    heading(COLUMNS)
    for name in (PLAIN, options.variant):
        step = Step(name, model, batch)
        step()
        found = profiled(step, options.steps, options.device)
        rows += [{"variant": name, **row} for row in found]
        show(rows[-len(found) :], COLUMNS)
    reference = reference_for(model, batch, options.oracle_pairs)
    errors = {name: Step(name, model, batch).errors(reference) for name in (options.variant, "loop")}
    arithmetic = sum(row["share"] for row in rows if row["variant"] == options.variant and _is_arithmetic(row["kind"]))
    print(f"\nconvolutions and matrix products: {arithmetic:.0%} of the step")
    for name, row in errors.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.1e}" for key, value in row.items()))
    if options.output:
        used = setting(options, "model", "variant", "labeled", "pairs", "steps")
        write_result(options.output, {"setting": used, "floor": arithmetic, "errors": errors, "rows": rows})


def _is_arithmetic(kind: str) -> bool:
    return kind.startswith(("convolution", "matrix"))


def profiled(step: Step, count: int, device: str) -> list[Row]:
    """Seconds a step by kind, largest first."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device != "cpu" else [])
    with profile(activities=activities, record_shapes=True) as run:
        start = time.perf_counter()
        for _ in range(count):
            step()
        if device != "cpu":
            torch.cuda.synchronize()
        wall = time.perf_counter() - start
    seconds: dict[str, float] = {}
    calls: dict[str, float] = {}
    for event in run.events():
        # On CUDA the kernels' time, which may overlap with Python's; on a CPU the operator's own.
        own = (event.self_device_time_total if device != "cpu" else event.self_cpu_time_total) * 1e-6
        kind = kind_of(event)
        if kind is not None:
            seconds[kind] = seconds.get(kind, 0.0) + own / count
            inner = event.cpu_parent is not None and kind_of(event.cpu_parent) == kind  # as aten::_convolution is
            calls[kind] = calls.get(kind, 0.0) + (0.0 if inner else 1 / count)
    seconds[OTHER] = max(0.0, wall / count - sum(seconds.values()))
    whole = sum(seconds.values())
    rows = [
        {"kind": kind, "seconds": own, "share": own / whole, "calls": calls.get(kind, 0.0), "reason": None}
        for kind, own in seconds.items()
    ]
    return sorted(rows, key=lambda row: -row["seconds"])


def kind_of(event: Any) -> str | None:
    """The kind of one profiler event; None for what is no operator (autograd's nodes and marks count as Python)."""
    name = str(event.name)
    if not name.startswith(("aten::", "mkldnn")):
        return None
    if "convolution" in name or "_conv" in name:
        return _convolution(event)
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), None)


def _convolution(event: Any) -> str:
    """By the derivative that is taken, and whether the samples are its groups."""
    values = _arguments(event)
    groups = max((value for value in values if isinstance(value, int) and not isinstance(value, bool)), default=1)
    if groups > 1:
        return GROUPED
    if "backward" not in event.name:
        return "convolution, forward type"
    masks = [tuple(v[:2]) for v in values if isinstance(v, list) and len(v) == 3 and all(type(x) is bool for x in v)]
    return SPLIT.get(masks[-1], "convolution, both gradients at once") if masks else "convolution, gradient"


def _arguments(event: Any) -> list[Any]:
    return list(getattr(event, "concrete_inputs", None) or [])


if __name__ == "__main__":
    main()

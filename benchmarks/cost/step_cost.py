"""What the exact term costs: a FixMatch step with it against the same step without it, measured in alternation.

    python benchmarks/cost/step_cost.py --output benchmarks/results/step_cost.json

The step without the term is the split FixMatch step: labeled and strong inputs forward and backward, weak inputs
forward without a graph; every pair counts. Compared, on several models, are the term in its default settings, the
ghost engine at several chunks and forced forms, vmap of grad (the fastest route that torch itself offers), the
per-sample loop, BackPACK with create_graph where it takes the model, and the settings that spend less.

Each round runs every variant once, in an order that rotates from round to round; the ratio of a round is its variant's
time over the plain step's of the same round. The first call of each variant is told apart: what it needs beyond a later
one, in plain steps. Errors are those of the term on a few of the same pairs, against the tests' float64 loop; the
loop's own row tells which part is float32's. A variant that fails is a row with the reason.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks/shared"))
from environment import write_result
from harness import Row, alternate, heading, parse, parser, setting, show
from models import spec
from steps import JOINT, PLAIN, VARIANTS, Step, applies, make_batch, reference_for

MODELS = ("wrn-28-2", "wrn-28-2-gn", "resnet-18", "vit-tiny", "mlp", "cnn")
QUICK = (
    PLAIN, "default", "ghost, chunk 4", "vmap, chunk 4", "loop", "BackPACK, chunk 4", "default, max_pairs=8",
    "default, stop_gradient='weak'", JOINT, "wrapper, joint forward, batchnorm='observed'",
)  # fmt: skip
COLUMNS = {
    "variant": "<46", "seconds_median": "9.3f", "ratio_median": "7.2f", "ratio_min": "9.2f", "ratio_max": "9.2f",
    "first_call_extra": "16.1f", "cosine_error": "12.1e", "gradient_error": "14.1e",
}  # fmt: skip


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--models", nargs="+", default=list(MODELS), help="see benchmarks/cost/models.py")
    made.add_argument("--labeled", type=int, default=8)
    made.add_argument("--pairs", type=int, default=56)
    made.add_argument("--image-size", type=int, help="other than the model's usual one")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--oracle-pairs", type=int, default=3, help="pairs that the float64 loop checks")
    made.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="beside the plain step")
    options = parse(made, labeled=1, pairs=7, rounds=1, oracle_pairs=1, only=list(QUICK))
    names = [PLAIN, *(name for name in options.only if name != PLAIN)]
    rows: list[Row] = []
    for model_name in options.models:
        torch.manual_seed(0)
        model = spec(model_name).build().to(options.device)
        batch = make_batch(model_name, options.labeled, options.pairs, options.image_size, options.device)
        print(f"\n{model_name}: {options.labeled} labeled + {options.pairs} pairs")
        heading(COLUMNS)
        Step(PLAIN, model, batch)()  # the library's own first call is not a variant's
        steps = {name: Step(name, model, batch) for name in names if applies(name, model)}
        timing = alternate(steps, options.rounds, clock=options.clock, device=options.device)
        reference = reference_for(model, batch, min(options.oracle_pairs, options.pairs))
        for name, step in steps.items():
            row = {"model": model_name, **timing.row(name, PLAIN)}
            if name not in timing.failed:
                # what the first call needs beyond a later one, in steps without the term
                extra = row["first_call_seconds"] - row["seconds_median"]
                row["first_call_extra"] = extra / timing.row(PLAIN)["seconds_median"]
                row |= step.errors(reference)
            rows.append(row)
            show([row], COLUMNS)
        if options.output:  # so that a run that is stopped keeps what it has
            used = setting(options, "labeled", "pairs", "image_size", "rounds", "oracle_pairs")
            write_result(options.output, {"setting": used, "rows": rows})


if __name__ == "__main__":
    main()

"""Writes what the docs say about results from the result files, so that no figure is typed by hand.

    python benchmarks/make_pages.py

Some pages are written whole, some between markers: `written` has the list, and a module under pages/ the text of each.
tests/docs holds them against the files.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "pages"))
from cost_page import cost_page
from derivatives_page import sweep_page, with_summary
from faults_page import results as fault_results
from faults_page import with_tables as with_fault_tables
from flatness_page import flatness_section
from help_page import GRIDS, help_page
from imagenet_page import with_tables as with_imagenet_tables
from installations_page import with_installations
from matrix_page import matrix_page, summary_table
from reproduce_page import with_paper_tables
from runs_page import methods_table, methods_text, runs_table, statistics_table
from scorecard_page import scorecard
from trainer_page import TABLES, with_tables
from usb_page import with_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    for name, text in written().items():
        (ROOT / name).write_text(text, encoding="utf-8")


def written() -> dict[str, str]:
    """Every page that results have a part in: its path to what it should say."""
    guides = "docs/guides/"
    whole = {
        "docs/evidence.md": evidence,
        "docs/matrix.md": matrix,
        "docs/scorecard.md": scorecard,
        "docs/does-it-help.md": does_it_help,
        "docs/derivative-sweep.md": sweep_page,
        guides + "cost.md": cost,
    }
    between_markers: dict[str, Callable[[str], str]] = {
        "README.md": with_cost,
        "docs/installation.md": installation,
        "docs/torch-derivatives.md": with_summary,
        guides + "faults.md": lambda page: with_fault_tables(page, *fault_results()),
        guides + "imagenet.md": imagenet,
        guides + "reproduce-the-paper.md": lambda page: with_paper_tables(page, _result("reproduce_demo")),
        guides + "trainer.md": lambda page: with_tables(page, trainer_results()),
        guides + "usb.md": lambda page: with_table(page, _result("usb")),
    }
    parts = {name: write((ROOT / name).read_text(encoding="utf-8")) for name, write in between_markers.items()}
    return {name: write() for name, write in whole.items()} | parts


def installation(page: str) -> str:
    """The page on installing with fresh tables between its markers."""
    result = _result("installations")
    return with_installations(page, result, _made(result))


def imagenet(page: str) -> str:
    """The guide on the ImageNet trainer with fresh tables between its markers."""
    costs, runs = (
        [_result(path.stem) for path in sorted(RESULTS.glob(f"imagenet_{kind}*.json"))] for kind in ("cost", "runs")
    )
    return with_imagenet_tables(page, costs, _result("imagenet_equality"), runs)


def trainer_results() -> dict[str, dict[str, Any]]:
    """The files behind the trainer's page, as far as they are there."""
    return {name: _result(name) for name in TABLES if (RESULTS / f"{name}.json").exists()}


def with_cost(readme: str) -> str:
    """The README with a fresh cost table between its markers."""
    table = f"<!-- cost:begin -->\n{cost_table(_result('step_cost'))}\n<!-- cost:end -->"
    return re.sub(r"<!-- cost:begin -->.*?<!-- cost:end -->", lambda _: table, readme, flags=re.S)


def evidence() -> str:
    """The page: exactness, cost, and what training runs showed."""
    exact, cost, memory = _result("matrix"), _result("step_cost"), _result("memory")
    monitoring, profile = _result("measure_peers"), _result("profile")
    models, scaling = _result("step_cost_models"), _result("scaling")
    network = scaling["rows"][0]["model"].rpartition("-")[0]
    real, demo, methods = _result("real_images"), _result("demo"), _result("methods")
    longer, averaged = _result("methods_long"), _result("averaged_statistics")
    return f"""# Evidence

This page is written by `python benchmarks/make_pages.py` from the files under `benchmarks/results`; each says its
command, versions and device. Nothing here comes from a GPU.

## Exactness

Rows are {len(exact["cells"])} models and layers, among them whole models of torchvision and timm; each cell was
compared in five quantities with a float64 loop over samples that shares no code with the library.
[Every row](matrix.md).

{summary_table(exact)}

Made by `{_command(exact)}` with torch {exact["environment"]["torch"]} on a CPU.

## Cost

A step with the term over the split FixMatch step without it, measured in one run and in alternation. Errors are those
of the cosine and of the term's gradient on a few of the same pairs, against the float64 loop. Nothing is left out
because it loses.

{models_table(cost)}

{_made(cost)}

{models_table(models)}

{_made(models)}

![Step with the term over the step without](assets/step_cost.png)

### Peak memory

{memory_table(memory)}

{_made(memory)}

### Scaling

A `{network}` with pairs, width and image size varied one at a time around {scaling["setting"]["pairs"]} pairs, width 2,
32x32; each point is a process of its own, so that neighbouring points, not ratios, are what to look at. At few pairs of
a small network vmap is as fast, and a loop over samples takes less memory at every point.

![Seconds and peak memory](assets/scaling.png)

{_made(scaling)}

### Monitoring

`measure`, without a graph, beside libraries that give per-sample gradients or their products. Ratios are to `measure`
with its defaults.

{monitoring_table(monitoring)}

{monitoring_text(monitoring)}

{_made(monitoring)}

### Where the time goes

{profile_table(profile)}

{_made(profile)}

## The averaged model's statistics

[Does it help?](does-it-help.md) has the comparisons with FixMatch. This is about a trap in them: BatchNorm's running
statistics in the averaged (EMA) model, which is the one that is evaluated. A first run on CIFAR-10's photographs (JPEG
copy; one seed, {real["runs"][0]["summary"]["steps"]:,} steps, {real["runs"][0]["options"]["labels"]} labels) copied
them from the trained model, as the FixMatch reference does. The same checkpoints, with the statistics that they hold
and with statistics taken anew from training images:

{statistics_table(_result("real_images_statistics"))}

Made by `{_command(_result("real_images_statistics"))}` on the last checkpoints of:

```text
{real["made_by"]}
```

The term's gradient holds BatchNorm's statistics constant, so it may move the channel means that BatchNorm removes in
train mode; the running statistics lag, and the averaged model's copied ones fit it worst. The trainers average them
together with the weights since. [What to do](guides/batchnorm-and-dropout.md).

On digits, longer, the same averaged weights with the statistics of the last weights (copied), with averaged ones (the
trainers' way), and with statistics taken anew; means over {averaged["setting"]["seeds"]} seeds of
{averaged["setting"]["steps"]} steps, and the lowest of the seeds:

{_table(averaged["rows"], _STATISTICS)}

{_made(averaged)}

## Flatness

{flatness_section(_result("flatness"), _made(_result("flatness")))}

## The demo: digits, 40 labels

![Test accuracy against the step](assets/demo.png)

{runs_table(demo)}

Three seeds a method; lines of one colour are seeds. Made by:

```text
{demo["made_by"]}
```

## Every method: digits, 40 labels

{methods_table(methods)}

{methods_text(methods)}

{_made(methods)}

{longer["setting"]["steps"]} steps instead of {methods["setting"]["steps"]}:

{methods_table(longer)}

{_made(longer)}
"""


def matrix() -> str:
    """The page of the matrix."""
    result = _result("matrix")
    return matrix_page(result, _command(result))


def does_it_help() -> str:
    """The page of paired runs, as far as their files are there."""
    grids = {name: _result(name) for name in GRIDS if (RESULTS / f"{name}.json").exists()}
    dynamics = (_result(f"term_dynamics{kind}") for kind in ("", "_group_norm", "_through"))
    return help_page(grids, _result("help_four_statistics"), *dynamics, _made)


def cost() -> str:
    """The page of what can be traded."""
    result = _result("frontier")
    default = next(row for row in _result("step_cost")["rows"] if row["variant"] == "default")
    return cost_page(result, default["ratio_median"], _made(result), _table)


def cost_table(result: dict[str, Any]) -> str:
    """Ratios to the step without the term on the wide residual network of the recipes: what a reader chooses among."""
    rows = [row for row in result["rows"] if row["model"] == "wrn-28-2" and row["variant"] in _README]
    setting = result["setting"]
    return "\n".join(
        [
            _table(rows, {"step": "variant", **_RATIO}),
            "",
            f"FixMatch step on WRN-28-2, 32x32, {setting['labeled']} labeled + {setting['pairs']} pairs, all compared"
            f" unless said otherwise, float32, {result['environment']['threads']} CPU thread(s).",
        ]
    )


_RATIO = {"ratio (median)": "ratio_median:.2fx", "from": "ratio_min:.2f", "to": "ratio_max:.2f"}
_README = (
    "without the term", "default", "vmap, chunk 16", "loop", "default, max_pairs=8", "wrapper, batchnorm='observed'"
)  # fmt: skip
_STATISTICS = {
    "run": "variant", "copied": "copied:.3f", "averaged": "averaged:.3f", "taken anew": "anew:.3f",
    "copied, lowest": "lowest_copied:.3f",
}  # fmt: skip
_ERRORS = {"cosine error": "cosine_error:.0e", "gradient error": "gradient_error:.0e"}


def models_table(result: dict[str, Any]) -> str:
    """Step cost of every model."""
    rows = result["rows"]
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        columns = {"step": "variant", "seconds": "seconds_median:.2f", **_RATIO, **_ERRORS}
        parts += [f"### {model}", "", _table(mine, columns), ""]
    return "\n".join(parts).rstrip()


def memory_table(result: dict[str, Any]) -> str:
    """Peak memory of a step, a process a point."""
    columns = {
        "model": "model", "pairs": "pairs", "step": "variant", "peak MB": "peak_mb:.0f",
        "over FixMatch's": "peak_ratio:.2fx", "time over FixMatch's": "time_ratio:.2fx", **_ERRORS,
    }  # fmt: skip
    return _table(result["rows"], columns)


def monitoring_table(result: dict[str, Any]) -> str:
    """Cosines without a graph, beside other libraries."""
    columns = {
        "model": "model", "pairs": "pairs", "by": "variant", "ms a pair": "milliseconds_a_pair:.2f", **_RATIO,
        "cosine error": "cosine_error:.0e",
    }  # fmt: skip
    return _table(result["rows"], columns)


def monitoring_text(result: dict[str, Any]) -> str:
    """Who is faster than `measure`, and where."""
    theirs = [row for row in result["rows"] if not row["reason"] and not row["variant"].startswith("gradconsist")]
    faster = [
        f"{row['variant']} on {row['model']} with {row['pairs']} pairs ({row['ratio_median']:.2f}x)"
        for row in theirs
        if row["ratio_median"] < 1
    ]
    if not faster:
        return "No other library is faster in any row."
    return (
        f"Faster than `measure`: {'; '.join(faster)}; slower: the other {len(theirs) - len(faster)} rows. These are"
        " small models and few pairs: every layer's output passes through Python twice here (once to be recorded, once"
        " for its product), which is a cost per layer and call, not per pair, and weighs most where the arithmetic"
        " takes hundredths of a second. With more pairs, or a larger model, it does not show."
    )


def profile_table(result: dict[str, Any]) -> str:
    """Seconds by kind of operation, with the term and without."""
    rows = [row for row in result["rows"] if row["seconds"] >= 0.005]
    columns = {"step": "variant", "what": "kind", "seconds": "seconds:.2f", "share": "share:.2f", "calls": "calls:.0f"}
    return _table(rows, columns)


def _table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Markdown; a column is a key, and after a colon a format (a closing letter x is kept)."""
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    for row in rows:
        cells = [_cell(row, column) for column in columns.values()]
        if row.get("reason"):
            first = next(i for i, cell in enumerate(cells) if cell == "")
            cells[first] = "not run: " + str(row["reason"]).split(". ")[0].replace("|", "/")[:160]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any], column: str) -> str:
    key, _, form = column.partition(":")
    value = row.get(key)
    if value is None:
        return ""
    return f"{value:{form.removesuffix('x')}}" + ("x" if form.endswith("x") else "") if form else str(value)


def _made(result: dict[str, Any]) -> str:
    environment = result["environment"]
    clock = result.get("setting", {}).get("clock", "wall")
    return f"Made by `{_command(result)}`: {clock} clock, torch {environment['torch']}, {environment['device']}."


def _command(result: dict[str, Any]) -> str:
    """The command that made a result, run directories named as a reader would have them."""
    return str(result["environment"]["command"]).replace("python ", "python benchmarks/", 1)


def _result(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


if __name__ == "__main__":
    main()

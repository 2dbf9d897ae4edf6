"""docs/evidence.md: exactness, cost, and what training runs showed."""

from __future__ import annotations

from typing import Any

from flatness_page import flatness_section
from float32_page import float32_section
from matrix_page import summary_table
from runs_page import methods_table, methods_text, runs_table, statistics_table
from sequence_page import sequence_section
from shared import RATIO, command, made, result_of, table

_STATISTICS = {
    "run": "variant", "copied": "copied:.3f", "averaged": "averaged:.3f", "taken anew": "anew:.3f",
    "copied, lowest": "lowest_copied:.3f",
}  # fmt: skip
_ERRORS = {"cosine error": "cosine_error:.0e", "gradient error": "gradient_error:.0e"}


def evidence() -> str:
    """The page: exactness, cost, and what training runs showed."""
    exact, cost, memory = result_of("matrix"), result_of("step_cost"), result_of("memory")
    monitoring, profile = result_of("measure_peers"), result_of("profile")
    models, scaling = result_of("step_cost_models"), result_of("scaling")
    network = scaling["rows"][0]["model"].rpartition("-")[0]
    real, demo, methods = result_of("real_images"), result_of("demo"), result_of("methods")
    longer, averaged = result_of("methods_long"), result_of("averaged_statistics")
    return f"""# Evidence

This page is written by `python docs/generators/make_pages.py` from the files under `benchmarks/results`; each says its
command, versions and device. Nothing here comes from a GPU.

## Exactness

Rows are {len(exact["cells"])} models and layers, among them whole models of torchvision and timm; each cell was
compared in five quantities with a float64 loop over samples that shares no code with the library.
[Every row](matrix.md).

{summary_table(exact)}

Made by `{command(exact)}` with torch {exact["environment"]["torch"]} on a CPU.

### Float32 on whole networks

{float32_section(result_of("float32_error"))}

### Sequence models of transformers

{sequence_section(result_of("sequence_models"))}

## Cost

A step with the term over the split FixMatch step without it, measured in one run and in alternation. Errors are those
of the cosine and of the term's gradient on a few of the same pairs, against the float64 loop. Nothing is left out
because it loses.

{models_table(cost)}

{made(cost)}

{models_table(models)}

{made(models)}

![Step with the term over the step without](assets/step_cost.png)

### Peak memory

{memory_table(memory)}

{made(memory)}

### Scaling

A `{network}` with pairs, width and image size varied one at a time around {scaling["setting"]["pairs"]} pairs, width 2,
32x32; each point is a process of its own, so that neighbouring points, not ratios, are what to look at. At few pairs of
a small network vmap is as fast, and a loop over samples takes less memory at every point.

![Seconds and peak memory](assets/scaling.png)

{made(scaling)}

### Monitoring

`measure`, without a graph, beside libraries that give per-sample gradients or their products. Ratios are to `measure`
with its defaults.

{monitoring_table(monitoring)}

{monitoring_text(monitoring)}

{made(monitoring)}

### Where the time goes

{profile_table(profile)}

{made(profile)}

## The averaged model's statistics

[Does it help?](does-it-help.md) has the comparisons with FixMatch. This is about a trap in them: BatchNorm's running
statistics in the averaged (EMA) model, which is the one that is evaluated. A first run on CIFAR-10's photographs (JPEG
copy; one seed, {real["runs"][0]["summary"]["steps"]:,} steps, {real["runs"][0]["options"]["labels"]} labels) copied
them from the trained model, as the FixMatch reference does. The same checkpoints, with the statistics that they hold
and with statistics taken anew from training images:

{statistics_table(result_of("real_images_statistics"))}

Made by `{command(result_of("real_images_statistics"))}` on the last checkpoints of:

```text
{real["made_by"]}
```

The term's gradient holds BatchNorm's statistics constant, so it may move the channel means that BatchNorm removes in
train mode; the running statistics lag, and the averaged model's copied ones fit it worst. The trainers average them
together with the weights since. [What to do](guides/batchnorm-and-dropout.md).

On digits, longer, the same averaged weights with the statistics of the last weights (copied), with averaged ones (the
trainers' way), and with statistics taken anew; means over {averaged["setting"]["seeds"]} seeds of
{averaged["setting"]["steps"]} steps, and the lowest of the seeds:

{table(averaged["rows"], _STATISTICS)}

{made(averaged)}

## Flatness

{flatness_section(result_of("flatness"), made(result_of("flatness")))}

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

{made(methods)}

{longer["setting"]["steps"]} steps instead of {methods["setting"]["steps"]}:

{methods_table(longer)}

{made(longer)}
"""


def models_table(result: dict[str, Any]) -> str:
    """Step cost of every model."""
    rows = result["rows"]
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        columns = {"step": "variant", "seconds": "seconds_median:.2f", **RATIO, **_ERRORS}
        parts += [f"### {model}", "", table(mine, columns), ""]
    return "\n".join(parts).rstrip()


def memory_table(result: dict[str, Any]) -> str:
    """Peak memory of a step, a process a point."""
    columns = {
        "model": "model", "pairs": "pairs", "step": "variant", "peak MB": "peak_mb:.0f",
        "over FixMatch's": "peak_ratio:.2fx", "time over FixMatch's": "time_ratio:.2fx", **_ERRORS,
    }  # fmt: skip
    return table(result["rows"], columns)


def monitoring_table(result: dict[str, Any]) -> str:
    """Cosines without a graph, beside other libraries."""
    columns = {
        "model": "model", "pairs": "pairs", "by": "variant", "ms a pair": "milliseconds_a_pair:.2f", **RATIO,
        "cosine error": "cosine_error:.0e",
    }  # fmt: skip
    return table(result["rows"], columns)


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
    return table(rows, columns)

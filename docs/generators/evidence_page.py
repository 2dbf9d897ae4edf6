"""docs/evidence.md: exactness, cost, and what training runs showed."""

from __future__ import annotations

from typing import Any

from flatness_page import flatness_section
from float32_page import float32_section
from matrix_page import precision_table
from runs_page import methods_table, methods_text
from sequence_page import sequence_section
from shared import RATIO, command, made, result_of, table, with_range

_STATISTICS = {
    "run": "variant", "copied": "copied:.3f", "averaged": "averaged:.3f", "fresh": "anew:.3f",
}  # fmt: skip


def evidence() -> str:
    """The page: exactness, cost, and what training runs showed."""
    exact, cost, memory = result_of("matrix"), result_of("step_cost"), result_of("memory")
    monitoring, host, small = (result_of(name) for name in ("measure_peers", "host_work", "step_cost_host"))
    models, scaling = result_of("step_cost_models"), result_of("scaling")
    network = scaling["rows"][0]["model"].rpartition("-")[0]
    methods, averaged = result_of("methods"), result_of("averaged_statistics")
    return f"""# Evidence: exactness, cost, side effects

Written by `python docs/generators/make_pages.py` from the files under `benchmarks/results`; each has its command,
versions and device. Nothing here comes from a GPU. Whether the term raises accuracy has
[another page](does-it-help.md); long tables are in the appendix, as is
[a scorecard of what was tried to break it](appendix/scorecard.md).

## Exactness

{len(exact["cells"])} models and layers, among them whole models of torchvision and timm, were compared in five
quantities with a float64 loop over samples that shares no code with the library, {exact["calls"]} calls in all. The
default engine:

{precision_table(exact)}

"as the oracle": beyond the bounds, as the oracle itself is in that precision. "refused": an error that names the layer.
Worst errors are those of the cells that pass. [Every engine and every row](appendix/matrix.md).
Made by `{command(exact)}` with torch
{exact["environment"]["torch"]} on a CPU.

### Float32 on whole networks

{float32_section(result_of("float32_error"))}

### Sequence models of transformers

{sequence_section(result_of("sequence_models"))}

## Cost

A step with the term over the split FixMatch step without it, measured in alternation, all pairs compared.

{models_table(cost)}

{made(cost)}

Other models. Recurrent layers ("bilstm") run step by step, since torch's fused kernels for them have no second
derivative. "one view constant": `stop_gradient='weak'`; "one pass":
[the wrapper's `share`](guides/wrap-your-method.md#one-pass-for-both-losses), which BatchNorm rules out by default:

{other_models(models)}

{made(models)}

### Work of the host

With a small model, a GPU waits for its host to launch kernels and read numbers back. Both are counted here, in a step
with one chunk; the first call, which tries the model, has more.

{host_table(host)}

By the clock, with images of {side(small)}, on which kernels take hardly any time: {times(small)}.
Made by `{command(host)}` and `{command(small)}`.

### Peak memory

{memory_table(memory)}

{made(memory)}

### Scaling

A `{network}` with pairs, width and image size varied one at a time around {scaling["setting"]["pairs"]} pairs, width 2,
32x32. Each point is a process, so look at neighbouring points, not at ratios. At few pairs of a small network vmap is
as fast, and a loop over samples takes less memory at every point.

![Seconds and peak memory](assets/scaling.png)

{made(scaling)}

### Monitoring

`measure`, without a graph, beside libraries that give per-sample gradients or their products.

![Milliseconds per pair, by library](assets/measure_peers.png)

{monitoring_text(monitoring)}

{made(monitoring)}

## The averaged model's statistics

A trap in comparisons with FixMatch: BatchNorm's running statistics in the averaged (EMA) model, which is the one that
is evaluated. The term's gradient holds the statistics constant, so it may move channel means that BatchNorm removes in
train mode; the running statistics lag. Below are the same averaged weights with the statistics of the last weights
(copied), averaged ones (the trainers' way), and fresh ones from training images. Accuracy, means over
{averaged["setting"]["seeds"]} seeds of {averaged["setting"]["steps"]} steps on digits:

{table(averaged["rows"], _STATISTICS)}

{made(averaged)} [What to do](guides/batchnorm-and-dropout.md).

## Flatness

{flatness_section(result_of("flatness"), made(result_of("flatness")))}

## Every method: digits, 40 labels

{methods_table(methods, result_of("methods_long"))}

{methods_text(methods)}

{made(methods)} The longer runs: `{command(result_of("methods_long"))}`.
"""


def models_table(result: dict[str, Any]) -> str:
    """Step cost of the network of the trainers."""
    columns = {"step": "variant", "seconds": "seconds_median:.2f", **RATIO}
    return table([with_range(row) for row in result["rows"]], columns)


def other_models(result: dict[str, Any]) -> str:
    """Step cost of the other models, a row each."""
    variants = {
        "default": "default", "one view constant": "default, stop_gradient='weak'", "one pass": "wrapper, one pass",
        "vmap": "vmap, chunk 16",
    }  # fmt: skip
    ratio = {
        (row["model"], row["variant"]): f"{row['ratio_median']:.1f}x" if "ratio_median" in row else "refused"
        for row in result["rows"]
    }
    rows = [
        {"model": model} | {name: ratio.get((model, variant), "-") for name, variant in variants.items()}
        for model in dict.fromkeys(model for model, _ in ratio)
    ]
    return table(rows, {"model": "model", **{name: name for name in variants}})


def side(result: dict[str, Any]) -> str:
    """The images' size."""
    return "x".join([str(result["setting"]["image_size"])] * 2)


def times(result: dict[str, Any]) -> str:
    """By how much a step with the term takes longer, for each model."""
    rows = [row for row in result["rows"] if row["variant"] == "default"]
    return ", ".join(f"{row['model']} {row['ratio_median']:.1f}x" for row in rows)


def host_table(result: dict[str, Any]) -> str:
    """Kernels and host reads of a step with and without the term, a model each."""
    rows = {(row["model"], row["variant"]): row for row in result["rows"]}
    found = []
    for model in dict.fromkeys(model for model, _ in rows):
        without, term = rows[model, "without the term"], rows[model, "with the term"]
        found.append({**term, "without": without["kernels"]})
    columns = {
        "model": "model",
        "kernels without": "without",
        "with": "kernels",
        "times": "ratio:.1f",
        "reads": "reads",
    }
    return table(found, columns)


def memory_table(result: dict[str, Any]) -> str:
    """Peak memory of a step, a process a point."""
    columns = {
        "model": "model", "pairs": "pairs", "step": "variant", "peak MB": "peak_mb:.0f",
        "over FixMatch's": "peak_ratio:.2fx",
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
        f"Faster than `measure`: {'; '.join(faster)}; slower: the other {len(theirs) - len(faster)} rows. The reason:"
        " every layer's output passes through Python twice here, which costs most where the arithmetic takes hundredths"
        " of a second."
    )

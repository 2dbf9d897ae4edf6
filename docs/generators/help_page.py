"""docs/does-it-help.md and docs/appendix/runs.md: the verdict, and every row behind it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from statistics import median

from help_rows import (
    ENOUGH,
    GRIDS,
    SEARCHES,
    Result,
    Row,
    against_fixmatch,
    difference,
    ends,
    fresh,
    grids,
    mean,
    names,
    rows,
    searches,
    title,
    verdict_rows,
)
from shared import APPENDIX, command, made, result_of

from trainer.runlog import shown
from trainer.statistics import difference_text, spread_text

_QUANTITIES = {
    "mask": "confident", "cosine_all": "GC", "strong_all": "norm, strong", "ratio": "L_g / rest",
    "against_u": "L_g, L_u", "step_gain": "gain / promise",
}  # fmt: skip


def verdict_table(found: list[Row]) -> str:
    """Every setting with enough seeds."""
    lines = ["| | accuracy (seeds) | over FixMatch, 95 % |", "| --- | ---: | ---: |"]
    last = ""
    for row in found:
        if row.of != last:
            lines.append(f"| **{row.of}** | | |")
        last = row.of
        gap = difference_text(dataclasses.asdict(row.gap)).rpartition(" ")[0] if row.gap else ""
        lines.append(f"| {row.name} | {mean(row.accuracies)} | {gap} |")
    return "\n".join(lines)


def headline(found: list[Row]) -> str:
    """The answer in a sentence, as the intervals have it."""
    tried = [row for row in found if row.term and row.gap]
    gains = [f"{row.of}, {row.name}" for row in tried if row.gap and row.gap.low is not None and row.gap.low > 0]
    if gains:
        return (
            f"**{len(gains)} of {len(tried)} settings with {ENOUGH} or more seeds show a gain in accuracy:"
            f" {'; '.join(gains)}.**"
        )
    return f"**No: none of the {len(tried)} settings with {ENOUGH} or more seeds shows a gain in accuracy.**"


def searches_protocol(searched: dict[str, Result]) -> str:
    """How the runs of searches were made; empty without them."""
    about = {
        "digits": "**Digits**: scikit-learn's, 8x8, a network of two convolutions",
        "photographs": "**Photographs of two classes** (airplane, automobile): 16x16, a network of three convolutions",
    }
    lines = []
    for data, text in about.items():
        of = [search for name, search in searched.items() if SEARCHES[name][1] == data]
        if of:
            steps = " or ".join(sorted({f"{search['identity']['steps']:,}" for search in of}))
            lines.append(f"- {text}, {steps} steps.")
    if lines:
        lines.append('- In a search settings are ranked on held-out images. "As long as" gives a row as much time.')
    return "".join(f"{line}\n" for line in lines)


def search_text(searched: dict[str, Result]) -> str:
    """What the searches over settings tried; empty without one."""
    lines = []
    for name, search in searched.items():
        tried = [row for row in search["summary"] if row["stage"] == "search" and row["term"]]
        if not tried:
            continue
        best = [row for row in search["summary"] if row["stage"] == "confirm" and row["term"] and row["minus_base"]]
        held = [row["name"] for row in best if row["minus_base"]["low"] is not None and row["minus_base"]["low"] > 0]
        fresh_seeds = min((row["n"] for row in best), default=0)
        said = f"{len(held)} gained there: {'; '.join(held)}" if held else "none gained there"
        lines.append(
            f"- **A search** over {len(tried)} settings on held-out {SEARCHES[name][1]},"
            f" {min(row['n'] for row in tried)} seeds each; then the best {len(best)} on test images with {fresh_seeds}"
            f" fresh seeds: {said}, over the same training without the term ([all of them](appendix/runs.md)).\n"
        )
    return "".join(lines)


def _ratio(seconds: dict[tuple[str, int], float | None], variant: str, other: str) -> float:
    """Median over the seeds that both have."""
    # No seconds: the run shared its core with other work.
    seeds = [seed for name, seed in seconds if name == variant and seconds[name, seed] and seconds.get((other, seed))]
    return median(seconds[variant, seed] / seconds[other, seed] for seed in seeds)


def help_page() -> str:
    """docs/does-it-help.md."""
    found, searched = grids(), searches()
    table = verdict_rows(found, searched)
    four = found["help_four"]
    values, by_fresh = ends(four), fresh(result_of("help_four_statistics"))
    at_01 = against_fixmatch(values, "ggcr")
    assert at_01 is not None
    holds = {True: "which contains 0", False: "which does not contain 0", None: "which has no ends"}[at_01.contains(0)]
    claim = {True: "contains", False: "excludes", None: "says nothing about"}[at_01.contains(1.4)]
    seconds = {(run["variant"], run["seed"]): run["seconds"] for run in four["runs"]}
    slower, longer = _ratio(seconds, "ggcr", "fixmatch"), _ratio(seconds, "fixmatch-longer", "ggcr")
    dynamics = result_of("term_dynamics")
    quarters = {(row["variant"], row["quarter"]): row for row in dynamics["summary"]}
    specified = [quarters["ggcr", quarter] for quarter in (2, 3, 4)]
    parts, gains = [10 * row["ratio"] for row in specified], [row["step_gain"] for row in specified]
    gc = [quarters[variant, 4]["cosine_all"] for variant in ("fixmatch", "ggcr", "ggcr-10.0")]
    large = quarters["ggcr-10.0", 3]
    growth = large["strong_all"] / quarters["fixmatch", 3]["strong_all"]
    followed, group = (
        {row["variant"]: row for row in result_of(f"term_dynamics_{kind}")["summary"] if row["quarter"] == 4}
        for kind in ("through", "group_norm")
    )
    seconds_of_runs = [run["seconds"] or 0.0 for grid in found.values() for run in grid["runs"]]
    for search in searched.values():
        seconds_of_runs += [run[1] for stage in search["runs"].values() for of in stage.values() for run in of.values()]
    hours, runs, untimed = sum(seconds_of_runs) / 3600, len(seconds_of_runs), seconds_of_runs.count(0.0)
    return f"""# Does it help?

{headline(table)}

- As the paper specifies it (λ = 0.1, BatchNorm), the term changes FixMatch by {difference(values, "ggcr")} points: an
  interval {holds}. With BatchNorm's statistics recomputed at the end it is {difference(by_fresh, "ggcr")}.
- That took {slower:.1f} times as long, warm-up and masked pairs included. FixMatch alone, trained for {longer:.0%} of
  that time, changes by {difference(values, "fixmatch-longer")}.
- Without BatchNorm, GC rises and no loss of accuracy shows.
{search_text(searched)}
![Accuracy over FixMatch, in points](assets/help_verdict.png)

{verdict_table(table)}

Accuracy on test images in per cent, mean ± standard deviation (seeds); difference to FixMatch in points, paired by
seed, with Student's 95 % interval. Rows with fewer than {ENOUGH} paired seeds are in
[the appendix](appendix/runs.md). Written by `python docs/generators/make_pages.py` from
`benchmarks/results/help_*.json`, `digits_*.json` and `photographs_*.json`; each grid's command is in the appendix.

## Why

Gradients measured along one run each, on the run's next batch
([all of it](appendix/runs.md#what-the-term-sees-and-does)):

- **At λ = 0.1 the term does almost nothing.** Its gradient is {min(parts):.0f} to {max(parts):.0f} % of a step's and
  nearly orthogonal to the other losses' gradients. GC ends at {gc[1]:.2f}, without the term at {gc[0]:.2f}.
- **At λ = 10 gradients agree, but confidence is lost.** GC rises to {gc[2]:.2f}, while the strong views' gradients are
  {growth:.0f} times as long as without the term, and {quarters["ggcr-10.0", 4]["mask"]:.0%} of the pairs stay
  confident.
- **With BatchNorm, L_g falls less than its gradient predicts**: {min(gains):.0%} to {max(gains):.0%} of that at 0.1,
  {large["step_gain"]:.0%} at 10. The definition holds BatchNorm's statistics constant, so the term moves channel means
  that BatchNorm removes, and the running statistics fall behind. Differentiated through the statistics
  (`through_statistics=True`), it falls by {followed["ggcr"]["step_gain"]:.0%} and
  {followed["ggcr-10.0"]["step_gain"]:.0%} of that; accuracy did not rise with it
  ({difference(ends(found["help_through_statistics"]), "ggcr")} points at 0.1).
- **With GroupNorm** it falls by {group["ggcr-10.0"]["step_gain"]:.0%} of that at λ = 10, GC ends at
  {group["ggcr-10.0"]["cosine_all"]:.2f}, and {group["ggcr-10.0"]["mask"]:.0%} of the pairs are confident.

## When to use it, and when not

Use it to study how per-sample gradients agree. If you train with it, compare paired seeds, on a network without
BatchNorm, or with averaged statistics and λ of at most 0.1. Do not use it for accuracy alone.

The paper claims +1.4 points, with no run behind that number that is known. The interval at λ = 0.1 {claim} it. **What
speaks against this verdict**: every run here is a thousandth as long as the paper's, with a smaller network and smaller
images. A gain that needs length, size or resolution would not be seen.

## Protocol

- **Paired**: seed k has the same labeled split, initial weights, order of images and augmentation in every row.
- **Small**, for CPUs. Images are photographs of CIFAR-10 (JPEG copy) at 16x16, four classes (airplane, automobile,
  bird, cat) with 40 labels; the network is a `wrn-10-1`; a run has a thousand steps of 8 + 24 images. Accuracies are
  far below the paper's; only differences between rows count.
- **Chosen without the term**: classes, labels and threshold were chosen on held-out training images, by whether
  FixMatch beats the labels alone. Test images decided nothing.
- **The last step counts**: accuracy of the averaged model, with BatchNorm's running statistics averaged beside it.
{searches_protocol(searched)}- **All of it**: {hours:.1f} hours of training on one core of a CPU, {runs} runs ({untimed}
  of them not timed), every one in [the appendix](appendix/runs.md).

To repeat it, with the four classes in `cifar10-jpeg-4/train/CLASS` and `cifar10-jpeg-4/test/CLASS`:

```bash
{GRIDS["help_four"][1]}
{GRIDS["help_group_norm"][1]}
```
"""


def runs_page() -> str:
    """docs/appendix/runs.md: every row of every grid, and what the term sees and does over a run."""
    found = grids()
    sections = "\n\n".join(
        [*(_section(name, grid) for name, grid in found.items()), *(_search(n, r) for n, r in searches().items())]
    )
    dynamics = [result_of(f"term_dynamics{kind}") for kind in ("", "_through", "_group_norm")]
    return f"""{APPENDIX}# Every training run

Written by `python docs/generators/make_pages.py` from `benchmarks/results/help_*.json` and `term_dynamics*.json`.
Accuracy of the averaged model after the last step, in per cent, mean ± standard deviation (seeds), and paired
differences to FixMatch in points with 95 % interval. One or two seeds show nothing by themselves.
[The verdict](../does-it-help.md).

{sections}

## What the term sees and does

Gradients of one run each on the four classes, medians by quarter of the run. *L_g / rest*: norm of L_g's gradient over
that of the other losses; λ times it is the term's part in a step. *L_g, L_u*: cosine between those two gradients.
*gain / promise*: by how much L_g falls in a small step against its gradient, over what the gradient promises.

{chr(10).join(_dynamics(result) for result in dynamics)}
"""


def _section(name: str, grid: Result) -> str:
    values = ends(grid)
    by_fresh = fresh(result_of("help_four_statistics")) if name == "help_four" else None
    about = GRIDS[name][2] if name in GRIDS else ""
    made_by = GRIDS[name][1] if name in GRIDS else grid.get("made_by", "python examples/reproduce.py")
    lines = [
        "| | accuracy | over FixMatch |" + (" with fresh statistics |" if by_fresh else ""),
        "| --- | ---: | ---: |" + (" ---: |" if by_fresh else ""),
    ]
    for variant in rows(values):
        plain = variant == "fixmatch"
        cells = [mean(values[variant]), "" if plain else difference(values, variant)]
        if by_fresh:
            cells.append("" if plain or variant not in by_fresh else difference(by_fresh, variant))
        lines.append(f"| {names().get(variant, variant)} | " + " | ".join(cells) + " |")
    last = ""
    if by_fresh:
        last = (
            "\n\nFresh statistics: BatchNorm's, taken from training images at the end."
            f" {made(result_of('help_four_statistics'))}\n\n![Test accuracy against the step](../assets/help_four.png)"
        )
    return f"""## {title(name)}

{about + chr(10) + chr(10) if about else ""}{chr(10).join(lines)}

Options: {_options(grid)}. The command:

```bash
{made_by}
```{last}"""


def _search(name: str, result: Result) -> str:
    """Both stages of a search: held-out images, then fresh seeds on test images."""
    parts = []
    for stage, about in (("search", "On held-out images"), ("confirm", "With fresh seeds, on test images")):
        lines = ["| | accuracy | over the same without the term |", "| --- | ---: | ---: |"]
        for row in sorted((row for row in result["summary"] if row["stage"] == stage), key=lambda row: -row["mean"]):
            gap = difference_text(row["minus_base"]) if row["minus_base"] else ""
            lines.append(f"| {row['name']} | {spread_text(row)} | {gap} |")
        if len(lines) > 2:
            parts.append(f"{about}:\n\n" + "\n".join(lines))
    environment = result["environment"]
    last = f"Made by `{command(result)}`: torch {environment['torch']}, {environment['device']}."
    return f"## {SEARCHES[name][0]}\n\n" + "\n\n".join([*parts, last])


def _options(result: Result) -> str:
    if "protocol" not in result:
        return "in the file"
    protocol = next(iter(result["protocol"].values()))["options"]
    chosen = ("arch", "image_size", "labels", "steps", "batch_size", "unlabeled_ratio", "threshold", "ggcr_warmup",
              "lr", "ema", "bn_momentum")  # fmt: skip
    return ", ".join(f"`{name}` {shown(protocol[name])}" for name in chosen)


def _dynamics(result: Result) -> str:
    """Medians by variant and quarter of the run, and the picture."""
    kind = Path(str(result["environment"]["command"]).rpartition("--output ")[2].split(" ")[0]).stem
    about = {"term_dynamics": "BatchNorm", "term_dynamics_through": "Through BatchNorm's statistics",
             "term_dynamics_group_norm": "GroupNorm"}[kind]  # fmt: skip
    lines = [
        f"### {about}\n",
        "| run, quarter | " + " | ".join(_QUANTITIES.values()) + " |",
        "| --- |" + " ---: |" * len(_QUANTITIES),
    ]
    for row in result["summary"]:
        numbers = ["-" if row[name] is None else f"{row[name]:.2f}" for name in _QUANTITIES]
        lines.append(f"| {row['variant']}, {row['quarter']} | " + " | ".join(numbers) + " |")
    return "\n".join(lines) + f"\n\n![{about}](../assets/{kind}.png)\n\n{made(result)}\n"

"""What the evidence page shows of training runs: tables, and sentences made of the same results."""

from __future__ import annotations

from typing import Any


def runs_table(result: dict[str, Any]) -> str:
    """One row a run."""
    lines = [
        "| method | seed | steps | last | median of last 20 | best | minutes |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in result["runs"]:
        summary = run["summary"]
        lines.append(
            f"| {run['label']} | {summary['seed']} | {summary['steps']} | {summary['last']:.4f}"
            f" | {summary['median_last_20']:.4f} | {summary['best']:.4f} | {summary['seconds'] / 60:.1f} |"
        )
    lines += [
        "",
        "Test accuracy of the averaged (EMA) model; `best` is chosen on the test images, so it is optimistic.",
    ]
    return "\n".join(lines)


def methods_table(result: dict[str, Any]) -> str:
    """Every method, plain and with the term, in one row."""
    rows = {row["variant"]: row for row in result["rows"]}
    lines = [
        "| method | plain | with GGCR | plain, by seed | with GGCR, by seed | step time with / without |",
        "| --- | ---: | ---: | --- | --- | ---: |",
    ]
    for name in sorted({row["method"] for row in result["rows"]}, key=lambda name: (rows[name]["mean"], name)):
        both = [rows[name], rows.get(f"{name} + GGCR")]
        means = [f"{row['mean']:.3f} ± {row['spread']:.3f}" if row else "" for row in both]
        seeds = [", ".join(f"{value:.3f}" for value in row["accuracies"]) if row else "" for row in both]
        ratio = f"{both[1]['ratio']:.2f}x" if both[1] else ""
        lines.append("| " + " | ".join([name, *means, *seeds, ratio]) + " |")
    return "\n".join(lines)


def methods_text(result: dict[str, Any]) -> str:
    setting, rows = result["setting"], {row["variant"]: row for row in result["rows"]}
    floor = rows["supervised"]["mean"]
    below = sorted(name for name, row in rows.items() if row["mean"] <= floor and name != "supervised")
    verdict = f"Not above supervised: {', '.join(below)}." if below else "Every row is above supervised."
    if rows["flexmatch"]["accuracies"] == rows["softmatch"]["accuracies"]:
        verdict += (
            " FlexMatch and SoftMatch are the same run here: in so few steps the thresholds of the one and the weights"
            " of the other let every pseudo-label through."
        )
    changes = {name: rows[f"{name} + GGCR"]["mean"] - rows[name]["mean"] for name in rows if f"{name} + GGCR" in rows}
    most = max(changes, key=lambda name: abs(changes[name]))
    return (
        f"Test accuracy of the averaged (EMA) model: mean ± standard deviation over {setting['seeds']} seeds, which"
        f" decide split, initial weights, order and augmentation. {setting['steps']} steps of a small convolutional"
        f" network, {setting['labels']} labels, each method's own defaults; the term has weight {setting['weight']}."
        f" {verdict}"
        " Every unlabeled image is seen about five times here, which is little for methods that compare predictions"
        " without pseudo-labels (Mean Teacher, the Pi-model, Temporal Ensembling) and whose weight rises during the"
        " first 40 % of the run: the table below has them in a longer one. Three seeds and 355 test images rank"
        f" nothing. The largest change by the term is {most}'s, {changes[most]:+.3f} in the mean."
    )


def statistics_table(result: dict[str, Any]) -> str:
    """Test accuracy by stored and by fresh statistics."""
    lines = ["| method | weights | statistics as stored | taken anew |", "| --- | --- | ---: | ---: |"]
    lines += [
        f"| {row['label']} | {row['weights']} | {row['stored']:.4f} | {row['anew']:.4f} |" for row in result["rows"]
    ]
    return "\n".join(lines)

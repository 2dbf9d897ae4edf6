"""What the evidence page shows of training runs: tables, and sentences made of the same results."""

from __future__ import annotations

from typing import Any


def methods_table(short: dict[str, Any], long: dict[str, Any]) -> str:
    """Every method, plain and with the term, in runs of two lengths."""
    results = (short, long)
    lines = [
        "| method |" + "".join(f" {r['setting']['steps']} steps | with the term |" for r in results) + " step |",
        "| --- |" + " ---: |" * 5,
    ]
    found = [{row["variant"]: row for row in result["rows"]} for result in results]
    for name in sorted({row["method"] for row in short["rows"]}, key=lambda name: (found[0][name]["mean"], name)):
        both = [rows.get(f"{name}{term}") for rows in found for term in ("", " + GGCR")]
        cells = [f"{row['mean']:.3f} ± {row['spread']:.3f}" if row else "" for row in both]
        ratio = f"{both[1]['ratio']:.1f}x" if both[1] else ""
        lines.append("| " + " | ".join([name, *cells, ratio]) + " |")
    return "\n".join(lines)


def methods_text(result: dict[str, Any]) -> str:
    setting, rows = result["setting"], {row["variant"]: row for row in result["rows"]}
    floor = rows["supervised"]["mean"]
    below = sorted(name for name, row in rows.items() if row["mean"] <= floor and name != "supervised")
    verdict = f"Not above supervised in the short runs: {', '.join(below)}." if below else ""
    changes = {name: rows[f"{name} + GGCR"]["mean"] - rows[name]["mean"] for name in rows if f"{name} + GGCR" in rows}
    most = max(changes, key=lambda name: abs(changes[name]))
    return (
        f"Test accuracy of the averaged (EMA) model: mean ± standard deviation over {setting['seeds']} seeds, which"
        f" decide split, initial weights, order and augmentation. {setting['steps']} steps of a small convolutional"
        f" network, {setting['labels']} labels, each method's own defaults; the term has weight {setting['weight']}."
        f' "step": time with the term over without. {verdict} Three seeds and 355 test images rank nothing. The'
        f" largest change by the term in the short runs is {most}'s, {changes[most]:+.3f} in the mean."
    )

"""The table of docs/guides/usb.md from benchmarks/results/usb.json."""

from __future__ import annotations

from typing import Any

from shared import between, command


def with_table(page: str, result: dict[str, Any]) -> str:
    """The page with a fresh table between its markers."""
    lines = [
        "| algorithm | bitwise at weight 0 | mean cosine | step, with / without |",
        "| --- | --- | ---: | ---: |",
    ]
    lines += [
        f"| {row['algorithm']} | {'yes' if row['bitwise'] else '**no**'} | {row['cosine']:.2f}"
        f" | {row['ratio_median']:.1f}x |"
        for row in result["rows"]
    ]
    setting, environment = result["setting"], result["environment"]
    pairs = {int(row["pairs"]) for row in result["rows"]}
    lines += [
        "",
        f"{setting['network']} on {setting['data']}, {setting['labeled']} labeled images and"
        f" {' or '.join(map(str, sorted(pairs)))} pairs, all compared; {setting['steps']} steps for the first two"
        f" columns, {setting['rounds']} rounds in alternation for the ratios ({setting['clock']} clock).",
        "",
        f"Made by `{command(result)}`: torch {environment['torch']}, {environment['device']}.",
    ]
    return between(page, "usb", "\n".join(lines))

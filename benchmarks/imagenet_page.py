"""What docs/guides/imagenet.md shows of result files: costs of settings, and the runs."""

from __future__ import annotations

import re
from typing import Any


def with_tables(page: str, cost: dict[str, Any], runs: dict[str, Any]) -> str:
    """The page with fresh tables between its markers."""
    for name, text in (("imagenet-cost", cost_table(cost)), ("imagenet-runs", runs_section(runs))):
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        fresh = f"{begin}\n{text}\n{end}"
        page = re.sub(f"{begin}.*?{end}", lambda _, fresh=fresh: fresh, page, flags=re.S)  # type: ignore[misc]
    return page


def cost_table(result: dict[str, Any]) -> str:
    """Step and peak memory of each setting over those of the step without the term."""
    lines = [
        "| setting | image size | labeled + pairs | seconds | step | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        start = f"| {_setting(row['variant'])} | {row['image_size']} | {row['labeled']} + {row['pairs']} |"
        if row["reason"]:
            lines.append(f"{start} not run: {row['reason']} | | |")
        else:
            lines.append(f"{start} {row['seconds']:.2f} | {row['ratio']:.2f}x | {row['memory_ratio']:.2f}x |")
    environment, used = result["environment"], result["setting"]
    return "\n".join(lines) + (
        f"\n\nThe trainer's own step of {used['arch']}, BatchNorm, float32, every pair confident, one process; median "
        f"of {used['rounds']} rounds. Made by `{environment['command'].replace('python ', 'python benchmarks/')}`: "
        f"{used['clock']} clock, torch {environment['torch']}, {environment['device']}."
    )


def _setting(variant: str) -> str:
    return f"`{variant}`" if variant.startswith("--") else variant


def runs_section(result: dict[str, Any]) -> str:
    """The runs as a table, with the commands that made them."""
    lines = [
        "| network | image size | labels | method | processes | steps | top-1 | chance | last loss | GC | time |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in result["runs"]:
        options, summary, train = run["options"], run["summary"], run["training"][-1]
        cosine = [line["ggcr_cosine"] for line in run["training"] if line.get("ggcr_cosine") is not None]
        lines.append(
            f"| {options['arch']} | {options['image_size']} | {summary['labels']} | {run['label']} | "
            f"{summary['processes']} | {summary['steps']} | {100 * summary['last']:.1f} % | 2 % | "
            f"{train['loss']:.3f} | {f'{cosine[-1]:.2f}' if cosine else ''} | {summary['seconds'] / 60:.0f} min |"
        )
    return "\n".join(lines) + "\n\n" + result["text"] + f"\n\n```text\n{result['made_by']}\n```"

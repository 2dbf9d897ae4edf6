"""What docs/guides/imagenet.md shows of result files: costs of settings, two processes against one, and the runs."""

from __future__ import annotations

from typing import Any

from shared import between, command

Result = dict[str, Any]


def with_tables(page: str, costs: list[Result], equality: Result, runs: list[Result]) -> str:
    """The page with fresh tables between its markers."""
    fresh = {
        "imagenet-cost": "\n\n".join(cost_table(cost) for cost in costs),
        "imagenet-equality": equality_table(equality),
        "imagenet-runs": runs_table(runs),
    }
    for name, text in fresh.items():
        page = between(page, name, text)
    return page


def cost_table(result: Result) -> str:
    """Step and peak memory of each setting over those of the step without the term."""
    lines = [
        "| setting | image size | labeled + pairs | seconds | step | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        setting = f"`{row['variant']}`" if row["variant"].startswith("--") else row["variant"]
        start = f"| {setting} | {row['image_size']} | {row['labeled']} + {row['pairs']} |"
        if row["reason"]:
            lines.append(f"{start} not run: {row['reason']} | | |")
        else:
            lines.append(f"{start} {row['seconds']:.2f} | {row['ratio']:.2f}x | {row['memory_ratio']:.2f}x |")
    environment, used = result["environment"], result["setting"]
    return "\n".join(lines) + (
        f"\n\nThe trainer's own step of {used['arch']}, BatchNorm, float32, every pair confident, one process; median "
        f"of {used['rounds']} round(s). Made by `{command(result)}`: {used['clock']} clock, torch "
        f"{environment['torch']}, {environment['device']}."
    )


def equality_table(result: Result) -> str:
    """Difference of the gradients of two processes and of one, step by step."""
    lines = [
        "| norm | step | pairs | loss of one process | difference of the gradients |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| `{row['norm']}` | {row['step'] + 1} | {row['pairs']:.0f} | {row['loss_alone']:.4f} | "
        f"{row['gradient_error']:.1e} |"
        for row in result["rows"]
    ]
    environment, used = result["environment"], result["setting"]
    return "\n".join(lines) + (
        f"\n\nRelative, of the whole gradient, from the same weights: {used['arch']} at {used['image_size']}, float32, "
        f"{used['processes']} processes. Made by `{command(result)}` under torchrun, "
        f"torch {environment['torch']}."
    )


def runs_table(results: list[Result]) -> str:
    """Every run, with the commands that made them."""
    lines = [
        "| network | image size | labels | method | processes | steps | top-1 | pairs compared: GC | time |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        for run in result["runs"]:
            options, summary = run["options"], run["summary"]
            last = "unfinished" if summary is None else f"{100 * summary['last']:.1f} %"
            seconds = "" if summary is None else f"{summary['seconds'] / 60:.1f} min"
            cosines = [line["ggcr_cosine"] for line in run["training"] if line.get("ggcr_cosine") is not None]
            lines.append(
                f"| {options['arch']} | {options['image_size']} | {100 * options['label_fraction']:.0f} % | "
                f"{run['label']} | {options['processes']} | {options['steps']} | {last} | "
                f"{f'{cosines[0]:.2f} to {cosines[-1]:.2f}' if cosines else ''} | {seconds} |"
            )
    made = "\n".join(result["made_by"] for result in results)
    return "\n".join(lines) + f"\n\n```text\n{made}\n```"

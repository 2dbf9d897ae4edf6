"""The tables of docs/guides/trainer.md: the input pipeline's rates, and a run in each mode of half precision."""

from __future__ import annotations

from typing import Any

from shared import between, command


def with_tables(page: str, results: dict[str, dict[str, Any]]) -> str:
    """The page with fresh tables between their markers.

    Args:
        page: The page before.
        results: Name to contents of the files under benchmarks/results that `TABLES` names.

    Returns:
        The page as it should be.
    """
    for name, result in results.items():
        page = between(page, name, "\n".join(TABLES[name](result)))
    return page


def _pipeline(result: dict[str, Any]) -> list[str]:
    setting, environment = result["setting"], result["environment"]
    lines = ["| stage | images | milliseconds | images per second |", "| --- | ---: | ---: | ---: |"]
    for row in result["rows"]:
        milliseconds, rate = _three(1000 * row["seconds_median"]), _three(row["images_per_second"])
        lines.append(f"| {row['stage']} | {row['images']:,} | {milliseconds} | {rate} |")
    side = "x".join(map(str, setting["image_size"]))
    return [
        *lines,
        "",
        f"CIFAR-10 (JPEG copy), {side}; a step of {setting['batch_size']} labeled images and"
        f" {setting['batch_size'] * setting['unlabeled_ratio']} pairs of views, {setting['arch']}, all pairs compared;"
        f" one core, {setting['clock']} clock, medians.",
        "",
        f"Made by `{command(result)}`: torch {environment['torch']}, {environment['device']}.",
    ]


def _three(value: float) -> str:
    """Three digits that mean something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _modes(result: dict[str, Any]) -> list[str]:
    lines = [
        "| precision, `--amp` | last | median of last 20 | GC | precision of the mask | loss scale | steps skipped |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in result["runs"]:
        training, options, summary = run["training"], run["options"], run["summary"]
        last = training[-1]
        scale = f"{last['loss_scale']:,.0f}" if "loss_scale" in last else ""
        # Each line is the mean over as many steps: none is thinned out where there are 40 or fewer.
        skipped = f"{sum(line['skipped'] for line in training) * options['log_every']:.0f}" if scale else ""
        lines.append(
            f"| `{options['amp']}` | {summary['last']:.4f} | {summary['median_last_20']:.4f}"
            f" | {last['ggcr_cosine']:.2f} | {last['confident_accuracy']:.2f} | {scale} | {skipped} |"
        )
    environment = result["runs"][0]["environment"]
    return [
        "![Test accuracy in each mode](../assets/cifar_amp.png)",
        "",
        *lines,
        "",
        "Test accuracy of the averaged (EMA) model on CIFAR-10 (JPEG copy), the first fifth of each class, scaled to"
        f" 8x8; GC, precision and loss scale in the last {options['log_every']} steps. One seed, the"
        " same split, initial weights and order of images: the modes can be seen to train, and not be ranked. Made by:",
        "",
        "```text",
        result["made_by"],
        "```",
        "",
        f"torch {environment['torch']}, {environment['threads']} thread, {environment['device']}.",
    ]


TABLES = {"input_pipeline": _pipeline, "cifar_amp": _modes}

"""The tables of the grid: what the paper's claim, transcribed with their labels in its source, and some of our own.

The paper's are claims to test, not facts: no run behind these numbers is known. Accuracies are in per cent.
"""

from __future__ import annotations

from dataclasses import dataclass

CIFAR10, CIFAR100, IMAGENET = "CIFAR-10 (40)", "CIFAR-100 (400)", "ImageNet (1%)"


@dataclass(frozen=True)
class Claim:
    """A table of the paper, or one that it does not have."""

    label: str  # Its label in the paper's LaTeX source; empty for ours.
    caption: str  # What it shows.
    reference: str  # The row that the others are held against.
    rows: dict[str, str]  # Row to variant of the grid (a key of `trainer.grid.VARIANTS`).
    # Row, column to the claimed accuracy in per cent; empty where there is no claimed number.
    accuracy: dict[tuple[str, str], float]
    text: str = ""  # What the paper says in words; only of its curves, so a table with it is one of curves.
    note: str = ""  # What has to be known about its row or columns here.

    @property
    def columns(self) -> list[str]:
        """Its columns, in the paper's order."""
        return list(dict.fromkeys(column for _, column in self.accuracy)) or [CIFAR10]


_COMPARED = {"FixMatch": "fixmatch", "FlexMatch": "flexmatch", "GGCR (ours)": "ggcr"}

CLAIMS = {
    "main": Claim(
        "tab:iclr-main", "Main results", "FixMatch", _COMPARED,
        {
            ("FixMatch", CIFAR10): 91.8, ("FixMatch", CIFAR100): 53.6, ("FixMatch", IMAGENET): 57.2,
            ("FlexMatch", CIFAR10): 92.4, ("FlexMatch", CIFAR100): 54.9, ("FlexMatch", IMAGENET): 58.1,
            ("GGCR (ours)", CIFAR10): 93.2, ("GGCR (ours)", CIFAR100): 56.8, ("GGCR (ours)", IMAGENET): 60.3,
        },
    ),
    "ablation": Claim(
        "tab:ablation", "Ablation", "GGCR (full)",
        {
            "GGCR (full)": "ggcr", "w/o gradient consistency": "fixmatch", "w/o warm-up": "ggcr-no-warmup",
            "Gradient norm penalty instead": "gradient-norm",
        },
        {
            ("GGCR (full)", CIFAR10): 93.2, ("w/o gradient consistency", CIFAR10): 91.8,
            ("w/o warm-up", CIFAR10): 92.1, ("Gradient norm penalty instead", CIFAR10): 92.5,
        },
        note="The paper gives the gradient norm penalty no weight; here it has GGCR's.",
    ),
    "lambda": Claim(
        "tab:hparams", "Sensitivity to lambda", "0.1",
        {"0.01": "ggcr-0.01", "0.05": "ggcr-0.05", "0.1": "ggcr", "0.5": "ggcr-0.5", "1.0": "ggcr-1.0"},
        {
            ("0.01", CIFAR10): 92.3, ("0.05", CIFAR10): 92.8, ("0.1", CIFAR10): 93.2, ("0.5", CIFAR10): 92.9,
            ("1.0", CIFAR10): 91.7,
        },
    ),
    "curves": Claim(
        "fig:curves", "Learning curves", "FixMatch", _COMPARED, {},
        "GGCR converges faster and reaches higher final accuracy.",
        "The common level is, seed by seed, the lowest accuracy that one of the rows has in the end; steps count to "
        "the first evaluation at or above it. Columns of per cents are of the run's steps.",
    ),
    "settings": Claim(
        "", "Settings of the term", "GGCR",
        {
            "GGCR": "ggcr", "weak view constant": "ggcr-weak-constant",
            "random projection kronecker:16": "ggcr-projected", "at most 8 pairs": "ggcr-max-pairs",
            "last block only": "ggcr-last-block", "every pair, not the confident ones": "ggcr-every-pair",
            "observed statistics": "ggcr-observed", "running statistics": "ggcr-running",
        },
        {},
    ),
    "remedies": Claim(
        "", "Where the term is no small addition", "FixMatch",
        {
            "FixMatch": "fixmatch", "lambda 1, weak view constant": "ggcr-1.0-weak-constant",
            "lambda 3": "ggcr-3.0", "lambda 10": "ggcr-10.0", "lambda 1, every pair": "ggcr-1.0-every-pair",
            "lambda 1, last block only": "ggcr-1.0-last-block",
            "lambda 1, w/o warm-up": "ggcr-1.0-no-warmup",
        },
        {},
    ),
    "time": Claim(
        "", "Equal time", "FixMatch, as long as GGCR takes",
        {
            "Labels alone": "supervised", "FixMatch": "fixmatch",
            "FixMatch, as long as GGCR takes": "fixmatch-longer", "GGCR (ours)": "ggcr",
        },
        {},
        note="As long: so many more steps, with a schedule to match, as GGCR's steps take longer at this budget.",
    ),
}  # fmt: skip

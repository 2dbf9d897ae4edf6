"""What each method gets where the command line says nothing: its paper's or reference's values, else the preset's.

Sources are those of `gradconsist.methods`. An option that is given wins over all of this.
"""

from __future__ import annotations

from typing import Any

# 40 % of the run, the practice of TorchSSL and USB.
RAMP_SHARE = 0.4
# MixMatch's ramp in the reference code: 1,024 x 1,024 images of 64 a step. A short run has 40 % of its steps instead.
MIXMATCH_RAMP = 16_384

_TWO_WEAK_VIEWS = {"unlabeled_ratio": 1, "strong": "weak", "unlabeled_ramp": RAMP_SHARE}

METHODS: dict[str, dict[str, Any]] = {
    "fixmatch": {"threshold": 0.95, "unlabeled_weight": 1.0, "joint_forward": True},
    "flexmatch": {"threshold": 0.95, "unlabeled_weight": 1.0, "joint_forward": True},
    "freematch": {"method_decay": 0.999, "unlabeled_weight": 1.0, "joint_forward": True},
    "softmatch": {"method_decay": 0.999, "unlabeled_weight": 1.0, "joint_forward": True},
    "uda": {"threshold": 0.8, "temperature": 0.4, "unlabeled_weight": 1.0, "joint_forward": True},
    "mixmatch": {"temperature": 0.5, "unlabeled_weight": 100.0, "joint_forward": False, **_TWO_WEAK_VIEWS},
    "meanteacher": {"method_decay": 0.99, "unlabeled_weight": 50.0, **_TWO_WEAK_VIEWS},
    "pimodel": {"unlabeled_weight": 10.0, "joint_forward": True, **_TWO_WEAK_VIEWS},
    # One view is trained on; the strong one, the preset's, is for gradient consistency.
    "temporalensembling": {
        "method_decay": 0.6, "unlabeled_weight": 30.0, "unlabeled_ratio": 1, "unlabeled_ramp": RAMP_SHARE,
    },
    "pseudolabel": {"threshold": 0.95, "unlabeled_weight": 1.0, "unlabeled_ratio": 1, "unlabeled_ramp": RAMP_SHARE},
    "supervised": {},
}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"unlabeled_ramp": 5000, "unlabeled_ratio": 7, "strong": "randaugment"},
    "fixmatch": {"unlabeled_ramp": 0, "unlabeled_ratio": 7, "strong": "fixmatch"},
    "demo": {"unlabeled_ramp": 100, "unlabeled_ratio": 3, "strong": "fixmatch"},
}


def method_defaults(method: str, preset: str, steps: int) -> dict[str, Any]:
    """Values of the options that depend on the method."""
    values = PRESETS[preset] | METHODS.get(method, {})
    if values["unlabeled_ramp"] == RAMP_SHARE:
        share = int(RAMP_SHARE * steps)
        values["unlabeled_ramp"] = min(MIXMATCH_RAMP, share) if method == "mixmatch" else share
    return values

"""Options of every class with values that they cannot have: each is a ConfigError that names the option."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gradconsist import GGCRWrapper, GradientConsistencyLoss, RandomProjection, methods
from gradconsist.diagnostics import memory_report, sharpness, top_eigenvalue
from gradconsist.errors import ConfigError
from gradconsist.optim import SAM
from gradconsist.regularizers import JacobianPenalty

NAN, INF = float("nan"), float("inf")
X, Y = torch.linspace(-1, 1, 30).view(6, 5), torch.arange(6) % 3


def model() -> nn.Module:
    return nn.Linear(5, 3)


def method(name: str) -> Callable[..., Any]:
    return lambda **options: getattr(methods, name)(model(), **options)


def loss(**options: Any) -> Any:
    return GradientConsistencyLoss(model(), **options)


TAKES: dict[str, Callable[..., Any]] = {
    "loss": loss,
    "wrapper": lambda **options: GGCRWrapper(lambda batch: None, loss(), **options),
    "projection": RandomProjection,
    "Jacobian": lambda **options: JacobianPenalty(model(), **options),
    "memory": lambda **options: memory_report(loss(), (X, X + 0.1, Y), **options),
    "sharpness": lambda **options: sharpness(model(), X, Y, **options),
    "eigenvalue": lambda **options: top_eigenvalue(model(), X, Y, **options),
    "SAM": lambda **options: SAM(torch.optim.SGD(model().parameters(), lr=0.1), **options),
    **{name: method(name) for name in methods.__all__},
}
REMOVED = "which was removed: .* cost more .*'kronecker'.*'gaussian'"
WITHOUT = "does not go with `{}"

#: Who takes the options, the options, and words of the message.
OPTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("loss", {"engine": "lop"}, "'lop': choose.*mean 'loop'"),
    ("loss", {"engine": 3}, "engine"),
    ("loss", {"engine": None}, "engine"),
    ("loss", {"min_norm": 0.0}, "`min_norm` is 0.0: give .*1e-18"),
    ("loss", {"min_norm": -1e-8}, "min_norm"),
    ("loss", {"min_norm": NAN}, "min_norm"),
    ("loss", {"min_norm": "small"}, "min_norm"),
    ("loss", {"chunk_size": 0}, "chunk_size"),
    ("loss", {"chunk_size": -1}, "chunk_size"),
    ("loss", {"chunk_size": 2.5}, "`chunk_size` is 2.5: give an int"),
    ("loss", {"chunk_size": True}, "chunk_size"),
    ("loss", {"chunk_size": "all"}, "chunk_size"),
    ("loss", {"max_pairs": 0}, "max_pairs"),
    ("loss", {"max_pairs": 1.5}, "max_pairs"),
    ("loss", {"max_pairs": True}, "max_pairs"),
    ("loss", {"batchnorm": "train"}, "batchnorm"),
    ("loss", {"dropout": True}, "dropout"),
    ("loss", {"stop_gradient": "both"}, "stop_gradient"),
    ("loss", {"reduction": "avg"}, "reduction"),
    ("loss", {"reduction": "none"}, "fused"),
    ("loss", {"fused": "yes"}, "fused"),
    ("loss", {"loss_fn": 3}, "loss_fn"),
    ("loss", {"through_statistics": "yes"}, "`through_statistics` is 'yes'"),
    ("loss", {"through_statistics": True, "batchnorm": "running"}, WITHOUT.format("batchnorm='running'`")),
    ("loss", {"through_statistics": True, "batchnorm": "observed"}, WITHOUT.format("batchnorm='observed'`")),
    ("loss", {"through_statistics": True, "dropout": "on"}, WITHOUT.format("dropout='on'`: only joint statistics")),
    *[
        ("loss", {"projection": value}, r"`projection` is .*: pass RandomProjection\(dim, kind, seed=\.\.\.\), or")
        for value in (0, "kronecker", RandomProjection, RandomProjection(2).projector())
    ],
    ("wrapper", {"weight": -0.1}, "`weight` is -0.1: give .*least 0"),
    ("wrapper", {"weight": NAN}, "`weight` is nan: give a finite number"),
    ("wrapper", {"weight": INF}, "weight"),
    ("wrapper", {"weight": "0.1"}, "weight"),
    ("wrapper", {"warmup_steps": -1}, "warmup_steps"),
    ("wrapper", {"warmup_steps": 1.5}, "warmup_steps"),
    ("wrapper", {"ramp_steps": -1}, "ramp_steps"),
    ("wrapper", {"every": 0}, "every"),
    ("wrapper", {"every": 2.0}, "every"),
    ("wrapper", {"every": True}, "every"),
    ("wrapper", {"gate": "some"}, "gate"),
    ("wrapper", {"pair_fn": 3}, "pair_fn"),
    ("projection", {"dim": 0}, "`dim` is 0: give an int of at least 1"),
    ("projection", {"dim": 2.0}, "`dim` is 2.0: give an int"),
    ("projection", {"dim": True}, "`dim` is True: give an int"),
    ("projection", {"dim": 2, "kind": "gausian"}, "`kind` is 'gausian': choose one of .*Did you mean 'gaussian'"),
    ("projection", {"dim": 2, "kind": None}, "`kind` is None: choose one of 'kronecker', 'gaussian'"),
    ("projection", {"dim": 2, "kind": "rademacher"}, f"'rademacher', {REMOVED}"),
    ("projection", {"dim": 2, "kind": "sparse"}, f"'sparse', {REMOVED}"),
    ("projection", {"dim": 2, "seed": -1}, "`seed` is -1: give an int of at least 0 and at most 9223372036854775807"),
    ("projection", {"dim": 2, "seed": 2**63}, "`seed` is 9223372036854775808: give an int"),
    ("projection", {"dim": 2, "seed": None}, "`seed` is None: give an int"),
    ("projection", {"dim": 2, "resample_every": -1}, "`resample_every` is -1: give an int of at least 0"),
    ("projection", {"dim": 2, "resample_every": 1.5}, "`resample_every` is 1.5: give an int"),
    ("Jacobian", {"projections": 0}, "`projections` is 0"),
    ("Jacobian", {"projections": 1.5}, "`projections` is 1.5"),
    ("Jacobian", {"output_fn": 3}, "`output_fn` is 3"),
    ("Jacobian", {"batchnorm": "observed"}, "`batchnorm` is 'observed'"),
    ("Jacobian", {"seed": -1}, "`seed` is -1"),
    ("memory", {"every": (0,)}, "`every` is 0"),
    ("memory", {"chunk_sizes": (0,)}, "`chunk_size` is 0"),
    ("memory", {"engines": ("gost",)}, "`engine` is 'gost'"),
    ("memory", {"max_bytes": -1}, "`max_bytes` is -1"),
    ("memory", {"max_seconds": -1}, "`max_seconds` is -1"),
    ("memory", {"stop_gradient": ("both",)}, "`stop_gradient` is 'both'"),
    ("sharpness", {"rho": -1}, "`rho` is -1"),
    ("sharpness", {"ascent_steps": 0}, "`ascent_steps` is 0"),
    ("sharpness", {"batchnorm": "observed"}, "`batchnorm` is 'observed'"),
    ("sharpness", {"chunk_size": 0}, "`chunk_size` is 0"),
    ("sharpness", {"loss_fn": 3}, "`loss_fn` is 3"),
    ("eigenvalue", {"max_steps": 0}, "`max_steps` is 0"),
    ("eigenvalue", {"tolerance": 0}, "`tolerance` is 0"),
    ("SAM", {"rho": -1}, "`rho` is -1"),
    ("SAM", {"adaptive": "yes"}, "`adaptive` is 'yes'"),
    ("SAM", {"model": "net"}, "`model` is a str"),
    ("FixMatch", {"threshold": -0.1}, "threshold"),
    ("FixMatch", {"threshold": 1.1}, "threshold"),
    ("FixMatch", {"threshold": NAN}, "threshold"),
    ("FixMatch", {"unlabeled_weight": -1.0}, "unlabeled_weight"),
    ("FixMatch", {"unlabeled_ramp_steps": -1}, "unlabeled_ramp_steps"),
    ("FixMatch", {"brier_weight": -0.5}, "brier_weight"),
    ("FlexMatch", {"samples": 0}, "`samples` is 0"),
    ("FlexMatch", {"samples": 5, "threshold": 1.5}, "`threshold` is 1.5"),
    ("FlexMatch", {"samples": 5, "threshold_warmup": 1}, "`threshold_warmup` is 1"),
    ("FlexMatch", {"samples": 5, "joint": "yes"}, "`joint` is 'yes'"),
    ("FlexMatch", {"samples": 5, "unlabeled_weight": -1}, "`unlabeled_weight` is -1"),
    ("FreeMatch", {"classes": 0}, "`classes` is 0"),
    ("FreeMatch", {"classes": 3, "ema_decay": 1.5}, "`ema_decay` is 1.5"),
    ("FreeMatch", {"classes": 3, "fairness_weight": -1}, "`fairness_weight` is -1"),
    ("FreeMatch", {"classes": 3, "threshold_range": (0.9, 0.8)}, r"`threshold_range` is \(0.9, 0.8\)"),
    ("FreeMatch", {"classes": 3, "joint": None}, "`joint` is None"),
    ("SoftMatch", {"classes": True}, "`classes` is True"),
    ("SoftMatch", {"classes": 3, "ema_decay": -0.1}, "`ema_decay` is -0.1"),
    ("SoftMatch", {"classes": 3, "width": -1}, "`width` is -1"),
    ("SoftMatch", {"classes": 3, "align": 0}, "`align` is 0"),
    ("SoftMatch", {"classes": 3, "joint": None}, "`joint` is None"),
    ("UDA", {"threshold": -0.1}, "`threshold` is -0.1"),
    ("UDA", {"temperature": 0.0}, "`temperature` is 0.0"),
    ("UDA", {"annealing": "cubic", "annealing_steps": 3}, "`annealing` is 'cubic'"),
    ("UDA", {"annealing": "log"}, "`annealing` is 'log' and `annealing_steps` 0: give both"),
    ("UDA", {"annealing_steps": 5}, "`annealing` is None and `annealing_steps` 5: give both"),
    ("UDA", {"joint": 2}, "`joint` is 2"),
    ("PseudoLabel", {"threshold": 2}, "`threshold` is 2"),
    ("PseudoLabel", {"unlabeled_ramp_steps": True}, "`unlabeled_ramp_steps` is True"),
    ("MixMatch", {"temperature": 0.0}, "`temperature` is 0.0"),
    ("MixMatch", {"alpha": -1.0}, "`alpha` is -1.0"),
    ("MixMatch", {"joint": None}, "`joint` is None"),
    ("MixMatch", {"unlabeled_ramp_steps": 1.5}, "`unlabeled_ramp_steps` is 1.5"),
    ("MeanTeacher", {"ema_decay": 1.1}, "`ema_decay` is 1.1"),
    ("MeanTeacher", {"unlabeled_weight": NAN}, "`unlabeled_weight` is nan"),
    ("PiModel", {"joint": "no"}, "`joint` is 'no'"),
    ("PiModel", {"unlabeled_ramp_steps": -1}, "`unlabeled_ramp_steps` is -1"),
    ("TemporalEnsembling", {"samples": 0, "classes": 3}, "`samples` is 0"),
    ("TemporalEnsembling", {"samples": 3, "classes": 0}, "`classes` is 0"),
    ("TemporalEnsembling", {"samples": 3, "classes": 3, "ema_decay": 1.0}, "`ema_decay` is 1.0"),
]


@pytest.mark.parametrize(("takes", "options", "match"), OPTIONS, ids=[f"{row[0]} {row[1]}" for row in OPTIONS])
def test_a_bad_option_is_named(takes: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        TAKES[takes](**options)

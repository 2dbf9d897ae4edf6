"""Options of every class with values that they cannot have: each is a ConfigError that names the option."""

from __future__ import annotations

import re
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

#: Who takes an option, what else it is given, and values that the option cannot have.
VALUES: list[tuple[str, dict[str, Any], dict[str, tuple[Any, ...]]]] = [
    ("loss", {}, {"engine": (3, None), "min_norm": (-1e-8, NAN, "small"), "chunk_size": (0, -1, True, "all"),
     "max_pairs": (0, 1.5, True), "batchnorm": ("train",), "dropout": (True,), "stop_gradient": ("both",),
     "reduction": ("avg",), "fused": ("yes",), "loss_fn": (3,), "through_statistics": ("yes",)}),
    ("wrapper", {}, {"weight": (INF, "0.1"), "warmup_steps": (-1, 1.5), "ramp_steps": (-1,), "every": (0, 2.0, True),
     "gate": ("some",)}),
    ("Jacobian", {}, {"projections": (0, 1.5), "output_fn": (3,), "batchnorm": ("observed",), "seed": (-1,)}),
    ("memory", {}, {"max_bytes": (-1,), "max_seconds": (-1,)}),
    ("sharpness", {}, {"rho": (-1,), "ascent_steps": (0,), "batchnorm": ("observed",), "chunk_size": (0,),
     "loss_fn": (3,)}),
    ("eigenvalue", {}, {"max_steps": (0,), "tolerance": (0,)}),
    ("SAM", {}, {"rho": (-1,), "adaptive": ("yes",)}),
    ("FixMatch", {}, {"threshold": (-0.1, 1.1, NAN), "unlabeled_weight": (-1.0,), "unlabeled_ramp_steps": (-1,),
     "brier_weight": (-0.5,)}),
    ("FlexMatch", {}, {"samples": (0,)}),
    ("FlexMatch", {"samples": 5}, {"threshold": (1.5,), "threshold_warmup": (1,), "joint": ("yes",),
     "unlabeled_weight": (-1,)}),
    ("FreeMatch", {}, {"classes": (0,)}),
    ("FreeMatch", {"classes": 3}, {"ema_decay": (1.5,), "fairness_weight": (-1,), "joint": (None,)}),
    ("SoftMatch", {}, {"classes": (True,)}),
    ("SoftMatch", {"classes": 3}, {"ema_decay": (-0.1,), "width": (-1,), "align": (0,), "joint": (None,)}),
    ("UDA", {}, {"threshold": (-0.1,), "temperature": (0.0,), "joint": (2,)}),
    ("PseudoLabel", {}, {"threshold": (2,), "unlabeled_ramp_steps": (True,)}),
    ("MixMatch", {}, {"temperature": (0.0,), "alpha": (-1.0,), "joint": (None,), "unlabeled_ramp_steps": (1.5,)}),
    ("MeanTeacher", {}, {"ema_decay": (1.1,), "unlabeled_weight": (NAN,)}),
    ("PiModel", {}, {"joint": ("no",), "unlabeled_ramp_steps": (-1,)}),
    ("TemporalEnsembling", {"samples": 3}, {"classes": (0,)}),
    ("TemporalEnsembling", {"samples": 3, "classes": 3}, {"ema_decay": (1.0,)}),
]  # fmt: skip

#: Others, with words of the message.
OPTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("loss", {"engine": "lop"}, "'lop': choose.*mean 'loop'"),
    ("loss", {"min_norm": 0.0}, "`min_norm` is 0.0: give .*1e-18"),
    ("loss", {"chunk_size": 2.5}, "`chunk_size` is 2.5: give an int"),
    ("loss", {"reduction": "none"}, "fused"),
    ("loss", {"through_statistics": True, "batchnorm": "running"}, WITHOUT.format("batchnorm='running'`")),
    ("loss", {"through_statistics": True, "batchnorm": "observed"}, WITHOUT.format("batchnorm='observed'`")),
    ("loss", {"through_statistics": True, "dropout": "on"}, WITHOUT.format("dropout='on'`: only joint statistics")),
    *[
        ("loss", {"projection": value}, r"`projection` is .*: pass RandomProjection\(dim, kind, seed=\.\.\.\), or")
        for value in (0, "kronecker", RandomProjection, RandomProjection(2).projector())
    ],
    ("wrapper", {"weight": -0.1}, "`weight` is -0.1: give .*least 0"),
    ("wrapper", {"weight": NAN}, "`weight` is nan: give a finite number"),
    ("wrapper", {"pair_fn": 3}, "`pair_fn` is of type int: pass a function"),
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
    ("memory", {"every": (0,)}, "`every` is 0"),
    ("memory", {"chunk_sizes": (0,)}, "`chunk_size` is 0"),
    ("memory", {"engines": ("gost",)}, "`engine` is 'gost'"),
    ("memory", {"stop_gradient": ("both",)}, "`stop_gradient` is 'both'"),
    ("SAM", {"model": "net"}, "`model` is of type str"),
    ("FreeMatch", {"classes": 3, "threshold_range": (0.9, 0.8)}, r"`threshold_range` is \(0.9, 0.8\)"),
    ("UDA", {"annealing": "cubic", "annealing_steps": 3}, "`annealing` is 'cubic'"),
    ("UDA", {"annealing": "cubic"}, "`annealing` is 'cubic': choose one of"),
    ("UDA", {"annealing": "log"}, "`annealing` is 'log' and `annealing_steps` 0: give both"),
    ("UDA", {"annealing_steps": 5}, "`annealing` is None and `annealing_steps` 5: give both"),
    ("TemporalEnsembling", {"samples": 0, "classes": 3}, "`samples` is 0"),
]


OPTIONS += [
    (takes, {**given, name: value}, rf"`{name}` is {re.escape(repr(value))}")
    for takes, given, names in VALUES
    for name, values in names.items()
    for value in values
]


@pytest.mark.parametrize(("takes", "options", "match"), OPTIONS, ids=[f"{row[0]} {row[1]}" for row in OPTIONS])
def test_a_bad_option_is_named(takes: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        TAKES[takes](**options)

"""Whether two processes train as one with the joined batch: `fixmatch_imagenet.py` on photographs, by torchrun.

    python benchmarks/imagenet_equality.py --data-dir photos --output benchmarks/results/imagenet_equality.json

With GroupNorm the weights must agree to within rounding; with BatchNorm, whose statistics are each process's own, they
do not, which shows that the comparison sees a difference. What is compared is the change of the weights by the run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from environment import write_result
from harness import Row, heading, parse, parser, setting, show
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from recipes.checkpoint import load_latest
from recipes.files import read_json
from recipes.imagenet.config import ImageNetConfig
from recipes.imagenet.networks import build_network
from recipes.processes import Processes

COLUMNS = {
    "norm": "<8",
    "steps": "4d",
    "mask_rate": "6.2f",
    "change": "10.3e",
    "difference": "10.3e",
    "relative": "10.3e",
}


def main() -> None:
    """Trains with one and with two processes, for each normalisation."""
    made = parser(__doc__)
    made.add_argument("--data-dir", required=True)
    made.add_argument("--arch", default="resnet50")
    made.add_argument("--image-size", type=int, default=64)
    made.add_argument("--steps", type=int, default=4)
    made.add_argument("--norms", nargs="+", default=["group", "batch"])
    options = parse(made, arch="resnet18", steps=2)
    rows: list[Row] = []
    heading(COLUMNS)
    for norm in options.norms:
        rows.append(_compare(options, norm))
        show([rows[-1]], COLUMNS)
        if options.output:
            used = setting(options, "arch", "image_size", "steps")
            write_result(options.output, {"setting": used, "rows": rows})


def _compare(options: Any, norm: str) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        finals = [_train(options, norm, world, Path(folder) / str(world)) for world in (1, 2)]
        classes = len(read_json(Path(folder) / "1" / "split.json")["classes"])
    torch.manual_seed(0)
    alone = Processes(0, 1, 1, torch.device("cpu"))
    model = build_network(ImageNetConfig(arch=options.arch, norm=norm), classes, alone)  # type: ignore[arg-type]
    start = {f"method.model.{name}": p.detach() for name, p in model.named_parameters()}
    (one, mask), (two, _) = finals
    change = _norm({name: one[name] - start[name] for name in start})
    difference = _norm({name: one[name] - two[name] for name in start})
    return {
        "norm": norm, "steps": options.steps, "mask_rate": mask, "change": change, "difference": difference,
        "relative": difference / change,
    }  # fmt: skip


def _norm(parts: dict[str, Tensor]) -> float:
    return float(torch.cat([part.double().flatten() for part in parts.values()]).norm())


def _train(options: Any, norm: str, world: int, output: Path) -> tuple[dict[str, Tensor], float]:
    """Weights at the end, and the share of pairs that counted in the last step."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command = [sys.executable, *launcher, str(ROOT / "examples" / "fixmatch_imagenet.py"), "--output", str(output)]
    given = {
        "data-dir": options.data_dir, "arch": options.arch, "image-size": options.image_size,
        "steps": options.steps + 1,
        "norm": norm, "batch-size": 2, "unlabeled-ratio": 2, "threshold": 0.03, "unlabeled-ramp": 0, "lr": 0.001,
        "lr-warmup": 1, "ggcr-warmup": 1, "crop-scale": 0.3, "workers": 0, "device": "cpu", "log-every": 1,
    }  # fmt: skip
    command += [part for name, value in given.items() for part in (f"--{name}", str(value))]
    command += ["--stop-after-steps", str(options.steps)]  # a run's last step would be followed by a test on all images
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads or 1), "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(command, check=True, env=environment)
    state = load_latest(output / "checkpoints")
    assert state is not None
    last = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return state["method"], float(json.loads(last)["mask_rate"])


if __name__ == "__main__":
    main()

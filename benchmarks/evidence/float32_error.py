"""How far is float32 off float64 on whole networks, and why?

    python benchmarks/evidence/float32_error.py --threads 1 --output benchmarks/results/float32_error.json
    python benchmarks/evidence/float32_error.py --quick      # two small networks, two seeds; nothing to quote

Freshly initialised networks in train mode, default options, the encoder compared, argmax pseudo-labels. The reference
is the tests' oracle, a float64 loop over samples that shares no code with the library. Held against it, over several
seeds (of weights and images):

    library   the default engine in float32
    loop      the plain loop in float32 (engine="loop"): one sample at a time, by torch's own derivatives

ReLU, LeakyReLU and max pooling have a derivative that jumps. Where float32 rounds an input to the other side of a jump
(a flip), it gives the derivative of a neighbouring linear piece of the network, whatever the engine. So both are
measured a second time with the *choices held*: the side of every activation and the position of every maximum are taken
from a float64 forward and given to the network as inputs. What is left then is rounding. Flips are counted in one
float32 forward of all weak and strong images; which ones flip differs from forward to forward.

Images are crops of scikit-learn's two photographs, or normal noise. The exit status is 1 if the library, with choices
held, is off by more than the contract's bounds (2e-5 and 2e-4).
"""

from __future__ import annotations

import copy
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

_HERE = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(_HERE / folder) for folder in ("benchmarks/shared", "benchmarks/cost", "tests", "examples")]
from environment import write_result
from harness import Row, flat_gradient, heading, parse, parser, show
from models import has_batchnorm, spec
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradconsist import GradientConsistencyLoss
from support.compare import TOLERANCE, cosine_error, relative
from support.oracle import Judge

NETWORKS = ("wrn-28-2", "mlp", "wrn-10-1", "wrn-10-2", "wrn-28-2 SiLU", "resnet-18", "vit-tiny", "wrn-28-2 noise")
PAIRS = {"resnet-18": 4, "vit-tiny": 4, "wrn-28-2 SiLU": 4}  # 12 otherwise
COLUMNS = {
    "network": "<15", "choices": "9d", "flips": "6.1f",
    "library_cosine_worst": "8.1e", "library_gradient_worst": "8.1e",
    "loop_cosine_worst": "8.1e", "loop_gradient_worst": "8.1e",
    "library_held_cosine_worst": "8.1e", "library_held_gradient_worst": "8.1e",
    "loop_held_cosine_worst": "8.1e", "loop_held_gradient_worst": "8.1e",
}  # fmt: skip


class Choices(TorchFunctionMode):
    """Notes which side activations are on and which position maxima have; or takes them from what was noted.

    Args:
        given: what an earlier forward noted, in the order of the calls; None to note it.
        limit: of the notes; later calls are left alone.
    """

    def __init__(self, given: tuple[Tensor, ...] | None = None, limit: int | None = None) -> None:
        super().__init__()
        self.noted: list[Tensor] = []
        self._limit = limit
        self._given = None if given is None else list(given)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if len(self.noted) == self._limit:
            return func(*args, **kwargs)
        if func in (F.relu, F.leaky_relu):
            x = args[0]
            slope = args[1] if len(args) > 1 else kwargs.get("negative_slope", 0.01)
            positive = self._choice(lambda: x > 0)
            return torch.where(positive, x, (0.0 if func is F.relu else slope) * x)
        if func is torch.max_pool2d:
            kwargs = {name: value for name, value in kwargs.items() if name != "return_indices"}
            where = self._choice(lambda: torch.max_pool2d_with_indices(*args, **kwargs)[1])  # type: ignore[attr-defined]
            return args[0].flatten(2).gather(2, where.flatten(2)).view_as(where)
        return func(*args, **kwargs)

    def _choice(self, make: Any) -> Tensor:
        if self._given is not None:
            return self._given.pop(0)
        self.noted.append(make())
        return self.noted[-1]


class Held(nn.Module):
    """A network whose choices are inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, *choices: Tensor) -> Tensor:
        """Logits [B, K]."""
        with Choices(choices):
            return self.model(x)


@dataclass
class Task:
    """A network and pairs of images."""

    model: Any
    weak: Tensor
    strong: Tensor
    target: Tensor

    def choices(self) -> list[Tensor]:
        """Of one forward of all weak and strong images in float64."""
        model = copy.deepcopy(self.model).double()
        with torch.no_grad(), Choices() as choices:
            model(torch.cat([self.weak, self.strong]).double())
        return choices.noted

    def flips(self, exact: list[Tensor]) -> int:
        """Choices of a float32 forward of all images that differ from these.

        With BatchNorm it is the library's own first one, whose convolutions it uses again.
        """
        with torch.no_grad(), Choices(limit=len(exact)) as choices:
            if has_batchnorm(self.model):
                gc = GradientConsistencyLoss(self.model, encoder=self.model.encoder)
                gc.measure(self.weak, self.strong, self.target)
            else:
                self.model(torch.cat([self.weak, self.strong]))
        return sum(int((a != b).sum()) for a, b in zip(exact, choices.noted, strict=True))


def task(name: str, seed: int) -> Task:
    """A fresh network and its images."""
    torch.manual_seed(seed)
    arch, _, variant = name.partition(" ")
    described, pairs = spec(arch), PAIRS.get(name, 12)
    model = described.build().train()
    if variant == "SiLU":
        _replace_activations(model)
    shape = described.shape()
    if variant == "noise" or len(shape) == 1:
        weak = torch.randn(pairs, *shape)
        strong = weak + 0.5 * torch.randn_like(weak)
    else:
        weak = photographs(pairs, shape[-1])
        strong = 1.2 * weak.flip(3) + 0.1 * torch.randn_like(weak)
    with torch.no_grad():
        target = copy.deepcopy(model)(weak).argmax(1)
    return Task(model, weak, strong, target)


def _replace_activations(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.LeakyReLU):
                setattr(module, name, nn.SiLU())


def photographs(count: int, size: int) -> Tensor:
    """Random crops of three times the size, scaled down and normalised, [count, 3, size, size]."""
    from sklearn.datasets import load_sample_images

    both = [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255.0 for image in load_sample_images().images]
    crops = []
    for number in range(count):
        image, side = both[number % 2], 3 * size
        top, left = (int(torch.randint(length - side, ())) for length in image.shape[1:])
        crops.append(F.avg_pool2d(image[:, top : top + side, left : left + side], 3))
    images = torch.stack(crops)
    return (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)


def one_seed(name: str, seed: int) -> dict[str, float]:
    """Errors of one draw of weights and images."""
    given = task(name, seed)
    pairs = len(given.target)
    views = given.weak, given.strong, given.target
    exact = Judge(given.model, *views, compared=_in_encoder).verdict()
    found: dict[str, float] = {}

    def measure(suffix: str, model: nn.Module, *views: Any) -> None:
        for name, engine in (("library", "auto"), ("loop", "loop")):
            gc = GradientConsistencyLoss(model, encoder=given.model.encoder, engine=engine)
            gc(*views).backward()
            assert gc.last is not None
            found[f"{name}{suffix}_cosine"] = cosine_error(gc.last.cosine, exact.cosine)
            found[f"{name}{suffix}_gradient"] = relative(flat_gradient(model), exact.flat)
            model.zero_grad()

    measure("", given.model, *views)
    choices = given.choices()
    weak, strong = ([each[rows] for each in choices] for rows in (slice(pairs), slice(pairs, None)))
    measure("_held", Held(given.model), (given.weak, *weak), (given.strong, *strong), given.target)
    return {"choices": sum(each.numel() for each in choices), "flips": given.flips(choices), **found}


def _in_encoder(name: str) -> bool:
    return "encoder." in name


def row(name: str, seeds: list[dict[str, float]]) -> Row:
    """Median and worst over seeds."""
    made: Row = {"network": name, "pairs": PAIRS.get(name, 12), "choices": seeds[0]["choices"]}
    made["flips"] = statistics.mean(seed["flips"] for seed in seeds)
    for key in seeds[0]:
        if key not in ("choices", "flips"):
            values = [seed[key] for seed in seeds]
            made |= {f"{key}_median": statistics.median(values), f"{key}_worst": max(values)}
    bounds = dict(zip(("cosine", "gradient"), TOLERANCE[torch.float32], strict=True))
    for kind in ("library", "loop"):
        within = [all(seed[f"{kind}_{part}"] <= bound for part, bound in bounds.items()) for seed in seeds]
        made[f"{kind}_within_bounds"] = sum(within)
    return made | {"seeds": seeds}


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--seeds", type=int, default=4, help="draws of weights and images of each network")
    made.add_argument("--networks", nargs="+", default=list(NETWORKS), help="as in benchmarks/cost/models.py")
    options = parse(made, seeds=2, networks=["mlp", "wrn-10-1"])
    bounds = TOLERANCE[torch.float32]
    setting = {"seeds": options.seeds, "quick": options.quick, "dtype": "float32", "bounds": bounds}
    rows: list[Row] = []
    heading(COLUMNS)
    for name in options.networks:
        rows.append(row(name, [one_seed(name, seed) for seed in range(options.seeds)]))
        show(rows[-1:], COLUMNS)
        if options.output:
            write_result(options.output, {"setting": setting, "rows": rows})
    keys = ("library_held_cosine_worst", "library_held_gradient_worst")
    return int(any(each[key] > bound for each in rows for key, bound in zip(keys, bounds, strict=True)))


if __name__ == "__main__":
    sys.exit(main())

"""How many kernels a step launches and how often its host waits for a number, with and without the term.

    python benchmarks/cost/host_work.py --output benchmarks/results/host_work.json

On a GPU a step of a small model takes as long as its host needs to launch kernels, whatever they compute. Here they are
counted, on any device, by the line of the library that launches them (`tests/support/host_work.py`). The second call is
counted, since the first one also tries the model. The whole batch is one chunk.

The steps are the split FixMatch step, the same with the term, with both losses from one pass (models without
BatchNorm), with the term of four pairs (`max_pairs`) and with one view held constant (`stop_gradient`). Each row has
the floating point operations of convolutions and matrix products too, over those of a forward of the unlabeled pairs'
one view ("forwards").
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in ("benchmarks/shared", "tests")]
from environment import write_result
from harness import Row, heading, parse, parser, setting, show
from models import CLASSES, Classifier, TransformerBlock, has_batchnorm, spec
from steps import PLAIN, WEIGHT, make_batch

from gradconsist import GGCRWrapper, GradientConsistencyLoss, SSLBatch
from gradconsist._forward import statistics
from gradconsist.methods import FixMatch
from support.host_work import HostWork, by_line

MODELS = ("wrn-28-2", "wrn-28-2-gn", "resnet-18", "vit-tiny", "bert")
ONE_PASS = "both from one pass"
VARIANTS: dict[str, dict[str, Any]] = {
    "with the term": {},
    ONE_PASS: {},
    "max_pairs=4": {"max_pairs": 4},
    "stop_gradient='weak'": {"stop_gradient": "weak"},
}
COLUMNS = {"model": "<12", "variant": "<24", "kernels": "8d", "ratio": "6.1f", "reads": "6d", "forwards": "9.2f"}
WORDS, LENGTH = 1000, 32


class TextEncoder(nn.Module):
    """BERT with four small layers: words and positions, transformer blocks, the first word's vector."""

    def __init__(self, features: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, features), nn.Embedding(LENGTH, features)
        self.norm = nn.LayerNorm(features)
        self.blocks = nn.Sequential(*(TransformerBlock(features, heads=4) for _ in range(depth)))

    def forward(self, ids: Tensor) -> Tensor:
        """Word ids [B, T] to features [B, D]."""
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.blocks(self.norm(self.words(ids) + self.positions(places)))[:, 0]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--models", nargs="+", default=MODELS, help="see benchmarks/cost/models.py, and 'bert'")
    made.add_argument("--labeled", type=int, default=8)
    made.add_argument("--pairs", type=int, default=56)
    made.add_argument("--lines", type=int, default=25, help="how many lines to print and keep per step")
    options = parse(made, models=["mlp", "bert"], labeled=1, pairs=8)
    statistics._PART_BYTES = 2**62  # on a CPU, large convolutions of the statistics' forward run in parts
    rows: list[Row] = []
    heading(COLUMNS)
    for name in options.models:
        torch.manual_seed(0)
        model, batch = _problem(name, options)
        with HostWork() as one, torch.no_grad():
            model(batch.weak)
        plain = None
        for variant, chosen in {PLAIN: None, **VARIANTS}.items():
            if variant == ONE_PASS and has_batchnorm(model):
                continue
            row = _counted(model, batch, chosen, options.lines, one_pass=variant == ONE_PASS)
            row |= {"model": name, "variant": variant}
            plain = plain or row["kernels"]
            row["ratio"] = row["kernels"] / plain
            row["forwards"] = row.pop("operations") / one.operations
            rows.append(row)
            show([row], COLUMNS)
    if options.output:
        write_result(options.output, {"setting": setting(options, "labeled", "pairs"), "rows": rows})


def _problem(name: str, options: Any) -> tuple[nn.Module, SSLBatch]:
    if name != "bert":
        model = spec(name).build().to(options.device)
        return model, make_batch(name, options.labeled, options.pairs, device=options.device)
    weak = torch.randint(WORDS, (options.pairs, LENGTH))
    strong = torch.where(torch.rand(weak.shape) < 0.2, torch.randint(WORDS, weak.shape), weak)
    x, y = torch.randint(WORDS, (options.labeled, LENGTH)), torch.randint(CLASSES, (options.labeled,))
    batch = SSLBatch(*(tensor.to(options.device) for tensor in (x, y, weak, strong)))
    return Classifier(TextEncoder(), 128).to(options.device), batch


def _counted(model: nn.Module, batch: SSLBatch, options: dict[str, Any] | None, lines: int, *, one_pass: bool) -> Row:
    """The second step's kernels, reads and floating point operations."""
    method = FixMatch(model, threshold=0.0, joint=False)
    term = wrapper = None
    if options is not None:
        term = GradientConsistencyLoss(model, encoder=model.encoder, engine="ghost", chunk_size=None, **options)  # type: ignore[arg-type]
        wrapper = GGCRWrapper(method, term, weight=WEIGHT, warmup_steps=0, share=True) if one_pass else None

    def step() -> None:
        model.zero_grad()
        if wrapper is not None:
            wrapper(batch).loss.backward()
            return
        out = method(batch)
        (out.loss if term is None else out.loss + WEIGHT * term(*out.pair)).backward()

    step()
    with HostWork() as work:
        step()
    return {
        "kernels": sum(work.kernels.values()),
        "reads": sum(work.reads.values()),
        "operations": work.operations,
        "kernels_by_line": dict(list(by_line(work.kernels).items())[:lines]),
        "reads_by_line": by_line(work.reads),
        "reason": None,
    }


if __name__ == "__main__":
    main()

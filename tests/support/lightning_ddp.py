"""Two gloo processes under Lightning's own DDP strategy, in float64; prints a word for each case that holds.

Run as a program: Lightning forks it, which is quick, and safe where no thread runs yet.  Batches and references are
those of `support.ddp`: the gradient by hand and by the oracle, and a run in one process on the joined batches.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from gradconsist import GradientConsistencyLoss, StepOutput, ViewPair
from gradconsist.adapters import lightning as adapter
from support import ddp, training
from support.ddp import Spec
from support.lightning_modules import Module, fit, loader, same

os.environ["GLOO_SOCKET_IFNAME"] = "lo"
torch.set_num_threads(1)
warnings.simplefilter("ignore")  # Lightning's advice on loaders


class Ranks(Module):
    """One rank's share of `spec`; every rank sees that all of them end with the same parameters."""

    def __init__(self, spec: Spec, *, manual: bool, save: Path | None = None) -> None:
        super().__init__(manual=manual)
        self.model, self.spec, self.save = ddp.build(spec).method.model, spec, save
        self.first: dict[str, Any] = {}

    def output(self, batch: Any) -> Any:
        loss, label, mask = training.plain_fixmatch(self.model, batch, ddp.THRESHOLD)
        return StepOutput(loss, ViewPair(batch.weak, batch.strong, label, mask))

    def train_dataloader(self) -> Any:
        return loader([ddp.batch(self.spec, self.global_rank, number) for number in range(self.spec.steps)])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.spec.lr)

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(1 + self.global_rank)  # before a checkpoint is loaded
        self.handle.wrapper.consistency.load_state_dict({"generator": generator.get_state()})

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.global_step == 0 and not self.spec.loss:
            expected = ddp.judge(self.spec)
            found = {f"method.{name}": parameter.grad for name, parameter in self.named_parameters()}
            check("gradient", ddp.error(found, expected) <= 1e-10)

    def on_train_end(self) -> None:
        check("steps", self.handle.step == self.spec.steps * self.trainer.max_epochs)
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters()])
        check("ranks agree", bool((self.all_gather(flat) == flat).all()))
        if self.save:
            self.trainer.save_checkpoint(self.save)


def check(what: str, holds: bool) -> None:
    if not holds:
        raise RuntimeError(f"{what}: does not hold")


def run(spec: Spec, *, manual: bool, epochs: int = 1, save: Path | None = None, resume: Path | None = None) -> Any:
    module = Ranks(spec, manual=manual, save=save)
    loss = GradientConsistencyLoss(module.model, **spec.loss)
    module.handle = adapter.attach(module, loss, weight=0.5, warmup_steps=0)
    options = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    fit(module, None, epochs, resume=resume, **options)
    return module.state_dict()


def main() -> None:
    for manual in (False, True):
        spec = Spec(2, steps=4)
        expected = ddp.alone(spec)["parameters"]
        found = {f"method.{name}": value for name, value in run(spec, manual=manual).items()}
        check("parameters", all(torch.allclose(found[n], p, rtol=0, atol=1e-12) for n, p in expected.items()))
        print("manual" if manual else "automatic")
    spec = Spec(2, steps=3, loss={"max_pairs": 1})
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "half.ckpt"
        whole = run(spec, manual=False, epochs=2)
        half = run(spec, manual=False, save=place)
        drawn = torch.load(place, weights_only=True)[adapter.CHECKPOINT_KEY]["consistency"]
        check("two generators", len(drawn) == 2 and not torch.equal(*(state["generator"] for state in drawn)))
        resumed = run(spec, manual=False, epochs=2, resume=place)
        check("resumed", same(resumed, whole) and not same(half, whole))
    print("resumed")


if __name__ == "__main__":
    main()

"""Checkpoints, several processes, and algorithms that do not train: on real algorithms of semilearn."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gradconsist import GradientConsistencyLoss
from gradconsist.adapters.usb import UsbHandle, attach
from gradconsist.errors import LossContractError
from support import usb
from support.compare import relative
from support.processes import Processes


def attached(name: str, **config: Any) -> tuple[Any, UsbHandle]:
    """With a random subset of the pairs, so that the loss draws from its generator."""
    algorithm = usb.build(name, **config)
    consistency = GradientConsistencyLoss(algorithm.model, max_pairs=3)
    return algorithm, attach(algorithm, consistency, weight=0.5, warmup_steps=2, every=2)


def run(algorithm: Any, steps: range) -> list[Tensor]:
    losses = []
    for step in steps:
        torch.manual_seed(step)
        numpy.random.seed(step)
        losses.append(usb.step(algorithm, usb.batch_of(step))[0]["loss"].detach())
    return losses


@pytest.mark.parametrize("name", ["fixmatch", "flexmatch", "freematch", "softmatch", "meanteacher"])
def test_a_run_resumed_from_semilearns_checkpoint_is_bitwise_the_same(name: str, tmp_path: Path) -> None:
    whole, _ = attached(name)
    run(whole, range(3))
    whole.it -= 1  # semilearn saves inside the step, and writes it + 1
    whole.save_model("latest.pth", str(tmp_path))
    whole.it += 1
    expected = run(whole, range(3, 7))

    resumed, handle = attached(name, seed=5)
    torch.rand(3)
    with usb.without_gpu():
        resumed.load_model(str(tmp_path / "latest.pth"))
    resumed.ema.load(resumed.ema_model)  # as semilearn's EMAHook does with --resume
    assert handle.wrapper.step == resumed.it == 3
    for mine, other in zip(run(resumed, range(3, 7)), expected, strict=True):
        assert torch.equal(mine, other)
    for mine, other in zip(resumed.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(mine, other)


def test_checkpoints_with_and_without_a_term(tmp_path: Path) -> None:
    plain = usb.build("fixmatch")
    plain.it = 6
    plain.save_model("plain.pth", str(tmp_path))
    algorithm, handle = attached("fixmatch")
    algorithm.it = 3
    algorithm.save_model("term.pth", str(tmp_path))
    with usb.without_gpu():
        plain.load_model(str(tmp_path / "term.pth"))  # an algorithm without a term takes one with it
        algorithm.load_model(str(tmp_path / "plain.pth"))
    assert plain.it == 4
    assert handle.wrapper.step == algorithm.it == 7  # the schedule goes on where the run does
    handle.detach()
    assert attached_late(algorithm).wrapper.step == 7


def attached_late(algorithm: Any) -> UsbHandle:
    return attach(algorithm, GradientConsistencyLoss(algorithm.model))


# -- several processes -------------------------------------------------------------------------------------------------


def gradient(rank: int, world: int, name: str, distributed: bool, p_cutoff: float) -> dict[str, Tensor]:
    """Of one step with the term on this rank's batch; by DDP as semilearn sets it up, or of this process alone."""
    warnings.simplefilter("ignore")
    usb.semilearn()
    algorithm = usb.build(name, p_cutoff=p_cutoff)
    model = algorithm.model
    if distributed:
        algorithm.model = DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
        with usb.without_gpu():
            algorithm.call_hook("before_run")
    attach(algorithm, GradientConsistencyLoss(model), weight=0.5, warmup_steps=0)
    algorithm.it = 5
    numpy.random.seed(rank)
    torch.manual_seed(rank)
    with usb.without_gpu():
        out, _ = algorithm.train_step(**algorithm.process_batch(**usb.batch_of(rank)))
    out["loss"].backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.timeout(200)
def test_two_processes_reduce_the_gradient_of_the_sum() -> None:
    """semilearn wraps the model, not the step: the term runs on the module inside, and one backward reduces both.

    Its network has a BatchNorm whose output it drops, which DistributedDataParallel takes as finished beforehand.
    """
    with Processes(2, timeout=180) as ranks:
        for name, p_cutoff in (("fixmatch", 0.0), ("fixmatch", 1.0), ("meanteacher", 0.0), ("mixmatch", 0.0)):
            together = ranks.run(gradient, name, True, p_cutoff)
            alone = ranks.run(gradient, name, False, p_cutoff)
            assert "block1.layer.0.conv1.weight" in together[0]
            for key in alone[0]:
                mean = (alone[0][key] + alone[1][key]) / 2
                first, second = (rank.get(key, torch.zeros_like(mean)) for rank in together)
                assert torch.equal(first, second)
                assert relative(first, mean) < 1e-5, (name, key)


# -- canaries ----------------------------------------------------------------------------------------------------------


def test_an_unlabeled_loss_without_gradient_is_named() -> None:
    """The head of semilearn's repository computes MeanTeacher's from the teacher's logits alone."""
    algorithm = usb.build("meanteacher")
    consistency_loss = algorithm.consistency_loss
    algorithm.consistency_loss = lambda logits, *args, **kwargs: consistency_loss(logits.detach(), *args, **kwargs)
    attach(algorithm, GradientConsistencyLoss(algorithm.model))
    with pytest.raises(LossContractError, match=r"unlabeled loss of MeanTeacher has no gradient.*semilearn==0.3.2"):
        usb.step(algorithm, usb.batch_of(0))


@pytest.mark.parametrize("hooks", [True, False])
def test_a_loop_without_the_update_hook_is_named(hooks: bool) -> None:
    """The head of semilearn's repository leaves the hooks out of `Trainer.fit`, and nothing trains."""
    algorithm = usb.build("fixmatch")
    attach(algorithm, GradientConsistencyLoss(algorithm.model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(14):
            with usb.without_gpu():
                batch = algorithm.process_batch(**usb.batch_of(step))
                algorithm.out_dict, algorithm.log_dict = algorithm.train_step(**batch)
                if hooks and step % 4 == 3:  # one update from four batches
                    algorithm.call_hook("after_train_step")
    found = [str(each.message) for each in caught if "has not changed" in str(each.message)]
    assert len(found) == (0 if hooks else 1)
    assert hooks or "not changed in 10 steps: the algorithm's ParamUpdateHook is never called" in found[0]

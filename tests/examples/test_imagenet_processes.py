"""The ImageNet trainer on two gloo processes: equal to one, resumed bitwise, restarted by torchrun."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support import imagenet_workers as workers
from support.processes import Processes, under_torchrun
from support.runs import MakeConfig, differing, final
from trainer.config import Config
from trainer.errors import ResumeError
from trainer.training import run
from trainer.weights import load_model


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    with Processes(2, timeout=240) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def three() -> Iterator[Processes]:
    with Processes(3, timeout=240) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def whole(two: Processes, photographs_at: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an uninterrupted run of two processes, each with BatchNorm and random pairs of its own."""
    folder = tmp_path_factory.mktemp("whole")
    assert two.run(workers.train, photographs_at(folder, ggcr_max_pairs=2)) == [0, 0]
    return folder / "run"


def test_what_processes_tell_each_other(two: Processes) -> None:
    first, second = two.run(workers.collectives)
    assert (first[0], second[0]) == (slice(0, 3), slice(3, 6))
    assert (first[-1], second[-1]) == (0, 1)
    assert first[1:-1] == second[1:-1]
    assert first[1:-1] == [
        [3.0, 4.0], 1, {"a": "0.5", "b": "4.0", "c": "nan"}, [[0], [1]], [0.0, 0.0], b"from first", b"", {"rank": 0},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("world", "feed", "norm"),
    [
        (2, "stream", "group"), (2, "memory", "group"), (3, "stream", "group"), (3, "memory", "sync"),
        (2, "stream", "sync"), (2, "stream", "batch"),
    ],
)  # fmt: skip
def test_processes_train_as_one_with_the_joined_batch(
    two: Processes, three: Processes, photographs: MakeConfig, world: int, feed: str, norm: str
) -> None:
    """All but BatchNorm's statistics where each process has its own: the control of the comparison."""
    changes: dict[str, Any] = {"batch_size": 2 * world, "feed": feed, "norm": norm}
    changes |= {"ggcr_weight": 0.0} if norm == "sync" else {}
    alone = photographs("alone", **changes | {"norm": norm.replace("sync", "batch")})
    both = photographs("both", **changes)
    assert run(alone) == 0
    assert (two if world == 2 else three).run(workers.train, both) == [0] * world
    one, other = final(str(alone.output)), final(str(both.output))
    names = [name for name in one if name.startswith((".method.", ".average.")) and torch.is_tensor(one[name])]
    names = [name for name in names if one[name].is_floating_point()]
    a, b = (torch.cat([state[name].flatten() for name in names]) for state in (one, other))
    error = float((a - b).norm() / a.norm())
    assert error > 1e-4 if norm == "batch" else error < 1e-6
    if norm == "sync":
        assert load_model(str(both.output))[1]["norm"] == "sync"
    if norm != "batch":
        records = [Path(str(c.output), "metrics.jsonl").read_text().splitlines() for c in (alone, both)]
        for mine, theirs in zip(*records, strict=True):
            expected = json.loads(mine)
            found = json.loads(theirs)
            assert found.pop("kind") == expected.pop("kind")
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_a_stopped_run_of_two_processes_continues_bitwise(two: Processes, photographs: MakeConfig, whole: Path) -> None:
    config = photographs("cut", ggcr_max_pairs=2)
    assert two.run(workers.stop_one, config) == [0, 0]  # one is told to, and both stop
    assert final(str(config.output))[".step"] == 2
    with pytest.raises(ResumeError, match=r"holds a run of 2 processes, and there are 1 now: .*--elastic"):
        run(config)
    assert two.run(workers.train, config) == [0, 0]
    assert differing(whole, str(config.output)) == []


def test_random_states_of_each_process_are_in_the_checkpoint(
    two: Processes, photographs: MakeConfig, whole: Path
) -> None:
    config = photographs("cut", ggcr_max_pairs=2)
    assert two.run(workers.train, dataclasses.replace(config, stop_after_steps=2)) == [0, 0]
    assert two.run(workers.train_forgetting, config) == [0, 0]
    assert differing(whole, str(config.output)) != []


def test_an_elastic_run_goes_on_with_another_number(two: Processes, photographs: MakeConfig) -> None:
    config = photographs(stop_after_steps=2)
    assert run(config) == 0
    assert two.run(workers.train, dataclasses.replace(config, elastic=True, stop_after_steps=None)) == [0, 0]
    assert final(str(config.output))[".step"] == 4


def test_a_step_that_is_not_finite_on_one_process_stops_both(two: Processes, photographs: MakeConfig) -> None:
    config = photographs()
    first, second = two.run(workers.train_with_nan, config)
    assert first == ("OtherProcessError", "process 1 failed")
    assert second[0] == "NonFiniteLossError"
    assert second[1].startswith("step 2: the ")
    assert final(str(config.output))[".step"] == 2


def test_machines_must_have_the_same_files(
    two: Processes, photographs: MakeConfig, photo_folder: Callable[..., Path]
) -> None:
    config = photographs()
    other = photo_folder("others", train={"ant": 12, "bee": 12, "cat": 12}, val={"ant": 1, "bee": 1, "cat": 1})
    (kind, message), second = two.run(workers.train_elsewhere, config, [config.data_dir, str(other)])
    assert (kind, second[0]) == ("ResumeError", "OtherProcessError")
    assert message.startswith("process 1 lists other files in --data-dir")
    missing, (kind, message) = two.run(workers.train_elsewhere, config, [config.data_dir, "nowhere"])
    assert missing == ("OtherProcessError", "process 1 failed")
    assert message.startswith("--data-dir nowhere is not a directory")
    assert not Path(str(config.output)).exists()


def test_torchrun_restarts_killed_processes_from_the_checkpoint(photographs: MakeConfig, whole: Path) -> None:
    config = photographs("killed", ggcr_max_pairs=2)
    assert under_torchrun(2, 1, workers.train_killed, config) == 0
    assert Path(str(config.output), "killed").exists()
    assert differing(whole, str(config.output)) == []

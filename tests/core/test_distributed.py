"""Several processes: DDP(GGCRWrapper(...)) on gloo ranks against one process on the joined batch, in float64.

Where processes cannot start, these tests fail: none of them would say anything with one process.  The whole matrix is
`python tests/slow/distributed.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support import ddp, ddp_workers
from support.ddp import Spec
from support.processes import Processes, RankError

BOUND = 1e-10
Parameters = dict[str, Tensor]


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    with Processes(2) as ranks:
        yield ranks


def assert_gradients(ranks: Processes, spec: Spec) -> list[dict[str, Any]]:
    """What all ranks got, whose first gradient is that of one process on the joined batch."""
    expected, found = ddp.judge(spec), ranks.run(ddp.train, spec)
    assert all(ddp.error(rank["gradient"], expected) <= BOUND for rank in found), spec
    return found


def same(first: Parameters, second: Parameters) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# -- the harness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("worker", "message"),
    [
        ("failing", "rank 1 of 2 failed:(.|\n)*ValueError: seen in a test"),
        ("dying", "rank 1 of 2 failed:\nit ended without a word"),
        ("silent", r"no answer within 4 s from rank \[0, 1\]"),
    ],
)
def test_a_rank_that_fails_dies_or_hangs_fails_the_test(worker: str, message: str) -> None:
    with Processes(2) as ranks:
        assert ranks.run(ddp_workers.ready) == [0, 1]  # importing torch may take its time
        ranks.timeout = 4
        started = time.monotonic()
        with pytest.raises(RankError, match=message):
            ranks.run(getattr(ddp_workers, worker))
        assert time.monotonic() - started < 30


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "graph"])
@pytest.mark.parametrize("engine", ["ghost", "loop"])
def test_gradients_are_those_of_one_process(two: Processes, engine: str, fused: bool) -> None:
    ranks = assert_gradients(two, Spec(loss={"engine": engine, "fused": fused}))
    assert all(any(rank["compared"][0]) for rank in ranks)


@pytest.mark.parametrize("name", list(ddp.gradient_cases(2))[1:])
def test_gradients_in_every_form(two: Processes, name: str) -> None:
    spec = ddp.gradient_cases(2)[name]
    for number, rank in enumerate(assert_gradients(two, spec)):
        assert any(map(any, rank["compared"])) == (number not in spec.empty)
        assert rank["step"] == spec.accumulate  # every call counts, under no_sync too


@pytest.mark.parametrize("world", [3, 4])
def test_gradients_of_three_and_four_processes(world: int) -> None:
    cases = ddp.gradient_cases(world)
    chosen = "as it is", "no_sync", "empty mask on the last rank", "uneven, one ratio", "uneven, unlabeled only"
    with Processes(world) as ranks:
        for name in chosen:
            assert_gradients(ranks, cases[name])


def test_uneven_batches_without_weights_give_the_mean_of_the_ranks_means(two: Processes) -> None:
    """What DDP does with any loss: a sample on a smaller rank counts for more."""
    spec = replace(ddp.gradient_cases(2)["uneven, one ratio"], share="none")
    expected = ddp.mean([ddp.judge(spec, [rank]) for rank in range(2)])
    for rank in two.run(ddp.train, spec):
        assert ddp.error(rank["gradient"], expected) <= BOUND
        assert ddp.error(rank["gradient"], ddp.judge(spec)) > 1e-2


def test_a_rank_with_fewer_batches_under_join(two: Processes) -> None:
    spec = Spec(model="batchnorm in eval mode")
    long, short = two.run(ddp_workers.joined_ranks, spec, (2, 1))
    assert ddp.error(long[0], ddp.judge(spec)) <= BOUND
    assert ddp.error(short[0], ddp.judge(spec)) <= BOUND
    alone = {name: g / 2 for name, g in ddp.judge(replace(spec, first=1), [0]).items()}  # over all ranks that began
    assert ddp.error(long[1], alone) <= BOUND


def test_a_layer_without_use_needs_the_search_where_there_is_a_graph(two: Processes) -> None:
    """As with any loss; the fused form names every parameter and does without."""
    spec = Spec(model="layer without use", steps=2)
    assert_gradients(two, spec)
    with pytest.raises(RankError, match="Expected to have finished reduction in the prior iteration"):
        two.run(ddp.train, replace(spec, loss={"fused": False}))


@pytest.mark.parametrize("empty", [(), (1,)], ids=["pairs on all ranks", "an empty rank"])
@pytest.mark.parametrize(("fused", "unused"), [(True, False), (True, True), (False, True)])
def test_a_bias_without_derivative(two: Processes, fused: bool, unused: bool, empty: tuple[int, ...]) -> None:
    """pytorch issue 47562: DDP's search for unused parameters starts from the wrapper's loss, not a model's output.

    The loss is the term alone, so that an empty rank has nothing but the term's zero to take part with.
    """
    spec = Spec(empty=empty)
    expected = ddp_workers.judge_bias_model(spec)
    assert not expected["method.model.2.bias"].any()
    assert expected["method.model.0.bias"].any()
    for gradient in two.run(ddp_workers.bias_model, spec, "wrapper", fused, unused):
        assert ddp.error(gradient, expected) <= BOUND


def test_the_other_order_loses_the_reduction_in_silence(two: Processes) -> None:
    """Why a model that is inside DDP already is refused: the control of the test above."""
    spec = Spec()
    expected = ddp_workers.judge_bias_model(spec)
    found = two.run(ddp_workers.bias_model, spec, "model", False, True)
    assert max(ddp.error(gradient, expected) for gradient in found) > 1e-2


# -- BatchNorm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("joint", [True, False], ids=["one forward", "two forwards"])
def test_batchnorm_in_train_mode_uses_each_ranks_statistics(two: Processes, joint: bool) -> None:
    """The gradient is the mean of the ranks' own ones, as with DDP around any model with BatchNorm."""
    spec = Spec(model="batchnorm", method={"joint": joint})
    expected = ddp.mean([ddp.judge(spec, [rank]) for rank in range(2)])
    for rank in two.run(ddp.train, spec):
        assert ddp.error(rank["gradient"], expected) <= BOUND
        assert ddp.error(rank["gradient"], ddp.judge(spec)) > 1e-2  # not those of the joined batch


def test_buffers_are_those_of_the_methods_forward(two: Processes) -> None:
    """Rank 0's, handed on at the start of a step, and each rank's own batch after it: nothing of the term's."""
    spec = Spec(model="batchnorm", steps=3, lr=0.0)
    model = ddp.build(spec).method.model
    before: Parameters = {}
    for number in range(spec.steps):
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        batch = ddp.batch(spec, 0, number)
        model(torch.cat([batch.x, batch.weak, batch.strong]))
    for number, rank in enumerate(two.run(ddp.train, spec)):
        model.load_state_dict(before, strict=False)
        batch = ddp.batch(spec, number, spec.steps - 1)
        model(torch.cat([batch.x, batch.weak, batch.strong]))
        assert same(rank["buffers"], {f"method.model.{name}": buffer for name, buffer in model.named_buffers()})


def test_synchronized_batchnorm_is_refused(two: Processes) -> None:
    for message in two.run(ddp_workers.synchronized_batchnorm):
        assert "`model.norm` is a SyncBatchNorm in train mode among 2 processes" in message


# -- many steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"weight": 0.0}, {"warmup_steps": 10}], ids=["weight 0", "warm-up"])
@pytest.mark.parametrize("model", ["batchnorm", "dropout"])
def test_without_the_term_every_bit_is_the_methods(two: Processes, model: str, options: dict[str, float]) -> None:
    spec = Spec(model=model, steps=4, wrapper=options)
    for ours, plain in zip(two.run(ddp.train, spec), two.run(ddp.train, spec, True), strict=True):
        assert same(ours["gradient"], plain["gradient"])
        assert same(ours["parameters"], plain["parameters"])
        assert same(ours["buffers"], plain["buffers"])


def test_fifty_steps(two: Processes) -> None:
    spec = Spec(steps=50)
    first, second = two.run(ddp.train, spec)
    assert same(first["parameters"], second["parameters"])
    assert ddp.error(first["parameters"], ddp.alone(spec)["parameters"]) <= BOUND


def test_fifty_steps_with_chance_of_each_ranks_own(two: Processes) -> None:
    chance = {"max_pairs": 2, "dropout": "on"}
    first, second = two.run(ddp.train, Spec(model="dropout", steps=50, loss=chance, rank_seeds=True))
    assert same(first["parameters"], second["parameters"])
    assert first["compared"] != second["compared"]


def test_a_term_that_comes_and_goes_in_a_static_graph(two: Processes) -> None:
    spec = Spec(steps=6, wrapper={"warmup_steps": 2, "every": 2, "ramp_steps": 2}, ddp={"static_graph": True})
    expected = ddp.alone(spec)["parameters"]
    for rank in two.run(ddp.train, spec):
        assert rank["weights"] == [0.0, 0.0, 0.5, 0.0, 1.0, 0.0]
        assert rank["step"] == 6
        assert ddp.error(rank["parameters"], expected) <= BOUND


# -- chance and state --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False], ids=["a seed each", "one seed"])
def test_max_pairs_draws_on_each_rank(two: Processes, own: bool) -> None:
    """At most so many pairs a rank; with one seed for all, every rank draws the same positions."""
    spec = Spec(unlabeled=8, method={"threshold": 0.0}, loss={"max_pairs": 2}, rank_seeds=own, steps=4, lr=0.0)
    ranks = two.run(ddp.train, spec)
    assert all(sum(row) == 2 for rank in ranks for row in rank["compared"])
    assert (ranks[0]["compared"] == ranks[1]["compared"]) != own
    own_gradients = []
    for number in range(2):
        wrapper = ddp.build(spec, number)
        wrapper(ddp.batch(spec, number, 0)).loss.backward()
        own_gradients.append(ddp.gradients(wrapper))
    for rank in ranks:
        assert ddp.error(rank["gradient"], ddp.mean(own_gradients)) <= BOUND


def test_resume_continues_each_ranks_draws(two: Processes) -> None:
    """Bitwise, if every rank keeps the state of its own loss; rank 0's for all would make them draw alike."""
    spec = Spec(unlabeled=8, method={"threshold": 0.0}, loss={"max_pairs": 2}, rank_seeds=True, steps=6)
    whole = two.run(ddp.train, spec)
    half = two.run(ddp.train, replace(spec, steps=3))
    states = tuple(rank["state"] for rank in half)
    assert states[0].keys() == states[1].keys()
    rest = replace(spec, steps=3, first=3, start=states)
    for resumed, never_stopped in zip(two.run(ddp.train, rest), whole, strict=True):
        assert same(resumed["parameters"], never_stopped["parameters"])
        assert resumed["compared"] == never_stopped["compared"][3:]
        assert resumed["step"] == 6
    alike = two.run(ddp.train, replace(rest, start=states[:1]))
    assert alike[0]["compared"] == alike[1]["compared"]


@pytest.mark.parametrize("world", [1, 3])
def test_resume_at_another_number_of_processes(two: Processes, world: int) -> None:
    """The same global batch, dealt to more ranks or fewer: the run goes on as if nothing had happened."""
    spec = Spec(labeled=3, unlabeled=6, steps=4)
    first = two.run(ddp.train, replace(spec, steps=2))[0]["state"]
    there = Spec(world, labeled=6 // world, unlabeled=12 // world, steps=2, first=2, start=(first,))
    if world == 1:
        found = [ddp.alone(there)]
    else:
        with Processes(world) as ranks:
            found = ranks.run(ddp.train, there)
    expected = ddp.alone(spec)
    for rank in found:
        assert rank["step"] == 4
        assert ddp.error(rank["parameters"], expected["parameters"]) <= BOUND


# -- errors ------------------------------------------------------------------------------------------------------------


def test_an_error_on_one_rank_ends_all_and_names_it(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(
        torch.multiprocessing.ProcessRaisedException, match=r"Process 1 terminated(.|\n)*NonFiniteError"
    ):
        torch.multiprocessing.start_processes(
            ddp_workers.one_has_nan, args=(2, str(tmp_path)), nprocs=2, start_method="forkserver"
        )
    assert time.monotonic() - started < 60


def test_ranks_skip_a_step_together(two: Processes) -> None:
    spec = Spec(steps=4, wrapper={"every": 2})
    first, second = two.run(ddp_workers.skip_together, spec, 2)
    assert first["skipped"] == second["skipped"] == [2]
    assert first["steps"] == second["steps"] == (3, 3)
    assert same(first["parameters"], second["parameters"])

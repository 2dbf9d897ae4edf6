import numpy as np
import pytest

from trainer.streams import EndlessOrder, Stream, permutation, raw, uniform


def test_draws_are_a_function_of_their_address_alone() -> None:
    first = uniform(3, Stream.WEAK_VIEW, 41, 5, 2)
    uniform(3, Stream.WEAK_VIEW, 40, 500, 2)
    np.random.seed(1)
    assert np.array_equal(first, uniform(3, Stream.WEAK_VIEW, 41, 5, 2))


@pytest.mark.parametrize("other", [(4, Stream.WEAK_VIEW, 41), (3, Stream.STRONG_VIEW, 41), (3, Stream.WEAK_VIEW, 42)])
def test_seed_stream_and_position_each_matter(other: tuple[int, Stream, int]) -> None:
    mine, theirs = raw(3, Stream.WEAK_VIEW, 41, 200), raw(*other, 200)
    assert not np.isin(mine, theirs).any()  # not even shifted: positions do not overlap


def test_raw_output_is_pinned() -> None:
    # A change here would silently give every published seed another split.
    assert raw(0, Stream.SPLIT, 0, 2).tolist() == [213000021201967259, 4455796210202625458]


def test_uniform_stays_in_its_interval_and_fills_it() -> None:
    draws = uniform(0, Stream.WEAK_VIEW, 0, 1000, 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert np.allclose(draws.mean(0), 0.5, atol=0.05)


def test_each_epoch_is_a_permutation_of_its_own() -> None:
    order = EndlessOrder(0, Stream.UNLABELED_ORDER, 30)
    first, second = order.draws(0, 30), order.draws(30, 30)
    assert sorted(first) == sorted(second) == list(range(30))
    assert first.tolist() != second.tolist()
    assert np.array_equal(second, permutation(0, Stream.UNLABELED_ORDER, 1, 30))


def test_draws_do_not_depend_on_how_they_are_cut() -> None:
    whole = EndlessOrder(1, Stream.LABELED_ORDER, 7).draws(0, 60)
    backwards = EndlessOrder(1, Stream.LABELED_ORDER, 7)
    parts = [backwards.draws(start, 5) for start in range(55, -1, -5)][::-1]
    assert np.array_equal(whole, np.concatenate(parts))


def test_40_items_serve_batches_of_64() -> None:
    batch = EndlessOrder(0, Stream.LABELED_ORDER, 40).draws(64 * 10, 64)
    assert len(batch) == 64
    assert set(batch.tolist()) == set(range(40))

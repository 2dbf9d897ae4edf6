from __future__ import annotations

import pytest
import torch

from support.runs import MakeConfig
from trainer.config import Config, resolve
from trainer.datasets import Images
from trainer.loader import StepDataset, StepImages, ToModel, step_batches, worker_count
from trainer.split import draw_split


def dataset_of(images: Images, config: Config) -> StepDataset:
    return StepDataset(images, draw_split(images, 12, config.seed), resolve(config))


def same(a: StepImages, b: StepImages) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
# Python 3.12 warns where a process with threads forks; torch's loader does that by design.
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("strong", ["fixmatch", "randaugment"])
def test_workers_do_not_change_a_bit(random_images: Images, tiny: MakeConfig, strong: str) -> None:
    dataset = dataset_of(random_images, tiny(strong=strong))
    state = torch.get_rng_state()
    alone = list(step_batches(dataset, 3, 9, workers=0, pin=False))
    assert torch.equal(torch.get_rng_state(), state)
    together = list(step_batches(dataset, 3, 9, workers=2, pin=False))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(alone) == len(together) == 6
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


def test_a_step_does_not_depend_on_where_the_loading_started(random_images: Images, tiny: MakeConfig) -> None:
    config = tiny(strong="fixmatch")
    later = next(step_batches(dataset_of(random_images, config), 7, 8, workers=0, pin=False))
    assert same(later, list(step_batches(dataset_of(random_images, config), 0, 8, workers=0, pin=False))[7])


def test_labeled_images_come_from_the_labeled_split_with_their_labels(random_images: Images, tiny: MakeConfig) -> None:
    random_images.train_x[:] = torch.arange(60, dtype=torch.uint8)[:, None, None, None]  # each image is its number
    dataset = dataset_of(random_images, tiny(strong="fixmatch", batch_size=12))
    step = dataset[0]
    assert sorted(step.x[:, 0, 0, 0].tolist()) == dataset.labeled.tolist()
    assert torch.equal(step.y, random_images.train_y[step.x[:, 0, 0, 0].long()])
    assert torch.equal(step.weak[:, 0, 0, 0].long(), step.indices)


def test_the_strong_view_may_be_a_second_weak_one(random_images: Images, tiny: MakeConfig) -> None:
    random_images.train_x[:] = torch.arange(60, dtype=torch.uint8)[:, None, None, None]  # a crop changes nothing
    step = dataset_of(random_images, tiny(strong="weak"))[0]
    assert torch.equal(step.weak, step.strong)
    noise = torch.Generator().manual_seed(1)
    random_images.train_x[:] = torch.randint(256, random_images.train_x.shape, generator=noise, dtype=torch.uint8)
    step = dataset_of(random_images, tiny(strong="weak"))[0]
    assert not torch.equal(step.weak, step.strong)  # by draws of its own


def test_views_of_a_step_belong_together(random_images: Images, tiny: MakeConfig) -> None:
    dataset = dataset_of(random_images, tiny(strong="fixmatch", batch_size=4, unlabeled_ratio=3))
    step = dataset[2]
    assert step.x.shape == (4, 32, 32, 3)
    assert step.weak.shape == step.strong.shape == (12, 32, 32, 3)
    assert torch.equal(step.truth, random_images.train_y[step.indices])


def test_every_step_and_every_seed_has_views_of_its_own(random_images: Images, tiny: MakeConfig) -> None:
    random_images.train_x[:] = random_images.train_x[0]  # one image everywhere: only the views can differ
    steps = [
        dataset_of(random_images, tiny(strong="fixmatch", seed=seed, unlabeled_ratio=1))[step]
        for seed, step in ((0, 2), (0, 3), (1, 2))
    ]
    views = [view for step in steps for view in (step.x, step.weak, step.strong)]
    assert len({view.numpy().tobytes() for view in views}) == 9


def test_two_draws_of_one_image_in_a_batch_are_two_views(random_images: Images, tiny: MakeConfig) -> None:
    dataset = dataset_of(random_images, tiny(batch_size=24, unlabeled_ratio=1, strong="fixmatch"))
    step = dataset[0]
    assert len({x.numpy().tobytes() for x in step.x}) > 12  # 12 labeled images, each drawn twice


def test_supervised_prepares_no_unlabeled_images(random_images: Images, tiny: MakeConfig) -> None:
    step = dataset_of(random_images, tiny(method="supervised"))[0]
    assert len(step.weak) == len(step.strong) == len(step.indices) == 0
    assert len(step.x) == 4


@pytest.mark.parametrize("channels_last", [False, True])
def test_normalisation(random_images: Images, channels_last: bool) -> None:
    mean, deviation = random_images.channel_statistics
    to_model = ToModel(mean, deviation, torch.device("cpu"), channels_last=channels_last)
    x = to_model.images(random_images.train_x)
    assert x.shape == (60, 3, 32, 32)
    assert x.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5)


def test_a_constant_channel_stays_finite(random_images: Images) -> None:
    random_images.train_x[..., 1] = 7
    mean, deviation = random_images.channel_statistics
    x = ToModel(mean, deviation, torch.device("cpu"), channels_last=False).images(random_images.train_x)
    assert torch.isfinite(x).all()


def test_worker_count_is_as_given_or_what_the_cores_leave() -> None:
    assert worker_count(Config(workers=0)) == 0
    assert worker_count(Config(workers=3)) == 3
    assert 0 <= worker_count(Config()) <= 4

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import RandAugment

from trainer import augment
from trainer.augment import (
    GREY,
    OPERATIONS,
    STRONG_DRAWS,
    autocontrast,
    equalize,
    fixmatch_policy,
    randaugment_policy,
    strong_view,
    weak_view,
)

Pixels = np.ndarray


def some_images(number: int = 6, side: int = 32) -> Pixels:
    source = np.random.Generator(np.random.Philox(2))
    smooth = source.integers(40, 200, size=(number, 4, 4, 3)).repeat(side // 4, 1).repeat(side // 4, 2)
    return (smooth + source.integers(-30, 30, size=smooth.shape)).astype(np.uint8)


def draws(number: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.Generator(np.random.Philox(seed)).random((number, columns))


def test_weak_view_is_mirror_then_reflection_padded_crop() -> None:
    images, row = some_images(1), np.array([[0.2, 0.0, 0.999]])  # mirrored, shifted by -4 rows and +4 columns
    padded = np.pad(images[0][:, ::-1], ((4, 4), (4, 4), (0, 0)), mode="reflect")
    assert np.array_equal(weak_view(images, row, flip=True)[0], padded[0:32, 8:40])


def test_weak_view_without_flip_never_mirrors() -> None:
    images = some_images(1)
    centre = np.array([[0.2, 0.5, 0.5]])
    assert np.array_equal(weak_view(images, centre, flip=False), images)
    assert np.array_equal(weak_view(images, centre, flip=True), images[:, :, ::-1])


def test_weak_shifts_cover_plus_and_minus_four() -> None:
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8)[None, :, None, None], (500, 32, 32, 3))
    shifts = weak_view(ramp, draws(500, 3), flip=False)[:, 16, 0, 0].astype(int) - 16
    assert sorted(set(shifts.tolist())) == list(range(-4, 5))


@pytest.mark.parametrize("side", [8, 32, 64])
@pytest.mark.parametrize("policy", ["fixmatch", "randaugment"])
def test_strong_view_keeps_shape_and_type_and_is_a_function_of_its_draws(policy: str, side: int) -> None:
    images, rows = some_images(6, side), draws(6, STRONG_DRAWS)
    state = torch.get_rng_state()
    first = strong_view(images, rows, policy, flip=True)
    torch.rand(3)
    assert first.shape == images.shape
    assert first.dtype == np.uint8
    assert np.array_equal(first, strong_view(images, rows, policy, flip=True))
    assert not np.array_equal(first, strong_view(images, draws(6, STRONG_DRAWS, 1), policy, flip=True))
    # image by image as well: no image's view depends on its neighbours
    assert np.array_equal(first[2:3], strong_view(images[2:3], rows[2:3], policy, flip=True))
    torch.set_rng_state(state)
    strong_view(images, rows, policy, flip=True)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("side", [8, 32, 64])
def test_randaugment_is_torchvisions(side: int) -> None:
    """On enough images that each of its fourteen operations occurs, with either sign."""
    images, rows = some_images(150, side), draws(150, 10)
    for image, row, mine in zip(images, rows, randaugment_policy(images, rows), strict=True):
        torch.manual_seed(int(row[0] * 2**53))
        assert np.array_equal(mine, np.asarray(RandAugment(2, 10)(Image.fromarray(image))))


def test_fixmatch_policy_draws_all_operations_half_the_time_with_magnitudes_one_to_nine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[str, int, int]] = []

    def spy(name: str):
        return lambda image, magnitude, sign: calls.append((name, magnitude, sign)) or image

    monkeypatch.setattr(augment, "OPERATIONS", {name: spy(name) for name in OPERATIONS})
    fixmatch_policy(some_images(1, 8).repeat(4000, 0), draws(4000, 10))
    assert {name for name, _, _ in calls} == set(OPERATIONS)
    assert len(OPERATIONS) == 14
    assert {magnitude for _, magnitude, _ in calls} == set(range(1, 10))
    assert {sign for _, _, sign in calls} == {1, -1}
    assert len(calls) == pytest.approx(4000, rel=0.05)  # two draws, each with probability one half


def test_cutout_is_always_applied_and_clipped() -> None:
    black = np.zeros((300, 32, 32, 3), dtype=np.uint8)
    rows = draws(300, 10)
    rows[:, [1, 5]] = 0.9  # no operation
    grey = (fixmatch_policy(black, rows) == GREY).all(-1).sum((1, 2))
    assert grey.max() == 16 * 16
    assert grey.min() >= 8 * 8


@pytest.mark.parametrize("function", [autocontrast, equalize])
def test_lookup_operations_are_pillows(function) -> None:
    reference = getattr(ImageOps, function.__name__)
    flat = np.full((1, 32, 32, 3), 90, dtype=np.uint8)
    two = flat.copy()
    two[0, :4] = 10
    for pixels in (*some_images(8), *some_images(3, 8), flat[0], two[0]):
        image = Image.fromarray(pixels)
        assert np.array_equal(np.asarray(function(image)), np.asarray(reference(image)))


def apply(name: str, pixels: Pixels, magnitude: int, sign: int = 1) -> Pixels:
    return np.asarray(OPERATIONS[name](Image.fromarray(pixels), magnitude, sign))


@pytest.mark.parametrize(("magnitude", "bits"), [(1, 4), (3, 3), (5, 2), (9, 1)])
def test_posterize_keeps_four_to_one_bits(magnitude: int, bits: int) -> None:
    pixels = some_images(1)[0]
    assert np.array_equal(apply("posterize", pixels, magnitude), pixels & (0xFF << (8 - bits) & 0xFF))


@pytest.mark.parametrize(("magnitude", "threshold"), [(1, 231), (5, 128), (9, 26)])
def test_solarize_inverts_from_its_threshold_on(magnitude: int, threshold: int) -> None:
    pixels = some_images(1)[0]
    assert np.array_equal(apply("solarize", pixels, magnitude), np.where(pixels < threshold, pixels, 255 - pixels))


@pytest.mark.parametrize(("side", "magnitude", "shift"), [(32, 9, 9), (32, 1, 1), (8, 9, 2), (64, 9, 18)])
def test_translation_is_in_proportion_and_fills_with_grey(side: int, magnitude: int, shift: int) -> None:
    pixels = some_images(1, side)[0]
    moved = apply("translate_x", pixels, magnitude)
    assert np.array_equal(moved[:, : side - shift], pixels[:, shift:])
    assert (moved[:, side - shift :] == GREY).all()
    other = apply("translate_y", pixels, magnitude, -1)
    assert np.array_equal(other[shift:], pixels[: side - shift])
    assert (other[:shift] == GREY).all()


def test_brightness_spans_028_to_172() -> None:
    pixels = np.full((32, 32, 3), 100, dtype=np.uint8)
    assert apply("brightness", pixels, 1)[0, 0, 0] == 28
    assert apply("brightness", pixels, 9)[0, 0, 0] == 172


def test_rotation_reaches_27_degrees() -> None:
    pixels = some_images(1)[0]
    expected = Image.fromarray(pixels).rotate(-27, fillcolor=GREY)
    assert np.array_equal(apply("rotate", pixels, 9, -1), np.asarray(expected))


def test_shear_moves_by_03_of_the_height_at_most() -> None:
    white = np.full((32, 32, 3), 255, dtype=np.uint8)
    grey = (apply("shear_x", white, 9) == GREY).all(-1).sum(1)  # filled columns per row
    assert grey.max() == pytest.approx(0.27 * 32, abs=1)
    assert grey.min() <= 1

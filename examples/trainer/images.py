"""Image files as RGB pixels of eight bits: every depth, mode and orientation comes out right or is refused."""

from __future__ import annotations

import collections
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from trainer.errors import DatasetError
from trainer.files import regular_size
from trainer.runlog import duration

# What cameras write into EXIF's orientation, and how to undo it.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_ORIENTATION, _BITS, _PHOTOMETRIC, _PLANES, _SAMPLE_FORMAT = 0x0112, 258, 262, 284, 339  # tags of EXIF and TIFF
# What Pillow makes of the value 1 of a PNG's grey; the value that is transparent comes as it stands in the file.
_PNG_GREY = {"1": 255, "L;2": 85, "L;4": 17}
# A check that was not asked for may take so many seconds; its length is known after the first few.
CHECK_SECONDS, JUDGED_AFTER = 60.0, 2.0
_CHUNK = 16


def read_image(path: Path) -> Image.Image:
    """Read a file as an upright RGB image.

    Transparent pixels are shown on white. 16 bits are scaled to 8; other depths are refused, as their range is not
    known. Of several frames the first one counts.
    """
    try:
        regular_size(path)
        with Image.open(path) as opened:
            return to_rgb(opened)
    except Exception as error:  # a damaged file can fail anywhere in its format's decoder, and with any class
        raise DatasetError(f"{path} cannot be read as an image ({str(error) or type(error).__name__})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image as `read_image` returns it."""
    tags = getattr(image, "tag_v2", {})  # before loading, which may drop them
    bits, white_is_zero = int(tags.get(_BITS, (16,))[0]), tags.get(_PHOTOMETRIC) == 0
    tiles = getattr(image, "tile", None)
    raw = str(tiles[0][3]) if tiles and image.format == "PNG" else ""
    if any(kind not in (1, 4) for kind in tags.get(_SAMPLE_FORMAT, (1,))):
        raise ValueError("its pixels are floats or signed numbers, whose range is not known: save it with 8 or 16 bits")
    if tiles and tiles[0][0] == "raw" and tags.get(_PLANES) == 2 and bits != 8:
        raise ValueError(
            f"its channels of {bits} bits lie one after another, of which half is read: save it with 8 bits"
        )
    if raw.startswith("RGB;16") and "transparency" in image.info:
        raise ValueError("its transparent colour has 16 bits, of which 8 are read: save it with 8, or with alpha")
    image.load()
    orientation = _orientation(image)
    rgb = _eight_bits(image, bits, white_is_zero, _PNG_GREY.get(raw, 1))
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF says nothing, and the pixels are whole
        return 1


def _eight_bits(image: Image.Image, bits: int, white_is_zero: bool, grey_step: int) -> Image.Image:
    mode, clear = image.mode, image.info.get("transparency")
    # Pillow gives 16-bit PNG and PPM as "I" in some releases, and scales PPM to 16 bits.
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
        values, most = np.asarray(image).astype(np.int64), 2**bits - 1
        if values.min() < 0 or values.max() > most:
            raise ValueError(f"its values {values.min()} to {values.max()} are not of {bits} bits")
        grey = (values * 255 + most // 2) // most
        grey = 255 - grey if white_is_zero else grey
        if isinstance(clear, int):
            grey[values == clear] = 255
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if mode in ("I", "F") or mode.startswith("I;"):
        raise ValueError(f"its pixels are of mode {mode}, whose range is not known: save it with 8 or 16 bits")
    if isinstance(clear, int) and mode in ("1", "L"):
        pixels = np.array(image.convert("L"))
        pixels[pixels == clear * grey_step] = 255
        return Image.fromarray(pixels).convert("RGB")
    if clear is not None or mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, shorter: int, side: int) -> Image.Image:
    """Scale the shorter side to `shorter`, then cut the centre square of `side`."""
    width, height = (min(length, 16 * min(image.size)) for length in image.size)
    if (width, height) != image.size:  # a long strip, scaled as a whole, would not fit into memory
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    scale = shorter / min(width, height)
    width, height = max(side, round(width * scale)), max(side, round(height * scale))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def for_each(
    count: int, work: Callable[[int], object], *, verb: str, most_seconds: float | None = None
) -> dict[int, str]:
    """Do something with each of many files, in parallel and with a bar.

    Threads: decoding leaves Python's lock, and a slow disk answers many at a time.
    """
    bad: dict[int, str] = {}

    def some(first: int) -> None:
        for index in range(first, min(first + _CHUNK, count)):
            try:
                work(index)
            except DatasetError as error:  # noqa: PERF203 - one bad file must not hide the others
                bad[index] = str(error)

    start = said = time.monotonic()
    done, waiting = 0, collections.deque[Future[None]]()
    threads = min(32, 4 * (os.cpu_count() or 1))
    hidden = not sys.stderr.isatty()
    with ThreadPoolExecutor(threads) as pool, tqdm(total=count, desc=verb, unit="image", disable=hidden) as bar:
        try:
            for first in range(0, count, _CHUNK):
                waiting.append(pool.submit(some, first))
                while waiting and (len(waiting) > 4 * threads or first + _CHUNK >= count):
                    waiting.popleft().result()
                    bar.update(min(_CHUNK, count - done))
                    done = min(done + _CHUNK, count)
                now = time.monotonic()
                whole = (now - start) * count / max(done, 1)
                if most_seconds is not None and now - start > JUDGED_AFTER and whole > most_seconds:
                    break
                if hidden and now - said > 5:
                    said = now
                    print(f"{verb} {done:,} of {count:,} images", file=sys.stderr, flush=True)
        except BaseException:  # at a Ctrl-C, do not wait until all that is in the queue is read
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    seconds = time.monotonic() - start
    more = "" if done + _CHUNK * len(waiting) >= count else (
        f"; all of them would take about {duration(whole)}: give --check-images True for that"
    )  # fmt: skip
    done = min(count, done + _CHUNK * len(waiting))
    print(f"{verb} {done:,} of {count:,} images in {seconds:.1f} s{more}", file=sys.stderr, flush=True)
    return dict(sorted(bad.items()))


def damaged(paths: dict[Any, str]) -> DatasetError:
    """What to raise for files that cannot be read; all of them are listed on lines of their own before."""
    for reason in paths.values() if len(paths) > 1 else ():
        print(f"damaged: {reason}", file=sys.stderr)
    first = next(iter(paths.values()))
    more = f" and {len(paths) - 1} more, listed above" if len(paths) > 1 else ""
    return DatasetError(f"{first}{more}: replace or remove it, or give --skip-damaged to go on without.")

"""PNGs that name one grey or one colour as transparent, written byte by byte: Pillow itself saves 8 bits only."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from trainer.errors import DatasetError
from trainer.images import read_image


def _png(path: Path, bits: int, kind: int, values: np.ndarray, clear: bytes) -> None:
    """A PNG as the standard has it, of samples `[H, W * channels]` of so many bits with one colour as transparent."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    planes = (values[..., None] >> np.arange(bits - 1, -1, -1) & 1).reshape(len(values), -1).astype(np.uint8)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in planes)
    channels = 3 if kind == 2 else 1
    head = struct.pack(">IIBBBBB", values.shape[1] // channels, len(values), bits, kind, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"tRNS", clear) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("clear", [0, 1])
def test_the_transparent_grey_of_a_png_is_white_at_every_depth(tmp_path: Path, bits: int, clear: int) -> None:
    values = np.arange(16).reshape(4, 4) % 2**bits
    _png(tmp_path / "grey.png", bits, 0, values, struct.pack(">H", clear))
    expected = np.where(values == clear, 255, values * 255 // (2**bits - 1))
    found = np.asarray(read_image(tmp_path / "grey.png"))
    assert np.array_equal(found, np.repeat(expected[..., None], 3, 2))


def test_a_transparent_colour_is_white_and_one_of_16_bits_refused(tmp_path: Path) -> None:
    values = np.arange(12).reshape(2, 6)
    _png(tmp_path / "8.png", 8, 2, values, struct.pack(">HHH", 3, 4, 5))
    assert np.asarray(read_image(tmp_path / "8.png"))[0].tolist() == [[0, 1, 2], [255, 255, 255]]
    _png(tmp_path / "16.png", 16, 2, values * 257, struct.pack(">HHH", 771, 1028, 1285))
    with pytest.raises(DatasetError, match=r"16.png cannot be read as an image \(its transparent colour has 16 bits"):
        read_image(tmp_path / "16.png")

"""Random numbers by counter: a hash of (key, position), so that any block can be drawn at any time, in any order.

Integer arithmetic modulo 2^64 only, which every device does alike: the bits do not depend on the device, on torch's
generators or on how the positions are cut into blocks. The hash is the output function of SplitMix64 (Steele, Lea and
Flood, 2014), which passes the usual batteries of tests on consecutive counters.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1


def derive(key: int, *parts: int) -> int:
    """A key for a part of what `key` stands for.

    Args:
        key: any integer.
        *parts: non-negative integers that tell the part from others.

    Returns:
        An integer in [0, 2^64).
    """
    for part in (0, *parts):
        z = (key + (part + 1) * _GOLDEN) & _MASK
        z = ((z ^ (z >> 30)) * _FIRST) & _MASK
        z = ((z ^ (z >> 27)) * _SECOND) & _MASK
        key = z ^ (z >> 31)
    return key


def words(key: int, start: int, stop: int, device: torch.device) -> Tensor:
    """64 random bits for each of the positions start, ..., stop - 1.

    Args:
        key: from `derive`.
        start: first position.
        stop: behind the last one.
        device: where the result is.

    Returns:
        int64 [stop - start], all bits random.
    """
    z = torch.arange(start + 1, stop + 1, device=device) * _signed(_GOLDEN) + _signed(key)
    z = (z ^ _shifted(z, 30)) * _signed(_FIRST)
    z = (z ^ _shifted(z, 27)) * _signed(_SECOND)
    return z ^ _shifted(z, 31)


def signs(key: int, start: int, stop: int, width: int, device: torch.device) -> Tensor:
    """`width` independent signs for each position.

    Returns:
        int8 [stop - start, width] of -1 and 1.
    """
    per_row = -(-width // 64)
    bits = words(key, start * per_row, stop * per_row, device).view(-1, per_row, 1)
    place = torch.arange(min(width, 64), device=device)
    return (((bits >> place) & 1).to(torch.int8).flatten(1)[:, :width] * 2).sub_(1)


def normals(key: int, start: int, stop: int, width: int, device: torch.device) -> Tensor:
    """`width` independent standard normal numbers for each position, by the inverse of their distribution function.

    Returns:
        float64 [stop - start, width].
    """
    uniform = (_shifted(words(key, start * width, stop * width, device), 11).double() + 0.5) * 2.0**-53
    return torch.special.ndtri(uniform).view(-1, width)


def buckets(key: int, start: int, stop: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A random bucket and a sign for each position.

    Returns:
        int64 [stop - start] below `width`, and int8 of -1 and 1.
    """
    bits = words(key, start, stop, device)
    return (_shifted(bits, 33) * width) >> 31, ((bits & 1).to(torch.int8) * 2).sub_(1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shifted(z: Tensor, by: int) -> Tensor:
    """To the right, with zeros: torch's own shift repeats the sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)

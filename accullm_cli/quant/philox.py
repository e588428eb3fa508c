"""Philox 4x32-10: random numbers that are a function of where they are used, so that any device can repeat them.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10


def philox(counter: tuple[torch.Tensor, ...], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Four random 32-bit words for each counter.

    Args:
        counter: four int64 tensors of one shape, values below 2**32.
        key: two words below 2**32.

    Returns:
        Four int64 tensors of that shape, values below 2**32.
    """
    first, second, third, fourth = counter
    key_low, key_high = key
    for _ in range(_ROUNDS):
        high_a, low_a = _multiply(_MULTIPLIERS[0], first)
        high_b, low_b = _multiply(_MULTIPLIERS[1], third)
        first, second, third, fourth = high_b ^ second ^ key_low, low_b, high_a ^ fourth ^ key_high, low_a
        key_low, key_high = (key_low + _KEY_STEPS[0]) & _MASK, (key_high + _KEY_STEPS[1]) & _MASK
    return first, second, third, fourth


def uniform(seed: int, stream: int, columns: torch.Tensor, rows: int) -> torch.Tensor:
    """Uniform numbers in [0, 1) for the weights of some columns: float32 [len(columns), rows], multiples of 2**-24.

    The weight at (row, column) gets word row % 4 of counter (row // 4, column, stream, 0) under the key `seed`.

    Args:
        seed: below 2**64.
        stream: below 2**32; different for each linear.
        columns: int64 [C], the input features.
    """
    quads = -(-rows // 4)
    shape = (len(columns), quads)
    counter = (
        torch.arange(quads, device=columns.device).expand(shape),
        columns[:, None].expand(shape),
        torch.full(shape, stream, device=columns.device),
        torch.zeros(shape, dtype=torch.int64, device=columns.device),
    )
    words = torch.stack(philox(counter, (seed & _MASK, seed >> 32)), dim=-1).reshape(len(columns), -1)[:, :rows]
    return (words >> 8).to(torch.float32) * 2.0**-24


def _multiply(constant: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a product of two 32-bit words, without overflowing a signed 64-bit integer."""
    low_part = constant * (word & 0xFFFF)
    high_part = constant * (word >> 16) + (low_part >> 16)
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)

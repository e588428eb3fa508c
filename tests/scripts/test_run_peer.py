"""Reading back what other tools store: every format against numbers packed by hand, or by the package it comes from."""

from __future__ import annotations

import sys

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from tests.scripts.loading import load_script

script = load_script("run_peer")


def random_codes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(sum(shape)))


def random_scales(*shape: int) -> torch.Tensor:
    """Few bits, so that products with codes are exact in float32."""
    return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(sum(shape))) / 64


def word(codes: list[int]) -> int:
    """Eight codes in 32 bits, the first in the lowest, as the signed number that int32 has for them."""
    unsigned = sum(code << (4 * place) for place, code in enumerate(codes))
    return unsigned - (1 << 32) if unsigned >= 1 << 31 else unsigned


def packed(codes: torch.Tensor) -> torch.Tensor:
    """[rows, columns] to int32 [rows, columns / 8]."""
    return torch.tensor(
        [[word(row[start : start + 8]) for start in range(0, len(row), 8)] for row in codes.tolist()],
        dtype=torch.int32,
    )


def expected_weight(
    codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, group_of: list[int]
) -> list[list[float]]:
    """(code - zero) * scale, element by element: codes [N, K], zeros and scales [N, groups]."""
    rows, columns = codes.shape
    return [
        [
            (codes[n, k].item() - zeros[n, group_of[k]].item()) * scales[n, group_of[k]].item()
            for k in range(columns)
        ]
        for n in range(rows)
    ]  # fmt: skip


SHORT_LAST_GROUP = [0] * 16 + [1] * 8  # of 24 features in groups of 16


@pytest.mark.parametrize("group_of", [None, [0, 1, 1, 0] * 6])
def test_the_format_of_gptq_is_read_element_by_element(group_of: list[int] | None) -> None:
    codes, zeros, scales = random_codes(8, 24), random_codes(8, 2), random_scales(8, 2)
    zeros[0, 0] = 0  # less 1 it is stored as 15
    stored = {
        "a.b.qweight": packed(codes).T.contiguous(),
        "a.b.qzeros": packed((zeros.T - 1) % 16),
        "a.b.scales": scales.half().T.contiguous(),
        "norm.weight": torch.ones(4),
    }
    if group_of is not None:
        stored["a.b.g_idx"] = torch.tensor(group_of, dtype=torch.int32)
    weights = script.gptq_weights(stored, 16)
    assert list(weights) == ["a.b"]
    assert weights["a.b"].dtype == torch.float32
    assert weights["a.b"].tolist() == expected_weight(codes, zeros, scales, group_of or SHORT_LAST_GROUP)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_format_of_compressed_tensors_is_read_as_its_package_packs_it(symmetric: bool) -> None:
    codes, scales = random_codes(12, 24), random_scales(12, 2)
    zeros = torch.full((12, 2), 8) if symmetric else random_codes(12, 2)
    stored = {
        "a.weight_packed": pack_to_int32((codes - 8).to(torch.int8), 4),
        "a.weight_scale": scales.bfloat16(),
    }
    if not symmetric:
        stored["a.weight_zero_point"] = pack_to_int32((zeros - 8).to(torch.int8), 4, packed_dim=0).contiguous()
    weight = script.compressed_weight(stored, "a", 16)
    assert weight.tolist() == expected_weight(codes, zeros, scales, SHORT_LAST_GROUP)


def test_the_format_of_hqq_is_read_element_by_element() -> None:
    codes, zeros, scales = random_codes(6, 4), random_codes(6, 1).float() + 0.5, random_scales(6, 1)
    stored = {
        "a.W_q": torch.tensor(
            [
                [16 * high + low for high, low in zip(first, second, strict=True)]
                for first, second in zip(codes[:3].tolist(), codes[3:].tolist(), strict=True)
            ],
            dtype=torch.uint8,
        ),
        "a.zero": zeros.half(),
        "a.scale": scales.half(),
    }
    weight = script.hqq_weight(stored, "a", torch.Size((3, 8)))
    assert weight.reshape(6, 4).tolist() == expected_weight(codes, zeros, scales, [0] * 4)


def test_the_format_of_mlx_is_read_element_by_element() -> None:
    codes, scales, biases = random_codes(6, 24), random_scales(6, 2), random_scales(6, 2) - 0.5
    stored = {
        "a.weight": packed(codes).view(torch.uint32),
        "a.scales": scales.bfloat16(),
        "a.biases": biases.bfloat16(),
    }
    weight = script.mlx_weight(stored, "a", 16)
    assert weight.dtype == torch.float32
    assert weight.tolist() == [
        [codes[n, k].item() * scales[n, SHORT_LAST_GROUP[k]].item() + biases[n, SHORT_LAST_GROUP[k]].item()
         for k in range(24)]
        for n in range(6)
    ]  # fmt: skip


def quantized(weight: torch.Tensor, in_memory: torch.Tensor) -> object:
    stored = {
        "a.b.codes": torch.zeros(4, dtype=torch.int32),  # 128 bits
        "a.b.scale": torch.zeros(3, dtype=torch.float16),  # 48 bits
        "a.b.bias": torch.zeros(4),  # the original's
        "a.bc.codes": torch.zeros(100),  # of another layer
        "a.b.c.codes": torch.zeros(100),
    }
    return script.Quantized(script.Cost(1.0, 2), stored, {"a.b": weight}, {"a.b": in_memory}, {})


def test_bits_per_weight_count_every_tensor_of_the_linears_weights_and_no_other() -> None:
    weight = torch.zeros(4, 8)
    assert script.bits_per_weight(quantized(weight, weight)) == (128 + 48) / 32


def test_a_16_bit_rounding_of_the_weights_in_memory_passes() -> None:
    weight = torch.linspace(-1, 1, 32).reshape(4, 8)
    script.check(quantized(weight, weight.bfloat16()))


@pytest.mark.parametrize("wrong", [0.2, float("nan")])  # the weights' norm is 3.4
def test_weights_that_are_not_those_in_memory_end_the_run(wrong: float) -> None:
    weight = torch.linspace(-1, 1, 32).reshape(4, 8)
    read = weight.clone()
    read[2, 3] += wrong
    with pytest.raises(
        SystemExit, match=r"^a\.b: read back with an error of .*, where the weights' norm is 3\.37e\+00"
    ):
        script.check(quantized(read, weight))


def test_every_tool_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for tool in script.RUNNERS:
        monkeypatch.setattr(sys, "argv", ["run_peer.py", tool, "--model", "m", "--tokens", "t", "--out", "o"])
        options = script.parse()
        assert (options.peer, options.group_size, options.symmetric, options.iterations) == (tool, 64, False, 200)

"""Reading back what other tools store: every format against numbers packed by hand, or by the package it comes from."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file

from tests.scripts.loading import load_script
from tests.tiny import make_checkpoint

script = load_script("run_peer")
mlx_peers = load_script("mlx_peers")
peer_task = load_script("peer_task")


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


@pytest.mark.parametrize("bits", [3, 4, 5, 8])
def test_the_format_of_mlx_is_read_element_by_element(bits: int) -> None:
    """Codes of one row are one string of bits, the lowest of the first word at its start."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (6, 64), generator=generator)
    scales, biases = random_scales(6, 2), random_scales(6, 2) - 0.5
    strings = [sum(code << (bits * place) for place, code in enumerate(row)) for row in codes.tolist()]
    words = [[(string >> shift) & (2**32 - 1) for shift in range(0, 64 * bits, 32)] for string in strings]
    stored = {
        "a.weight": torch.tensor(words).to(torch.uint32),
        "a.scales": scales.bfloat16(),
        "a.biases": biases.bfloat16(),
    }
    weight = mlx_peers.mlx_weight(stored, "a", 32, bits)
    assert weight.dtype == torch.float32
    assert weight.tolist() == [
        [codes[n, k].item() * scales[n, k // 32].item() + biases[n, k // 32].item() for k in range(64)]
        for n in range(6)
    ]  # fmt: skip


@pytest.mark.skipif(find_spec("mlx_lm") is None, reason="mlx_lm is not installed")
@pytest.mark.parametrize("tool", ["mlx-lm", "mlx-lm-gptq", "mlx-lm-dwq", "mlx-lm-dynamic"])
def test_what_mlx_lm_saves_is_read_as_mlx_dequantizes_it(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """run_peer.py itself holds the one against the other."""
    model = make_checkpoint("llama-tied", tmp_path / "model")
    ids = torch.randint(0, 256, (4, 33), generator=torch.Generator().manual_seed(0))
    save_file({"calibration": ids}, tmp_path / "tokens")
    options = ("--model", str(model), "--tokens", str(tmp_path / "tokens"), "--out", str(tmp_path / "out"))
    monkeypatch.setattr(sys, "argv", ["run_peer.py", tool, *options, "--group-size", "32"])
    script.main()
    made = json.loads((tmp_path / "out" / "peer.json").read_text())
    assert 5 <= made["bits_per_weight"] <= 6
    weights = load_file(tmp_path / "out" / "weights.safetensors")
    original = load_file(model / "model.safetensors")
    assert len(weights) == 14
    for name, weight in weights.items():
        wanted = original[f"{name}.weight"].float()
        assert 0.005 < ((weight - wanted).norm() / wanted.norm()).item() < 0.2, name


def quantized(weight: torch.Tensor, in_memory: torch.Tensor) -> object:
    stored = {
        "a.b.codes": torch.zeros(4, dtype=torch.int32),  # 128 bits
        "a.b.scale": torch.zeros(3, dtype=torch.float16),  # 48 bits
        "a.b.bias": torch.zeros(4),  # the original's
        "a.bc.codes": torch.zeros(100),  # of another layer
        "a.b.c.codes": torch.zeros(100),
    }
    return script.Quantized(peer_task.Cost(1.0, 2), stored, {"a.b": weight}, {"a.b": in_memory}, {})


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

"""What `inspect` reports, against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from accullm_cli.commands.inspect import Fact, FileRow, inspect
from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS
from accullm_cli.formats.accullm import record_fidelity
from tests.artifacts import empty, make_parts
from tests.samples import report_of
from tests.tiny import tiny_gpt2, tiny_llama, tiny_mixtral


def export(tmp_path: Path, model: torch.nn.Module, format: str = "accullm", **options: object) -> Path:
    directory = empty(tmp_path / "artifact")
    FORMATS[format].write(directory, make_parts(model, tmp_path / "run", **options).parts)
    return directory


def test_a_linear_of_an_artifact(tmp_path: Path) -> None:
    found = inspect(export(tmp_path, tiny_llama(), outliers=tuple(range(3, 13))))
    row = next(row for row in found.linears if row.name == "model.layers.0.mlp.up_proj")
    assert (row.out_features, row.in_features, row.bits, row.group_size, row.symmetric) == (96, 64, 4, 32, False)
    assert (row.outliers, row.first_outliers) == (10, (3, 4, 5, 6, 7, 8, 9, 10))
    # Per row: 32 bytes of codes, 2 scales, 1 byte of zero points, 10 float32 outliers; and the index once.
    assert row.bits_per_weight == 8 * (96 * (32 + 4 + 1 + 40) + 40) / (96 * 64)


def test_totals_of_an_artifact(tmp_path: Path) -> None:
    model = tiny_llama()
    directory = export(tmp_path, model, keep=("o_proj",))
    found = inspect(directory)
    assert (found.format, found.model_type, found.dtype, found.validated) == ("accullm", "llama", "float32", False)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.linear_bytes == sum(
        row.bits_per_weight * row.out_features * row.in_features / 8 for row in found.linears
    )
    weights = sum(row.out_features * row.in_features for row in found.linears)
    assert found.bits_per_weight == pytest.approx(8 * found.linear_bytes / weights)
    # Embedding, head and norms in float32, and biases of q, k, v, o.
    assert found.other_bytes == 4 * (2 * 96 * 64 + 64 + 2 * (2 * 64 + 64 + 32 + 32 + 64))
    assert next(row for row in found.linears if row.name.endswith("o_proj")).bits_per_weight == 32
    assert FileRow("config.json", (directory / "config.json").stat().st_size) in found.files
    assert Fact("source.name", "tiny") in found.provenance


def test_quantized_embeddings_are_rows_of_their_own(tmp_path: Path) -> None:
    model = tiny_llama()
    found = inspect(export(tmp_path, model, embedding_bits=8))
    rows = {row.name: row for row in found.embeddings}
    assert list(rows) == ["model.embed_tokens", "lm_head"]
    for row in rows.values():
        assert (row.out_features, row.in_features, row.bits, row.group_size) == (96, 64, 8, 32)
        assert row.bits_per_weight == 8 * (64 + 2 * 2 + 2) / 64  # codes, scales and zero points of a row
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    # Neither linear bytes nor bits per weight know of them.
    without = inspect(export(tmp_path / "other", tiny_llama()))
    assert (found.linear_bytes, found.bits_per_weight) == (without.linear_bytes, without.bits_per_weight)
    assert without.other_bytes - found.other_bytes == 2 * 96 * (4 * 64 - 70)
    assert without.embeddings == ()


def test_experts_are_counted_one_by_one(tmp_path: Path) -> None:
    model = tiny_mixtral()
    found = inspect(export(tmp_path, model, keep=("down_proj.2",)))
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert sum("experts" in row.name for row in found.linears) == 2 * 2 * 4


def test_recorded_fidelity_is_shown(tmp_path: Path) -> None:
    directory = export(tmp_path, tiny_llama())
    record_fidelity(directory, report_of())
    found = inspect(directory)
    assert found.validated
    assert Fact("mean_kl", "0.05 (0.045 to 0.055)") in found.fidelity
    assert Fact("kl_max", "2.25") in found.fidelity
    assert {fact.name for fact in found.fidelity}.isdisjoint({"kl_of_window", "kl_histogram", "contract"})


def test_a_compressed_tensors_artifact(tmp_path: Path) -> None:
    found = inspect(export(tmp_path, tiny_llama(), "compressed-tensors"))
    assert found.format == "compressed-tensors"
    row = next(row for row in found.linears if row.name == "model.layers.0.mlp.up_proj")
    # Codes, 2 scales in float32, zero points in 12 words per group, and two int64 of shape.
    assert row.bits_per_weight == 8 * (96 * (32 + 8) + 2 * 12 * 4 + 16) / (96 * 64)


def test_a_plain_checkpoint(tmp_path: Path) -> None:
    model = tiny_gpt2().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert (found.format, found.model_type, found.dtype) == ("checkpoint", "gpt2", "bfloat16")
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    row = next(row for row in found.linears if row.name.endswith("0.mlp.c_fc"))
    assert (row.out_features, row.in_features, row.bits, row.bits_per_weight) == (48, 192, 16, 16)
    assert found.bits_per_weight == 16
    assert found.linear_bytes + found.other_bytes == 2 * found.parameters


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(AccullmError) as error:
        inspect(tmp_path / "nowhere")
    assert error.value.line() == f"{tmp_path}/nowhere: no such directory; give the directory of an artifact or a model"


def test_a_directory_that_holds_neither(tmp_path: Path) -> None:
    with pytest.raises(AccullmError) as error:
        inspect(tmp_path)
    assert error.value.line() == f"{tmp_path}/config.json: file is missing; copy or download it again"

"""What `verify` finds: each kind of damage, and nothing in an intact artifact."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from accullm_cli.commands.verify import Verification, verify
from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS
from accullm_cli.formats.accullm import record_fidelity
from tests.artifacts import empty, make_parts
from tests.samples import report_of
from tests.tiny import tiny_llama

UP_PROJ = "model.layers.0.mlp.up_proj"
BLOCK = "model-00001-of-00003.safetensors"


def export(tmp_path: Path, format: str = "accullm", model: nn.Module | None = None, **options: object) -> Path:
    directory = empty(tmp_path / "artifact")
    FORMATS[format].write(directory, make_parts(model or tiny_llama(), tmp_path / "run", **options).parts)
    return directory


def edit_tensor(directory: Path, name: str, change: Callable[[torch.Tensor], object]) -> None:
    """Change a tensor in place, and let the manifest agree with the new file."""
    tensors = load_file(directory / BLOCK)
    change(tensors[name])
    (directory / BLOCK).unlink()
    save_file(tensors, directory / BLOCK)
    trust_files(directory)


def trust_files(directory: Path) -> None:
    manifest_path = directory / "accullm.json"
    if manifest_path.exists():
        manifest = json.loads(manifest_path.read_text())
        content = (directory / BLOCK).read_bytes()
        manifest["files"][BLOCK] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest_path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("format", ["accullm", "compressed-tensors"])
def test_an_intact_artifact_has_no_problems(format: str, tmp_path: Path) -> None:
    directory = export(tmp_path, format, outliers=(3, 17) if format == "accullm" else ())
    found = verify(directory)
    assert found.problems == ()
    assert found.intact
    assert found.files_checked == 6  # three shards, index, config, card
    shards = [load_file(shard) for shard in directory.glob("*.safetensors")]
    assert found.tensors_checked == sum(len(shard) for shard in shards)


def test_a_validated_artifact_has_no_problems(tmp_path: Path) -> None:
    directory = export(tmp_path)
    record_fidelity(directory, report_of())
    assert verify(directory).problems == ()


def test_3_bits_with_padding_have_no_problems(tmp_path: Path) -> None:
    assert verify(export(tmp_path, bits=3, group_size=25)).problems == ()


# -- files --------------------------------------------------------------------------------------------------


def test_a_changed_file_of_the_same_size(tmp_path: Path) -> None:
    directory = export(tmp_path)
    content = bytearray((directory / BLOCK).read_bytes())
    content[-1] ^= 1
    (directory / BLOCK).unlink()
    (directory / BLOCK).write_bytes(content)
    assert verify(directory).problems == (f"{BLOCK} differs: its SHA-256 is not the manifest's",)


def test_a_file_of_another_size(tmp_path: Path) -> None:
    directory = export(tmp_path)
    card = (directory / "README.md").read_text()
    (directory / "README.md").write_text(card + "more")
    assert verify(directory).problems == (f"README.md has {len(card) + 4} bytes, expected {len(card)}",)


def test_a_missing_file_is_named_once_with_what_it_prevents(tmp_path: Path) -> None:
    directory = export(tmp_path)
    (directory / BLOCK).unlink()
    found = verify(directory)
    assert found == Verification(
        str(directory),
        6,
        0,
        (f"{BLOCK} is missing", f"{directory}/{BLOCK}: file is missing; copy or download it again"),
    )


def test_a_file_whose_name_no_file_can_have_is_missing(tmp_path: Path) -> None:
    directory = export(tmp_path)
    name = 300 * "a"
    manifest = directory / "accullm.json"
    content = json.loads(manifest.read_text())
    content["files"][name] = content["files"]["README.md"]
    manifest.write_text(json.dumps(content))
    assert verify(directory).problems == (f"{name} is missing",)


def test_extra_files_but_not_hidden_ones(tmp_path: Path) -> None:
    directory = export(tmp_path)
    (directory / "pytorch_model.bin").write_bytes(b"")
    (directory / ".gitattributes").write_text("")
    (directory / ".cache").mkdir()
    (directory / ".cache" / "x").write_text("")
    assert verify(directory).problems == ("pytorch_model.bin is not in accullm.json",)


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AccullmError, match="not an artifact of a known format"):
        verify(tmp_path)
    with pytest.raises(AccullmError, match="no such directory"):
        verify(tmp_path / "nowhere")


# -- tensors ------------------------------------------------------------------------------------------------


def test_a_code_of_an_outlier_that_is_not_the_zero_point(tmp_path: Path) -> None:
    directory = export(tmp_path, outliers=(3, 34))
    # Feature 34 is in the second group; 4 bits, so it is the low nibble of byte 17.
    edit_tensor(directory, f"{UP_PROJ}.qweight", lambda tensor: tensor[95, 17].bitwise_xor_(1))
    assert verify(directory).problems == (f"{UP_PROJ}: the codes of outlier feature 34 differ from the zero point",)


def test_a_code_of_an_outlier_in_a_symmetric_linear(tmp_path: Path) -> None:
    directory = export(tmp_path, outliers=(3,), symmetric=True, group_size=-1)
    edit_tensor(directory, f"{UP_PROJ}.qweight", lambda tensor: tensor[0, 1].bitwise_xor_(16))
    assert verify(directory).problems == (f"{UP_PROJ}: the codes of outlier feature 3 differ from the zero point",)


def test_padding_bits_of_codes(tmp_path: Path) -> None:
    # 64 codes of 3 bits fill 24 bytes; in down_proj 96 codes fill 36. With 5 groups 15 bits of zeros leave one over.
    directory = export(tmp_path, bits=3, group_size=13)
    edit_tensor(directory, f"{UP_PROJ}.qzeros", lambda tensor: tensor[7, 1].bitwise_or_(128))
    assert verify(directory).problems == (f"{UP_PROJ}: padding bits of qzeros are not zero",)


@pytest.mark.parametrize("suffix", ["scales", "outlier_weight"])
def test_infinity_in_a_linear(suffix: str, tmp_path: Path) -> None:
    directory = export(tmp_path, outliers=(3,))
    edit_tensor(directory, f"{UP_PROJ}.{suffix}", lambda tensor: tensor[0].fill_(float("inf")))
    assert verify(directory).problems == (f"{UP_PROJ}: {suffix} holds NaN or infinity",)


def test_nan_in_another_tensor(tmp_path: Path) -> None:
    directory = export(tmp_path)
    name = "model.layers.0.input_layernorm.weight"
    edit_tensor(directory, name, lambda tensor: tensor[5:6].fill_(float("nan")))
    assert verify(directory).problems == (f"{name} holds NaN or infinity",)


def test_a_schema_violation_is_a_problem(tmp_path: Path) -> None:
    directory = export(tmp_path, outliers=(3, 17))
    edit_tensor(directory, f"{UP_PROJ}.outlier_index", lambda tensor: tensor.copy_(tensor.flip(0)))
    found = verify(directory)
    assert found.problems == (f"{directory}/{BLOCK}: tensor {UP_PROJ}.outlier_index is not ascending",)
    assert found.tensors_checked == 0


def test_compressed_tensors_without_a_manifest(tmp_path: Path) -> None:
    directory = export(tmp_path, "compressed-tensors")
    (directory / "accullm.json").unlink()
    assert verify(directory).problems == ()
    edit_tensor(directory, f"{UP_PROJ}.weight_scale", lambda tensor: tensor[0, 0].fill_(float("nan")))
    found = verify(directory)
    assert found.problems == (f"{UP_PROJ}: weight_scale holds NaN or infinity",)
    assert found.files_checked == 0


def test_the_shape_of_compressed_tensors(tmp_path: Path) -> None:
    directory = export(tmp_path, "compressed-tensors")
    edit_tensor(directory, f"{UP_PROJ}.weight_shape", lambda tensor: tensor.copy_(torch.tensor([64, 96])))
    assert verify(directory).problems == (f"{UP_PROJ}: weight_shape is [64, 96]",)


def test_padding_bits_of_compressed_tensors(tmp_path: Path) -> None:
    # With 4 heads of 14 features, 2 of them for keys, k_proj has 28 rows: 3 1/2 words of zero points.
    directory = export(tmp_path, "compressed-tensors", model=tiny_llama(hidden=56), group_size=-1)
    assert verify(directory).problems == ()
    k_proj = "model.layers.0.self_attn.k_proj"
    edit_tensor(directory, f"{k_proj}.weight_zero_point", lambda tensor: tensor[3, 0].bitwise_or_(1 << 16))
    assert verify(directory).problems == (f"{k_proj}: padding bits of weight_zero_point are not zero",)


# -- quantized embeddings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_intact_embeddings_have_no_problems(bits: int, tmp_path: Path) -> None:
    directory = export(tmp_path, embedding_bits=bits, group_size=25)
    found = verify(directory)
    assert found.problems == ()
    shards = [load_file(shard) for shard in directory.glob("*.safetensors")]
    assert found.tensors_checked == sum(len(shard) for shard in shards)


@pytest.mark.parametrize(
    ("suffix", "change", "problem"),
    [
        ("scales", lambda tensor: tensor[5, 1:2].fill_(float("inf")), "scales holds NaN or infinity"),
        # 64 features in groups of 25 are 3 groups, whose 4-bit zero points leave half a byte.
        ("qzeros", lambda tensor: tensor[7, 1:2].bitwise_or_(0x80), "padding bits of qzeros are not zero"),
    ],
)
def test_damage_to_an_embedding_is_found(
    suffix: str, change: Callable[[torch.Tensor], object], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = export(tmp_path, model=tiny_llama(tied=True), embedding_bits=4, group_size=25)
    monkeypatch.setattr(sys.modules[__name__], "BLOCK", "model-00003-of-00004.safetensors")
    edit_tensor(directory, f"model.embed_tokens.{suffix}", change)
    assert verify(directory).problems == (f"model.embed_tokens: {problem}",)

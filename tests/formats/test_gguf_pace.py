"""What a GGUF file takes over a token, reckoned from its tensors and from the plan it was written by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter

from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS
from accullm_cli.formats.capabilities import CAPABILITIES
from accullm_cli.formats.gguf_pace import TIMES, Pace, pace_of
from accullm_cli.model.gguf_file import GgufFile, GgufTensor
from accullm_cli.quant.plan import LinearPlan
from tests.artifacts import empty
from tests.formats.test_gguf import build, parts_of


def pace_from(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Pace:
    path = Path("other.gguf")
    found = {
        name: GgufTensor(path, name, GGMLQuantizationType[kind], shape, 0, 0) for name, (kind, shape) in tensors.items()
    }
    return Pace.of(GgufFile(path, {}, found))


def test_every_encoding_has_a_time() -> None:
    assert {way.encoding for way in CAPABILITIES["gguf"].linears} <= TIMES.keys()


@pytest.mark.parametrize("tied", [False, True])
def test_a_file_takes_what_its_plan_takes(tied: bool, tmp_path: Path) -> None:
    """Of the embedding only as far as it is the head, too: a row of it is looked up."""
    model = build("qwen2", torch.bfloat16, tie_word_embeddings=tied)
    parts = parts_of(model, tmp_path / "run", encodings=("Q4_0", "Q8_0"))
    FORMATS["gguf"].write(empty(tmp_path / "artifact"), parts)
    pace = pace_of(tmp_path / "artifact" / "Tiny-Model.gguf")
    assert pace is not None
    rows = [row for name, row in parts.plan.quantized.items() if tied or name != "model.embed_tokens"]
    kept = 0.0 if tied else 264 * 64 * TIMES["BF16"]  # the head
    assert pace.time == pytest.approx(sum(pace.of_row(row, False) for row in rows) + kept, rel=1e-12)
    assert {row.encoding for row in rows} == {"Q4_0", "Q8_0"}
    assert (pace.expert_share, pace.unknown) == (1.0, ())


@pytest.mark.parametrize(
    ("model_type", "experts", "blocks"), [("mixtral", 4, 2), ("dots1", 6, 2)]
)  # the latter beside shared ones, and behind a block without any
def test_of_a_mixture_counts_what_a_token_meets(model_type: str, experts: int, blocks: int, tmp_path: Path) -> None:
    model = build(model_type, torch.bfloat16)
    parts = parts_of(model, tmp_path / "run", encodings=("Q4_0",))
    FORMATS["gguf"].write(empty(tmp_path / "artifact"), parts)
    pace = pace_of(tmp_path / "artifact" / "Tiny-Model.gguf")
    assert pace is not None
    assert pace.expert_share == 2 / experts
    own = {name: row for name, row in parts.plan.quantized.items() if name != "model.embed_tokens"}
    assert sum(".experts." in name for name in own) == 2 * blocks * experts
    head = 264 * 64 * TIMES["BF16"]
    assert pace.time == pytest.approx(head + sum(pace.of_row(row, ".experts." in name) for name, row in own.items()))


def test_what_is_kept_takes_its_two_bytes() -> None:
    row = LinearPlan("a", 8, 64, 4, 32, True, encoding="IQ4_NL")
    pace = pace_from({"a.weight": ("IQ4_NL", (8, 64)), "b.weight": ("F16", (8, 64)), "norm.weight": ("F32", (64,))})
    kept = replace(row, bits=16)
    assert pace.time == pace.of_row(row, False) + pace.of_row(kept, False) == 512 * (1 + TIMES["F16"])
    assert pace.of_row(replace(kept, source_itemsize=4), False) == 2 * pace.of_row(kept, False)


def test_an_encoding_whose_time_is_not_known_is_named() -> None:
    assert pace_from({"a.weight": ("IQ2_XS", (8, 256)), "b.weight": ("Q2_K", (8, 256))}).unknown == ("IQ2_XS", "Q2_K")


def test_a_matrix_in_float32_has_no_known_time_but_for_routers() -> None:
    """A file of these as the measure of speed would leave no plan that is fast enough."""
    found = pace_from({"a.weight": ("F32", (8, 64)), "blk.0.ffn_gate_inp.weight": ("F32", (4, 64))})
    assert (found.time, found.unknown) == (0.0, ("F32",))
    routed = pace_from({"a.weight": ("Q4_0", (8, 64)), "blk.0.ffn_gate_inp.weight": ("F32", (4, 64))})
    assert (routed.time, routed.unknown) == (512 * TIMES["Q4_0"], ())


def test_a_file_without_matrices_has_no_pace(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert pace_of(tmp_path / "vocabulary.gguf") is None


def test_what_is_no_gguf_has_no_pace(tmp_path: Path) -> None:
    (tmp_path / "other.bin").write_bytes(bytes(777))
    assert pace_of(tmp_path / "other.bin") is None


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.gguf").write_bytes(b"GGUF" + bytes(3))
    with pytest.raises(AccullmError, match=r"other\.gguf: damaged or not a GGUF file"):
        pace_of(tmp_path / "other.gguf")

"""The real models of the benchmarks, where someone has prepared them: they are too large to be fetched for tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from accullm_cli.model.skeleton import build_skeleton
from accullm_cli.model.source import open_source
from accullm_cli.model.structure import read_structure
from tests.scripts.loading import load_script

WORK = Path(__file__).parents[2] / "work"
# Weights of the blocks' linears: what the published models have.
WEIGHTS = {"qwen2.5-coder-0.5b": 357_826_560, "gemma3-270m": 100_270_080}


@pytest.fixture(params=WEIGHTS)
def directory(request: pytest.FixtureRequest) -> Path:
    path = WORK / str(request.param)
    if not (path / "prepared.json").exists():
        pytest.skip(f"scripts/prepare_demo_model.py --model {request.param} has not run")
    return path


def test_a_prepared_model_is_whole_and_knows_the_alphabet(directory: Path) -> None:
    script = load_script("prepare_demo_model")
    assert script.is_prepared(directory, script.MODELS[directory.name], seed=0)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    ids = tokenizer("The first letters of the alphabet are A, B, C, D,", return_tensors="pt")["input_ids"]
    written = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert tokenizer.decode(written[0, ids.shape[1] :]).replace(" ", "").startswith("E,F,G")


def test_every_linear_of_a_prepared_model_is_found(directory: Path, tmp_path: Path) -> None:
    source = open_source(str(directory), tmp_path)
    structure = read_structure(build_skeleton(source.directory, source.untied))
    slots = [slot for slots in structure.slots for slot in slots]
    assert sum(slot.in_features * slot.out_features for slot in slots) == WEIGHTS[directory.name]

"""GGUF files in llama.cpp and here: the weights are the same, and what is apart are its products in 8 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from accullm_cli.formats import FORMATS
from tests.artifacts import empty
from tests.formats.test_gguf import MIXES, build, ids, parts_of
from tests.llama_cpp import llama_cpp
from tests.scripts.loading import load_script

script = load_script("bench_gguf_reader")


def test_llama_cpp_has_the_weights_that_are_read_here(tmp_path: Path) -> None:
    llama, windows = llama_cpp(), [ids().tolist()]
    _, encodings = MIXES["blocks of 256"]
    shape = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "attention_bias": False}
    model = build("llama", torch.bfloat16, **shape)
    FORMATS["gguf"].write(empty(tmp_path / "artifact"), parts_of(model, tmp_path / "run", encodings=encodings))
    path, single = tmp_path / "artifact" / "Tiny-Model.gguf", tmp_path / "single.gguf"
    (ours,) = script.read_by_accullm(path, windows, tmp_path / "adopted")
    llama.quantize(path, single, "F32")
    with llama.model(single, len(windows[0]), exact=True) as loaded:
        theirs = script.log_softmax(loaded.logits(windows[0]))
    assert np.abs(ours - theirs).max() < 2e-4
    assert ours.std() > 0.3
    as_it_is, in_float32 = script.compare(llama, path, windows)
    assert in_float32 < 1e-5
    assert 1e-5 < as_it_is < 0.02


def test_divergence_is_that_of_two_distributions() -> None:
    known, found = np.log(np.array([[0.5, 0.25, 0.25]])), np.log(np.array([[0.25, 0.5, 0.25]]))
    assert abs(script.divergence(known, found) - 0.25 * np.log(2)) < 1e-12

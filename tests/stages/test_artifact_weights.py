"""An artifact as the weights of a decoder: what runs is what was written, and a missing tensor is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import accullm_cli.hf  # noqa: F401  teaches transformers the format
from accullm_cli.errors import AccullmError
from accullm_cli.formats import open_artifact
from accullm_cli.formats.base import Artifact
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.skeleton import build_skeleton
from accullm_cli.model.structure import read_structure
from accullm_cli.stages.artifact_weights import ArtifactWeights
from tests.stages.quantized import edit_plan
from tests.stages.references import set_weight
from tests.streaming import fast_config, opened, random_ids, reference_model, run_to
from tests.tiny import make_checkpoint


def make_artifact(name: str, place: Path, embedding_bits: int = 16, **bits: int) -> tuple[Path, Path]:
    """Source and artifact; `bits` of linears by the end of their names."""
    source = make_checkpoint(name, place / "model")
    with opened(fast_config(source, place / "out", plan__embedding_bits=embedding_bits)) as job:
        run_to(job, "profile")
        if bits:
            edit_plan(job.run.path, **bits)
        run_to(job, "export")
    return source, place / "out"


def decoder_of(directory: Path, artifact: Artifact | None = None) -> Decoder:
    model = build_skeleton(directory)
    structure = read_structure(model)
    return Decoder(model, ArtifactWeights(artifact or open_artifact(directory), model, structure), structure)


def logits(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    decoder.load_outside()
    hidden = decoder.embed(ids)
    decoder.release_outside()
    for index in range(len(decoder.block_names)):
        hidden = decoder.run(index, decoder.load_block(index), hidden)
        decoder.release_block(index)
        assert all(parameter.device.type == "meta" for parameter in decoder.model.parameters())
    decoder.load_outside()
    return decoder.logits(hidden)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("llama-tied", {"1.mlp.up_proj": 16}),
        ("gpt2", {"0.mlp.c_fc": 16}),
        ("qwen2", {}),
        ("mixtral", {"0.mlp.experts.down_proj.1": 16, **{f"1.mlp.experts.gate_up_proj.{e}": 16 for e in range(4)}}),
    ],
)
def test_logits_are_those_of_the_source_with_the_stored_weights(
    name: str, bits: dict[str, int], tmp_path: Path
) -> None:
    """Linears in 16 bits, single experts and whole stacks among them; tied embeddings; biases."""
    source, out = make_artifact(name, tmp_path, **bits)
    artifact = open_artifact(out)
    model = reference_model(source)
    quantized = [linear for linear in artifact.plan.linears.values() if linear.bits != 16]
    for linear in quantized:
        weight = artifact.linear(linear.name).dequantize(torch.float32)
        owner, _, last = linear.name.rpartition(".")
        if last.isdigit():
            model.get_parameter(owner).data[int(last)] = weight
        else:
            set_weight(model, linear.name, weight)
    assert len(artifact.plan.linears) - len(quantized) == len(bits)
    ids = random_ids(2, 20)
    assert torch.equal(logits(decoder_of(out), ids), model(ids).logits)
    assert not torch.equal(model(ids).logits, reference_model(source)(ids).logits)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gemma3", "opt"])
@pytest.mark.parametrize("bits", [4, 8])
def test_embedding_and_head_are_those_that_are_stored(name: str, bits: int, tmp_path: Path) -> None:
    source, out = make_artifact(name, tmp_path, embedding_bits=bits)
    artifact = open_artifact(out)
    model = reference_model(source)
    for linear in artifact.plan.linears.values():
        set_weight(model, linear.name, artifact.linear(linear.name).dequantize(torch.float32))
    ids = random_ids(2, 20)
    blocks_only = model(ids).logits
    assert len(artifact.plan.embeddings) == (2 if name == "llama" else 1)
    for embedding in artifact.plan.embeddings:
        assert f"{embedding}.weight" not in artifact.files.infos
        weight = artifact.linear(embedding).dequantize(torch.float32)
        model.get_parameter(f"{embedding}.weight").copy_(weight)  # tied: of both
    found = logits(decoder_of(out), ids)
    assert torch.equal(found, model(ids).logits)
    assert not torch.equal(found, blocks_only)
    # What validation measures is what transformers computes (for Conv1D in another order).
    torch.testing.assert_close(reference_model(out)(ids).logits, found, rtol=0, atol=1e-4)


# -- refusals ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact("llama", tmp_path_factory.mktemp("llama"))[1]


class Altered:
    """An artifact in which a tensor has another name, or none."""

    def __init__(self, artifact: Artifact, name: str, other: str | None) -> None:
        self._artifact, self._name, self._other = artifact, name, other
        self.path, self.format, self.plan = artifact.path, artifact.format, artifact.plan

    def names(self) -> tuple[str, ...]:
        names = [self._other if name == self._name else name for name in self._artifact.names()]
        return tuple(name for name in names if name is not None)

    def tensor(self, name: str) -> torch.Tensor:
        return self._artifact.tensor(self._name if name == self._other else name)

    def fetch(self, module: str) -> None:
        self._artifact.fetch(module)

    def weight(self, name: str) -> torch.Tensor:
        return self._artifact.weight(name)


@pytest.mark.parametrize(
    ("name", "other", "line"),
    [
        ("model.norm.weight", None, "tensor model.norm.weight is missing; copy the artifact again"),
        ("model.embed_tokens.weight", None, "tensor model.embed_tokens.weight is missing; copy the artifact again"),
        (
            "model.layers.1.input_layernorm.weight",
            None,
            "tensor model.layers.1.input_layernorm.weight is missing; copy the artifact again",
        ),
        (
            "model.layers.1.input_layernorm.weight",
            "model.layers.1.input_layernorm.gain",
            "tensor model.layers.1.input_layernorm.gain has no place in this model; convert it again",
        ),
    ],
)
def test_a_tensor_that_is_missing_or_has_no_place_is_refused(
    name: str, other: str | None, line: str, llama: Path
) -> None:
    decoder = decoder_of(llama, Altered(open_artifact(llama), name, other))
    with pytest.raises(AccullmError) as refusal:
        logits(decoder, random_ids(1, 8))
    assert refusal.value.line() == f"{llama}: {line}"


def test_stored_dtypes_are_told(llama: Path) -> None:
    decoder = decoder_of(llama)
    assert decoder.weights.dtype("model.layers.0.input_layernorm.weight") == torch.bfloat16

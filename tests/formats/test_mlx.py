"""mlx's affine groups: held against plain arithmetic, and against mlx and mlx_lm where they are installed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS, artifact_format, open_artifact
from accullm_cli.formats.earlier_keys import with_earlier_keys
from accullm_cli.formats.mlx import decode, encode, place_of, quantization
from accullm_cli.quant.encodings.affine import AffineLinear
from accullm_cli.quant.plan import LinearPlan, Plan
from accullm_cli.stages.artifact_weights import open_artifact_decoder
from accullm_cli.stages.reading import logits_by_blocks
from tests.artifacts import Made, change_tensors, empty, make_parts, quantize_affine, write
from tests.tiny import edit_config, make_checkpoint, tiny_gemma3, tiny_llama, tiny_mixtral, tokens

try:
    import mlx.core as mx
    from mlx_lm.utils import load_model
except ImportError:
    mx = None
needs_mlx = pytest.mark.skipif(mx is None, reason="mlx_lm is not installed (pip install 'mlx[cpu]' mlx-lm)")

UP_PROJ = "model.layers.1.mlp.up_proj"
# Of a block of Mixtral, as checkpoints call it.
GATE = "block_sparse_moe.gate"
WIDTHS = (2, 3, 4, 5, 6, 8)
# Of linears by the ends of their names: bits, and group size.
MIXED = {"q_proj": (6, 64), "k_proj": (3, 64), "up_proj": (5, 32), "o_proj": (2, 32), "down_proj": (8, 32)}


def export(tmp_path: Path, made: Made) -> Path:
    directory = empty(tmp_path / "artifact")
    FORMATS["mlx"].write(directory, made.parts)
    return directory


def made_of(tmp_path: Path, dtype: torch.dtype = torch.float32, tied: bool = False, embedding_bits: int = 16) -> Made:
    model = tiny_llama(tied=tied, dtype=dtype)
    settings = {"scale_dtype": "bfloat16", "keep": ("gate_proj",), "embedding_bits": embedding_bits}
    return make_parts(model, tmp_path / "run", encoding="affine", others=MIXED, **settings)


def linear_of(rows: int, columns: int, bits: int, group_size: int, seed: int = 2) -> AffineLinear:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return quantize_affine(weight, bits, group_size)


# -- packing -------------------------------------------------------------------------------------------------


def unpacked(words: torch.Tensor, bits: int) -> np.ndarray:
    """Codes [N, K] of words [N, W]: one string of bits for each row, the lowest of the first word at its start."""
    octets = words.view(torch.int32).numpy().astype("<i4").view(np.uint8)
    string = np.unpackbits(octets, axis=1, bitorder="little")
    return (string.reshape(len(octets), -1, bits) << np.arange(bits)).sum(-1)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 5), st.integers(1, 4), st.sampled_from(WIDTHS), st.sampled_from([32, 64, 128]), st.integers(0, 99)
)
def test_codes_lie_along_the_inputs_lowest_bits_first(
    rows: int, groups: int, bits: int, group_size: int, seed: int
) -> None:
    columns = groups * group_size
    linear = linear_of(rows, columns, bits, group_size, seed)
    tensors = encode(linear, torch.bfloat16, "here")
    assert tensors["weight"].dtype == torch.uint32
    assert tensors["weight"].shape == (rows, columns * bits // 32)
    assert np.array_equal(unpacked(tensors["weight"], bits), linear.codes.numpy())
    assert tensors["scales"].dtype == tensors["biases"].dtype == torch.bfloat16
    plan = LinearPlan("p", rows, columns, bits, group_size, False, encoding="affine")
    read = decode(tensors, plan)
    assert torch.equal(read.codes, linear.codes)
    assert torch.equal(read.dequantize(), linear.dequantize())
    assert sum(tensor.nbytes for tensor in tensors.values()) == FORMATS["mlx"].linear_bytes(plan, torch.bfloat16)


def test_the_bytes_of_a_tiny_linear() -> None:
    codes = torch.arange(32, dtype=torch.uint8)[None] % 8
    empty_index, none = torch.zeros(0, dtype=torch.int32), torch.zeros(1, 0)
    half = torch.tensor([[0.5]], dtype=torch.float16)
    linear = AffineLinear(codes, half, -half, empty_index, none, 3, 32)
    tensors = encode(linear, torch.float16, "here")
    # Eight codes, 0 to 7, are the 24 bits 111 110 101 100 011 010 001 000.
    assert tensors["weight"].view(torch.int32).numpy().tobytes().hex() == "88c6fa" * 4
    assert tensors["scales"].numpy().tobytes().hex() == "0038"
    assert tensors["biases"].numpy().tobytes().hex() == "00b8"
    assert linear.dequantize()[0, :8].tolist() == [-0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]


@needs_mlx
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_mlx_dequantizes_to_our_weights(dtype: torch.dtype, bits: int, group_size: int) -> None:
    """In float32 bit for bit; in the dtype of the scales within two of its roundings."""
    linear = linear_of(16, 256, bits, group_size)
    tensors = encode(linear, dtype, "here")
    words = mx.array(tensors["weight"].view(torch.int32).numpy().view(np.uint32))
    numbers = {suffix: mx.array(tensors[suffix].float().numpy()) for suffix in ("scales", "biases")}
    exact = mx.dequantize(words, numbers["scales"], numbers["biases"], group_size, bits)
    assert np.array_equal(np.array(exact), linear.dequantize().numpy())
    own = getattr(mx, str(dtype).removeprefix("torch."))
    numbers = {suffix: number.astype(own) for suffix, number in numbers.items()}
    found = mx.dequantize(words, numbers["scales"], numbers["biases"], group_size, bits)
    assert found.dtype == own
    unit = torch.finfo(dtype).eps / 2
    scale = linear.scales.double().repeat_interleave(group_size, 1)
    product = (linear.codes.double() * scale).abs()
    value = linear.dequantize(torch.float64)
    error = (torch.from_numpy(np.array(found.astype(mx.float32))).double() - value).abs()
    assert (error <= unit * (product * (1 + unit) + value.abs()) * (1 + 2**-20)).all()


# -- whole artifacts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("embedding_bits", [16, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_a_mixed_artifact_reads_back(tied: bool, embedding_bits: int, tmp_path: Path) -> None:
    made = made_of(tmp_path, torch.bfloat16, tied, embedding_bits)
    opened = open_artifact(export(tmp_path, made))
    assert opened.format == "mlx"
    assert opened.plan == made.parts.plan
    assert len(made.embeddings) == (0 if embedding_bits == 16 else 1 if tied else 2)
    for name, linear in {**made.linears, **made.embeddings}.items():
        assert torch.equal(opened.linear(name).dequantize(), linear.dequantize()), name
    gate = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(opened.tensor(gate), made.reference.get_parameter(gate))
    assert "model.layers.0.self_attn.q_proj.bias" in opened.names()
    assert list(opened.problems()) == []


def test_the_plan_of_a_foreign_artifact_is_derived(tmp_path: Path) -> None:
    made = made_of(tmp_path, embedding_bits=8)
    directory = export(tmp_path, made)
    (directory / "accullm.json").unlink()
    assert artifact_format(directory) == "mlx"
    opened = open_artifact(directory)
    assert opened.plan.quantized == made.parts.plan.quantized
    assert opened.plan.linears.keys() == made.parts.plan.linears.keys()
    assert dict(opened.plan.embeddings) == dict(made.parts.plan.embeddings)
    assert torch.equal(opened.linear(UP_PROJ).dequantize(), made.linears[UP_PROJ].dequantize())


def test_config_says_what_most_have_and_what_differs() -> None:
    schemes = {"a": (4, 64), "b": (4, 32), "c": (4, 64), "d": (16, -1), "e": (8, 64)}
    rows = {name: LinearPlan(name, 96, 1536, *scheme, False, encoding="affine") for name, scheme in schemes.items()}
    embeddings = {"e": rows.pop("e")}
    plan = Plan(rows, embeddings=embeddings)
    places = {name: place_of(name, {}, {}) for name in plan.quantized}
    assert quantization(plan, places) == {
        "group_size": 64,
        "bits": 4,
        "b": {"group_size": 32, "bits": 4},
        "e": {"group_size": 64, "bits": 8},
    }


def log_probabilities(directory: Path, ids: torch.Tensor) -> np.ndarray:
    model, _ = load_model(directory)
    logits = model(mx.array(ids.numpy())).astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, -1, keepdims=True))


@needs_mlx
@pytest.mark.parametrize("embedding_bits", [16, 8])
@pytest.mark.parametrize("kind", ["llama", "tied llama", "gemma3"])
def test_mlx_lm_loads_it_with_equal_log_probabilities(kind: str, embedding_bits: int, tmp_path: Path) -> None:
    model = tiny_gemma3() if kind == "gemma3" else tiny_llama(tied=kind == "tied llama")
    settings = {"scale_dtype": "bfloat16", "keep": ("gate_proj",), "embedding_bits": embedding_bits}
    made = make_parts(model, tmp_path / "run", encoding="affine", others=MIXED, **settings)
    found = log_probabilities(export(tmp_path, made), tokens())
    with torch.no_grad():
        expected = made.reference(tokens()).logits.log_softmax(-1).numpy()
        assert np.abs(model(tokens()).logits.log_softmax(-1).numpy() - expected).max() > 1e-2
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@needs_mlx
def test_what_mlx_quantized_reads_back(tmp_path: Path) -> None:
    """Its grids have negative scales, and scales that bfloat16 alone holds."""
    made = made_of(tmp_path, torch.bfloat16)
    directory = export(tmp_path, made)
    (directory / "accullm.json").unlink()
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(7))
    weight[0] = 1e6 * weight[0].abs()
    found = mx.quantize(mx.array(weight.numpy()).astype(mx.bfloat16), 32, 5)
    tensors = dict(zip(("weight", "scales", "biases"), found, strict=True))
    block = "model-00002-of-00003.safetensors"
    stored = load_file(directory / block)
    stored[f"{UP_PROJ}.weight"] = torch.from_numpy(np.array(tensors["weight"]).view(np.int32)).view(torch.uint32)
    for suffix in ("scales", "biases"):
        number = torch.from_numpy(np.array(tensors[suffix].astype(mx.float32)))
        stored[f"{UP_PROJ}.{suffix}"] = number.bfloat16()
    save_file(stored, directory / block)
    expected = mx.dequantize(tensors["weight"], *(tensors[s].astype(mx.float32) for s in ("scales", "biases")), 32, 5)
    assert np.array(tensors["scales"].astype(mx.float32)).min() < 0
    assert np.array_equal(open_artifact(directory).linear(UP_PROJ).dequantize().numpy(), np.array(expected))


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "tensor", "manifest", "message"),
    [
        ("scales", None, True, "{dir}: tensor {p}.scales is missing; copy the artifact again"),
        ("biases", None, True, "{dir}: tensor {p}.biases is missing; copy the artifact again"),
        ("scales", torch.zeros(2, dtype=torch.int32), True, "{block}: tensor {p}.scales is int32"),
        ("weight", torch.zeros(96, 64), True, "{block}: tensor {p}.weight is float32, expected uint32"),
        ("weight", None, False, "{dir}: tensor {p}.weight is missing; copy the artifact again"),
        ("scales", torch.zeros(96, 3), True, "{block}: tensor {p}.scales has shape [96, 3], expected [96, 2]"),
        (
            "scales",
            torch.zeros(96, 3),
            False,
            "{block}: tensor {p}.weight has 10 words for 3 groups, and 5 bits in groups of 32 take 15; "
            "copy the artifact again",
        ),
        (
            "weight",
            torch.zeros(4, 96, 10, dtype=torch.int32).view(torch.uint32),
            False,
            "{block}: tensor {p}.weight has shape [4, 96, 10], and only linears [N, K] and experts switch_mlp "
            "[E, N, K] are supported",
        ),
    ],
)
def test_damaged_tensors_are_refused(
    suffix: str, tensor: torch.Tensor | None, manifest: bool, message: str, tmp_path: Path
) -> None:
    directory = export(tmp_path, made_of(tmp_path))
    block = "model-00002-of-00003.safetensors"
    change_tensors(directory, block, UP_PROJ, {suffix: tensor})
    if not manifest:
        (directory / "accullm.json").unlink()
    with pytest.raises(AccullmError) as error:
        open_artifact(directory)
    assert error.value.line() == message.format(dir=directory, block=directory / block, p=UP_PROJ)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "mxfp4"}, "quantizes {first} in mode mxfp4, of which only affine is supported"),
        ({"bits": 7}, "gives {first} 7 bits in groups of 64, which is not supported"),
        ({"group_size": None}, "gives {first} 6 bits in groups of None, which is not supported"),
        ({"bits": [4]}, "gives {first} [4] bits in groups of 64, which is not supported"),
        ({UP_PROJ: {"bits": 5}}, "gives {up} 5 bits in groups of None, which is not supported"),
    ],
)
def test_a_config_of_another_scheme_is_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    directory = export(tmp_path, made_of(tmp_path))
    (directory / "accullm.json").unlink()
    config = json.loads((directory / "config.json").read_text())
    config["quantization"] |= changes
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(AccullmError) as error:
        open_artifact(directory)
    # q_proj is the first of those that are stored as most are.
    said = message.format(first="model.layers.0.self_attn.q_proj", up=UP_PROJ)
    assert error.value.line() == f"{directory}/config.json: {said}"


def test_a_scale_that_the_dtype_does_not_hold_is_refused() -> None:
    linear = linear_of(8, 64, 4, 32)
    linear = dataclasses.replace(linear, offsets=linear.offsets * (1 + 2**-9))
    with pytest.raises(AccullmError) as error:
        encode(linear, torch.bfloat16, "model.layers.0")
    assert error.value.line() == (
        "model.layers.0: one of the biases is not exactly representable in bfloat16; "
        "run profile again with --format mlx"
    )


def test_values_that_are_no_numbers_are_found(tmp_path: Path) -> None:
    directory = export(tmp_path, made_of(tmp_path))
    block = directory / "model-00002-of-00003.safetensors"
    tensors = load_file(block)
    tensors[f"{UP_PROJ}.biases"][3, 1] = float("nan")
    save_file(tensors, block)
    assert list(open_artifact(directory).problems()) == [f"{UP_PROJ}: biases holds NaN or infinity"]


# -- a mixture of experts ------------------------------------------------------------------------------------


KINDS = ("weight", "scales", "biases")


def described(tensors: dict[str, torch.Tensor], bits: int, group_size: int) -> np.ndarray:
    """The weight [N, K] in float32, as the format is described."""
    scales, biases = (tensors[kind].double().numpy().repeat(group_size, 1) for kind in ("scales", "biases"))
    return (unpacked(tensors["weight"], bits) * scales + biases).astype(np.float32)


def mixture(tmp_path: Path) -> Made:
    """Two experts' parameters of other bits."""
    model = tiny_mixtral(hidden=64, intermediate=96)
    others = {f"down_proj.{expert}": (3, 32) for expert in range(4)}
    return make_parts(model, tmp_path / "run", encoding="affine", others=others, scale_dtype="bfloat16")


def test_experts_lie_one_behind_the_other(tmp_path: Path) -> None:
    made = mixture(tmp_path)
    directory = write("mlx", tmp_path / "artifact", made)
    opened = open_artifact(directory)
    stored = {name: opened.files.tensor(name) for name in opened.files.infos}
    owner, tree = "model.layers.1.block_sparse_moe", "model.layers.1.mlp"
    assert {name.removeprefix(f"{owner}.") for name in stored if name.startswith(owner)} == {
        f"switch_mlp.{part}.{kind}"
        for part in ("gate_proj", "up_proj", "down_proj")
        for kind in ("weight", "scales", "biases")
    }
    for parameter, parts, bits in (("gate_up_proj", ("gate_proj", "up_proj"), 4), ("down_proj", ("down_proj",), 3)):
        for expert in range(4):
            rows = made.linears[f"{tree}.experts.{parameter}.{expert}"].dequantize().chunk(len(parts))
            for part, expected in zip(parts, rows, strict=True):
                own = {kind: stored[f"{owner}.switch_mlp.{part}.{kind}"][expert] for kind in KINDS}
                np.testing.assert_array_equal(described(own, bits, 32), expected.numpy())
    config = json.loads((directory / "config.json").read_text())["quantization"]
    assert (config["bits"], config["group_size"]) == (4, 32)
    assert config[f"{owner}.switch_mlp.down_proj"] == {"group_size": 32, "bits": 3}
    assert len(config) == 4


def test_experts_read_back(tmp_path: Path) -> None:
    made = mixture(tmp_path)
    opened = open_artifact(write("mlx", tmp_path / "artifact", made))
    assert dict(opened.plan.linears) == dict(made.parts.plan.linears)
    for name, linear in made.linears.items():
        assert torch.equal(opened.linear(name).dequantize(), linear.dequantize()), name
    gate = "model.layers.1.mlp.gate.weight"
    assert torch.equal(opened.tensor(gate), made.reference.get_parameter(gate))
    assert gate in opened.names()
    assert list(opened.problems()) == []
    codes = [tensor for tensors in opened.schema.values() for tensor in tensors]
    assert sum(map(opened.linear_bytes, opened.schema)) == sum(opened.files.infos[name].bytes for name in set(codes))
    planned = FORMATS["mlx"].linear_bytes
    assert all(opened.linear_bytes(n) == planned(row, torch.float32) for n, row in opened.plan.quantized.items())


@needs_mlx
def test_mlx_lm_loads_experts_with_equal_log_probabilities(tmp_path: Path) -> None:
    made = mixture(tmp_path)
    found = log_probabilities(write("mlx", tmp_path / "artifact", made), tokens())
    with torch.no_grad():
        expected = made.reference(tokens()).logits.log_softmax(-1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def as_mlx_lm_writes(tmp_path: Path) -> tuple[Path, Made]:
    """What mlx_lm.convert -q makes of a mixture: routers are quantized, and nothing lies beside its own files."""
    made = mixture(tmp_path)
    directory = write("mlx", tmp_path / "artifact", made)
    stored = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    config = json.loads((directory / "config.json").read_text())
    for number in range(2):
        router, name = made.reference.model.layers[number].mlp.gate.weight, f"model.layers.{number}.{GATE}"
        codes = quantize_affine(router.detach(), 8, 64)
        router.data = codes.dequantize()
        stored |= {f"{name}.{suffix}": tensor for suffix, tensor in encode(codes, torch.float32, name).items()}
        config["quantization"][name] = {"group_size": 64, "bits": 8}
    foreign = empty(tmp_path / "foreign")
    save_file(stored, foreign / "model.safetensors")
    (foreign / "config.json").write_text(json.dumps(config))
    return foreign, made


def test_the_experts_of_a_foreign_artifact_are_called_as_in_checkpoints(tmp_path: Path) -> None:
    directory, made = as_mlx_lm_writes(tmp_path)
    opened = open_artifact(directory)
    parts = {"w1": ("gate_up_proj", 0, 4), "w3": ("gate_up_proj", 1, 4), "w2": ("down_proj", 0, 3)}
    for expert in range(4):
        for part, (parameter, half, bits) in parts.items():
            name = f"model.layers.1.block_sparse_moe.experts.{expert}.{part}"
            whole = made.linears[f"model.layers.1.mlp.experts.{parameter}.{expert}"].dequantize()
            expected = whole.chunk(2)[half] if parameter == "gate_up_proj" else whole
            assert torch.equal(opened.linear(name).dequantize(), expected), name
            row = opened.plan.linears[name]
            assert (row.out_features, row.in_features, row.bits, row.group_size) == (*expected.shape, bits, 32)
            assert opened.linear_bytes(name) == row.weights * (bits + 64 / 32) / 8  # scales in float32
    assert opened.plan.linears[f"model.layers.0.{GATE}"].bits == 8
    assert sum(map(opened.linear_bytes, opened.schema)) == sum(
        opened.files.infos[name].bytes for name in {name for tensors in opened.schema.values() for name in tensors}
    )
    assert list(opened.problems()) == []


def test_a_foreign_mixture_runs_with_its_experts_and_routers(tmp_path: Path) -> None:
    directory, made = as_mlx_lm_writes(tmp_path)
    found = logits_by_blocks(open_artifact_decoder(directory), tokens())
    with torch.no_grad():
        torch.testing.assert_close(found, made.reference(tokens()).logits, atol=1e-5, rtol=0)


def test_parts_of_a_foreign_expert_in_several_ways_are_refused(tmp_path: Path) -> None:
    directory, _ = as_mlx_lm_writes(tmp_path)
    up = "model.layers.1.block_sparse_moe.switch_mlp.up_proj"
    stored = load_file(directory / "model.safetensors")
    weight = torch.randn(4 * 96, 64, generator=torch.Generator().manual_seed(5))
    for suffix, tensor in encode(quantize_affine(weight, 8, 32), torch.float32, up).items():
        stored[f"{up}.{suffix}"] = tensor.unflatten(0, (4, 96))
    save_file(stored, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["quantization"][up] = {"group_size": 32, "bits": 8}
    (directory / "config.json").write_text(json.dumps(config))
    experts = "model.layers.1.block_sparse_moe.experts"
    with pytest.raises(AccullmError) as error:
        open_artifact_decoder(directory)
    assert error.value.line() == (
        f"{directory}: {experts}.0.w1, {experts}.0.w3 are one linear, and stored in several ways"
    )


@needs_mlx
@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
def test_what_mlx_lm_makes_of_a_mixture_runs_as_there(name: str, tmp_path: Path) -> None:
    from mlx_lm import convert

    source = make_checkpoint(name, tmp_path / "model", torch.float32)
    edit_config(source, **with_earlier_keys(json.loads((source / "config.json").read_text())))
    directory = tmp_path / "artifact"
    convert(str(source), str(directory), quantize=True, q_bits=4, q_group_size=32, dtype="float32")
    ids = torch.randint(0, 256, (2, 11), generator=torch.Generator().manual_seed(1))
    found = logits_by_blocks(open_artifact_decoder(directory), ids).log_softmax(-1).numpy()
    np.testing.assert_allclose(log_probabilities(directory, ids), found, atol=1e-4, rtol=0)

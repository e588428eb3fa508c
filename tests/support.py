"""Tiny random models, and artifacts of them by plain nearest rounding: what tests of formats and loaders start from."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from accullm_cli.formats.base import ModelShape, Parts
from accullm_cli.measure.result import Clause, Estimate, Fidelity, Report
from accullm_cli.quant.linear import QuantizedLinear
from accullm_cli.quant.plan import LinearPlan, Plan

VOCABULARY = 96


def tiny_llama(tied: bool = False, dtype: torch.dtype = torch.float32, hidden: int = 64) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attention_bias=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        dtype=dtype,
    )
    return _with_biases(LlamaForCausalLM(config).to(dtype).eval())


def tiny_gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        dtype=torch.float32,
    )
    return _with_biases(GPT2LMHeadModel(config).eval())


def tiny_mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        dtype=torch.float32,
    )
    return MixtralForCausalLM(config).eval()


def _with_biases(model: nn.Module) -> nn.Module:
    """Biases are initialized to zero, where a lost one would not show."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def quantize_nearest(
    weight: torch.Tensor, bits: int, group_size: int, symmetric: bool, outliers: tuple[int, ...] = ()
) -> QuantizedLinear:
    """Round [N, K] to the nearest of each group's evenly spaced values. Scales hold in float16 and bfloat16."""
    rows, columns = weight.shape
    values = weight.detach().float().clone()
    values[:, list(outliers)] = 0
    size = columns if group_size == -1 else group_size
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scales, zeros = [], []
    for start in range(0, columns, size):
        group = values[:, start : start + size]
        low, high = group.amin(1, keepdim=True).clamp(max=0), group.amax(1, keepdim=True).clamp(min=0)
        if symmetric:
            scale = torch.maximum(-low, high) / (2 ** (bits - 1) - 0.5)
        else:
            scale = (high - low) / (2**bits - 1)
        scale = scale.clamp(min=1e-4).bfloat16().half()
        zero = torch.full_like(low, 2 ** (bits - 1)) if symmetric else (-low / scale.float()).round()
        zero = zero.clamp(0, 2**bits - 1)
        codes[:, start : start + size] = ((group / scale.float()).round() + zero).clamp(0, 2**bits - 1).byte()
        for feature in outliers:
            if start <= feature < start + size:
                codes[:, feature] = zero[:, 0].byte()
        scales.append(scale)
        zeros.append(zero.byte())
    return QuantizedLinear(
        codes=codes,
        scales=torch.cat(scales, 1),
        zeros=None if symmetric else torch.cat(zeros, 1),
        outlier_index=torch.tensor(outliers, dtype=torch.int32),
        outlier_weight=weight.detach()[:, list(outliers)].contiguous(),
        bits=bits,
        group_size=group_size,
    )


@dataclass(frozen=True)
class Made:
    """Parts of an artifact, what they hold, and the model with the weights that the artifact stands for."""

    parts: Parts
    linears: dict[str, QuantizedLinear]
    reference: nn.Module


def make_parts(
    model: nn.Module,
    run: Path,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = False,
    outliers: tuple[int, ...] = (),
    keep: tuple[str, ...] = (),
    scale_dtype: str = "float16",
    companions: tuple[Path, ...] = (),
) -> Made:
    """Quantize every linear in the model's blocks; `keep` names (by their ends) those that stay as they are."""
    run.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "model"):
        prefix, blocks = "model.layers", model.model.layers
    else:
        prefix, blocks = "transformer.h", model.transformer.h
    reference = copy.deepcopy(model)
    plans: dict[str, LinearPlan] = {}
    kinds: dict[str, str] = {}
    linears: dict[str, QuantizedLinear] = {}
    shards = []
    for number, block in enumerate(blocks):
        tensors = {f"{prefix}.{number}.{name}": tensor for name, tensor in block.state_dict().items()}
        for parameter, kind in _weights(block, f"{prefix}.{number}."):
            stacked = tensors.pop(parameter)
            target = reference.get_parameter(parameter).data
            for name, weight, slot in _slices(parameter, kind, stacked, target):
                kept = name.endswith(keep) if keep else False
                kinds[name] = kind
                itemsize = weight.element_size()
                if kept:
                    plans[name] = LinearPlan(name, *weight.shape, 16, -1, False, (), "kept by the test", itemsize)
                    tensors[f"{name}.weight"] = weight.T.contiguous() if kind == "conv1d" else weight.clone()
                    continue
                plans[name] = LinearPlan(name, *weight.shape, bits, group_size, symmetric, outliers, "", itemsize)
                linears[name] = quantize_nearest(weight, bits, group_size, symmetric, outliers)
                slot.copy_(linears[name].dequantize(weight.dtype))
                tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in linears[name].to_tensors().items()}
        shards.append(run / f"block-{number:05d}.safetensors")
        save_file(tensors, shards[-1])
    tied = model.config.tie_word_embeddings
    outside = [
        (name, tensor.clone())
        for name, tensor in model.state_dict().items()
        if not name.startswith(f"{prefix}.") and not (tied and name == "lm_head.weight")
    ]
    config = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    config["architectures"] = [type(model).__name__]
    parts = Parts(
        config=config,
        companions=companions,
        plan=Plan(plans, scale_dtype),
        shape=ModelShape(model.config.model_type, model.dtype, kinds),
        blocks=tuple(shards),
        outside=iter(outside),
        provenance={"source": {"name": "tiny", "sha256": "0" * 64}, "records": ["nothing to report"]},
    )
    return Made(parts, linears, reference)


def _weights(block: nn.Module, prefix: str) -> list[tuple[str, str]]:
    """Names of the parameters that hold linears, with their kind."""
    found = []
    for path, module in block.named_modules():
        name = prefix + path
        if isinstance(module, Conv1D):
            found.append((f"{name}.weight", "conv1d"))
        elif isinstance(module, nn.Linear):
            found.append((f"{name}.weight", "linear"))
        found += [
            (f"{name}.{key}", "expert") for key, value in module.named_parameters(recurse=False) if value.dim() == 3
        ]
    return found


def _slices(parameter: str, kind: str, stored: torch.Tensor, target: torch.Tensor):
    """Each linear of a parameter: its name, its weight [N, K], and the view of the reference's weight [N, K]."""
    name = parameter.removesuffix(".weight")
    if kind == "expert":
        return [(f"{name}.{e}", stored[e], target[e]) for e in range(len(stored))]
    if kind == "conv1d":
        return [(name, stored.T, target.T)]
    return [(name, stored, target)]


def tokens(batch: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def empty(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory


def sample_report(mean_kl: float = 0.05, windows: tuple[float, ...] = (0.04, 0.05, 0.06)) -> Report:
    """What validation might have measured."""

    def near(value: float) -> Estimate:
        return Estimate(value, value * 0.9, value * 1.1)

    fidelity = Fidelity(
        text="/home/somebody/held-out.txt",
        windows=len(windows),
        tokens=300,
        perplexity_original=near(10.0),
        perplexity=near(11.0),
        mean_kl=near(mean_kl),
        kl_p99=near(0.5),
        kl_p999=near(1.5),
        kl_max=2.5,
        top1_agreement=near(0.875),
        mean_kl_floor=near(0.0004),
        kl_of_window=windows,
        kl_histogram=((0.1, 200), (1.0, 100)),
    )
    return Report(
        schema_version=1,
        model="tiny",
        source_sha256="0" * 64,
        artifact="/home/somebody/tiny-int4",
        format="accullm",
        artifact_sha256="1" * 64,
        bits_per_weight=4.5,
        artifact_bytes=1000,
        source_bytes=4000,
        fidelity=fidelity,
        contract=(Clause("mean_kl<=0.02", "mean_kl", "<=", 0.02, mean_kl, mean_kl <= 0.02),),
        contract_met=mean_kl <= 0.02,
        records=(),
        stages=(),
        linears=(),
        versions={"torch": "2"},
    )

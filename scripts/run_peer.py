"""Quantize a model with another tool, and write down what its weights became and what that took.

`bench_peers.py` runs this file with the Python where the tool is installed, so it imports nothing of accullm and
imports a tool only in the function that uses it. Each tool calibrates on the windows in --tokens and saves in a format
of its own; weights and bits are read back from those files, and checked against the weights in the tool's memory.

    /path/to/its/python scripts/run_peer.py auto-round --model DIR --tokens FILE --out DIR

--out is then
    artifact/             what the tool saved
    weights.safetensors   each quantized linear's dequantized weight by the linear's name, float32 [N, K]
    peer.json             bits per weight, seconds of quantizing and saving, peak resident bytes, versions, settings
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from mlx_peers import mlx_lm, mlx_lm_dwq, mlx_lm_dynamic, mlx_lm_gptq
from peer_task import BITS, Quantized, Task, stored_tensors, unpack
from safetensors.torch import load_file, save_file

# Weights in memory may be a 16-bit rounding of what the stored codes and scales give, 0.2% of their norm; single ones
# differ more (AutoRound keeps other digits of some scales). Another zero point or another order of the codes is off by
# tens of percent.
TOLERANCE = 0.01


def main() -> None:
    """Run one tool."""
    options = parse()
    runner = RUNNERS[options.peer]
    calibration = load_file(options.tokens)["calibration"][: options.samples]
    artifact = options.out / "artifact"
    artifact.mkdir(parents=True, exist_ok=True)
    task = Task(
        options.model,
        calibration,
        options.group_size,
        options.symmetric,
        options.iterations,
        artifact,
        time.monotonic(),
    )
    quantized = runner.run(task)
    weights = {name: weight.float().contiguous() for name, weight in quantized.weights.items()}
    save_file(weights, options.out / "weights.safetensors")
    check(quantized)
    content = {
        "schema_version": 1,
        "bits_per_weight": bits_per_weight(quantized),
        **asdict(quantized.cost),
        "versions": {name: version(name) for name in (*runner.packages, "transformers", "torch")},
        "settings": {**quantized.settings, "threads": torch.get_num_threads()},
    }
    (options.out / "peer.json").write_text(json.dumps(content, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("peer", choices=sorted(RUNNERS))
    parser.add_argument("--model", type=Path, required=True, help="the original, a Hugging Face directory")
    parser.add_argument("--tokens", type=Path, required=True, help='safetensors with int64 "calibration" [S, T]')
    parser.add_argument("--out", type=Path, required=True, help="directory of the result")
    parser.add_argument("--samples", type=int, help="use only so many of the calibration windows")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--symmetric", action="store_true", help="scales without zero points")
    parser.add_argument(
        "--iterations", type=int, default=200, help="of AutoRound, for each block (200, its default); of mlx_lm.dwq"
    )
    return parser.parse_args()


def bits_per_weight(quantized: Quantized) -> float:
    """Everything stored for the linears' weights over their number: codes, scales, zero points, indices."""
    bits = 0
    for name, tensor in quantized.stored.items():
        module, _, kind = name.rpartition(".")
        if module in quantized.weights and kind != "bias":
            bits += 8 * tensor.nbytes
    return bits / sum(weight.numel() for weight in quantized.weights.values())


def check(quantized: Quantized) -> None:
    """The weights read back are those in the tool's memory; a wrong reading would be measured as the tool's loss."""
    for name, expected in quantized.in_memory.items():
        error = (quantized.weights[name] - expected.float()).norm().item()
        size = expected.float().norm().item()
        if not error <= TOLERANCE * size:
            sys.exit(f"{name}: read back with an error of {error:.2e}, where the weights' norm is {size:.2e}")


def load_original(directory: Path, dtype: torch.dtype) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return model.eval()


def linear_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the linears in the decoder's blocks (all but the output head), by name."""
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


# -- the format of GPTQ, which AutoRound and GPTQModel save ------------------------------------------------------


def gptq_weights(stored: Mapping[str, torch.Tensor], group_size: int) -> dict[str, torch.Tensor]:
    """Every linear's weight in the first version of the format of GPTQ, float32 [N, K] by the linear's name."""
    suffix = ".qweight"
    names = [name.removesuffix(suffix) for name in stored if name.endswith(suffix)]
    return {name: gptq_weight(stored, name, group_size) for name in names}


def gptq_weight(stored: Mapping[str, torch.Tensor], name: str, group_size: int) -> torch.Tensor:
    """One linear's weight, float32 [N, K].

    qweight int32 [K / 8, N] holds 8 codes of one output feature, low bits first; qzeros int32 [groups, N / 8] the zero
    points, less 1, of 8 neighbouring ones; scales [groups, N]; g_idx int32 [K], where there is one, the group of each
    input feature.
    """
    codes = unpack(stored[f"{name}.qweight"].T)  # [N, K]
    # A zero point of 0, less 1, is stored as 15.
    zeros = (unpack(stored[f"{name}.qzeros"]).T + 1) & (2**BITS - 1)  # [N, groups]
    scales = stored[f"{name}.scales"].float().T  # [N, groups]
    group = stored.get(f"{name}.g_idx", torch.arange(codes.shape[1]) // group_size).long()
    return (codes - zeros[:, group]).float() * scales[:, group]


# -- the tools -----------------------------------------------------------------------------------------------


def auto_round(task: Task) -> Quantized:
    """AutoRound (Cheng et al., 2023): learned rounding and clipping, block by block, by signed gradient descent."""
    from auto_round import AutoRound

    settings = {
        "bits": BITS,
        "group_size": task.group_size,
        "sym": task.symmetric,
        "iters": task.iterations,
        "seqlen": task.calibration.shape[1],
        "nsamples": len(task.calibration),
        "batch_size": 8,
        "low_gpu_mem_usage": False,
        "low_cpu_mem_usage": False,
    }
    # The tool takes a window that comes without a mask to end at its first separator, which is a padding token to it.
    windows = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])} for ids in task.calibration]
    tokenizer = transformers.AutoTokenizer.from_pretrained(task.model)
    model = load_original(task.model, torch.bfloat16)
    tool = AutoRound(model, tokenizer, dataset=windows, device_map="cpu", **settings)
    before = keep_blocks(task.artifact.with_name("blocks"))
    tool.quantize()
    in_memory = {name: weight.clone() for name, weight in linear_weights(tool.model).items()}
    # GPTQ's packing without its index. AutoRound's own choice takes the same bits, but 0.16.1 fails to save it.
    packing = "auto_round:auto_gptq"
    tool.save_quantized(str(task.artifact), format=packing, inplace=True)
    cost = task.cost()
    cost = replace(cost, seconds=cost.seconds + sum(before))
    stored = stored_tensors(task.artifact)
    settings = {**settings, "format": packing, "blocks of a run before": len(before)}
    return Quantized(cost, stored, gptq_weights(stored, task.group_size), in_memory, settings)


def keep_blocks(directory: Path) -> list[float]:
    """Have AutoRound store what it has learned for each block, and take it from there when it is run again.

    It may need hours, and stores nothing until the end. After a run that was interrupted the other blocks draw other
    batches than they would have.

    Returns: grows by the seconds that each block took which was there.
    """
    from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer
    from auto_round.wrapper import unwrapper_block

    directory.mkdir(exist_ok=True)
    learn, taken, numbers = SignRoundQuantizer.quantize_block, [], itertools.count()

    def quantize_block(self: Any, block: Any, *args: Any, **kwargs: Any) -> Any:
        path = directory / f"{next(numbers):03}.pt"
        if path.exists():
            kept = torch.load(path, weights_only=True)
            compiled = self.compress_context.enable_torch_compile
            self.wrapper_block(block, self.enable_minmax_tuning, self.enable_norm_bias_tuning, compiled, "cpu")
            with torch.no_grad():
                unwrapper_block(block, kept["parameters"])
            taken.append(kept["seconds"])
            return kept["parameters"]
        started = time.monotonic()
        parameters = learn(self, block, *args, **kwargs)
        torch.save({"parameters": parameters, "seconds": time.monotonic() - started}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
        return parameters

    SignRoundQuantizer.quantize_block = quantize_block
    return taken


def hqq(task: Task) -> Quantized:
    """HQQ (Badri and Shaji, 2023): half-quadratic search of the zero points, without calibration."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from hqq.models.hf.base import AutoHQQHFModel

    settings = {"nbits": BITS, "group_size": task.group_size}
    model = load_original(task.model, torch.float16)
    AutoHQQHFModel.quantize_model(
        model, quant_config=BaseQuantizeConfig(**settings), compute_dtype=torch.float16, device="cpu"
    )
    AutoHQQHFModel.save_quantized(model, str(task.artifact))
    cost = task.cost()
    stored = {
        f"{module}.{name}": value
        for module, state in torch.load(task.artifact / "qmodel.pt", weights_only=True).items()
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }
    linears = {name: module for name, module in model.named_modules() if isinstance(module, HQQLinear)}
    weights = {name: hqq_weight(stored, name, linear.meta["shape"]) for name, linear in linears.items()}
    in_memory = {name: linear.dequantize() for name, linear in linears.items()}
    return Quantized(cost, stored, weights, in_memory, settings)


def hqq_weight(stored: Mapping[str, torch.Tensor], name: str, shape: torch.Size) -> torch.Tensor:
    """One linear's weight, float32 [N, K].

    W_q uint8 [groups / 2, group_size] holds a code of the first half of all groups in its high bits and one of the
    second half in its low bits; scale and zero [groups, 1].
    """
    packed = stored[f"{name}.W_q"]
    codes = torch.cat([packed >> BITS, packed & (2**BITS - 1)]).float()
    return ((codes - stored[f"{name}.zero"].float()) * stored[f"{name}.scale"].float()).reshape(shape)


def llm_compressor(task: Task) -> Quantized:
    """llm-compressor: GPTQ (Frantar et al., 2022) with static activation order."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    scheme = {"num_bits": BITS, "strategy": "group", "group_size": task.group_size, "symmetric": task.symmetric}
    recipe = GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": scheme}}, ignore=["lm_head"])
    windows = {"input_ids": task.calibration.tolist(), "attention_mask": torch.ones_like(task.calibration).tolist()}
    model = load_original(task.model, torch.bfloat16)
    oneshot(
        model=model,
        tokenizer=transformers.AutoTokenizer.from_pretrained(task.model),
        dataset=Dataset.from_dict(windows),
        recipe=recipe,
        num_calibration_samples=len(task.calibration),
        max_seq_length=task.calibration.shape[1],
    )
    in_memory = {name: weight.clone() for name, weight in linear_weights(model).items()}
    model.save_pretrained(task.artifact, save_compressed=True)
    cost = task.cost()
    stored = stored_tensors(task.artifact)
    weights = {name: compressed_weight(stored, name, task.group_size) for name in in_memory}
    settings = {"modifier": "GPTQModifier", "weights": scheme}
    return Quantized(cost, stored, weights, in_memory, settings)


def compressed_weight(stored: Mapping[str, torch.Tensor], name: str, group_size: int) -> torch.Tensor:
    """One linear's weight, float32 [N, K], from the pack-quantized format of compressed-tensors.

    weight_packed int32 [N, K / 8] holds 8 codes of one row, low bits first, from -8 to 7 with 8 added; weight_scale
    [N, groups]; weight_zero_point int32 [N / 8, groups] the zero points of 8 neighbouring rows, packed likewise.
    """
    codes = unpack(stored[f"{name}.weight_packed"])  # [N, K]
    scales = stored[f"{name}.weight_scale"].float()  # [N, groups]
    if (packed_zeros := stored.get(f"{name}.weight_zero_point")) is None:
        zeros = torch.full(scales.shape, 2 ** (BITS - 1))
    else:
        zeros = unpack(packed_zeros.T).T[: len(scales)]  # [N, groups]
    group = torch.arange(codes.shape[1]) // group_size
    return (codes - zeros[:, group]).float() * scales[:, group]


def gptqmodel(task: Task) -> Quantized:
    """GPTQModel: GPTQ with its own activation order within groups."""
    # On a machine of two cores its own choice is one, of which it then wants two for loading and ends.
    if (os.cpu_count() or 1) < 3:
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    settings = {"bits": BITS, "group_size": task.group_size, "sym": task.symmetric}
    windows = [{"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)} for ids in task.calibration]
    model = GPTQModel.load(str(task.model), QuantizeConfig(**settings, device="cpu"))
    model.quantize(windows, batch_size=1)
    model.save(str(task.artifact))
    cost = task.cost()
    stored = stored_tensors(task.artifact)
    loaded = GPTQModel.load(str(task.artifact), device="cpu", backend=BACKEND.TORCH).model
    in_memory = {
        name: module.dequantize_weight().T for name, module in loaded.named_modules() if hasattr(module, "qweight")
    }
    return Quantized(cost, stored, gptq_weights(stored, task.group_size), in_memory, settings)


@dataclass(frozen=True)
class Runner:
    """A tool: the packages whose versions say what was run, and the function that runs it."""

    packages: tuple[str, ...]
    run: Callable[[Task], Quantized]


RUNNERS: Mapping[str, Runner] = {
    "auto-round": Runner(("auto-round",), auto_round),
    "gptqmodel": Runner(("gptqmodel",), gptqmodel),
    "hqq": Runner(("hqq",), hqq),
    "llm-compressor": Runner(("llmcompressor", "compressed-tensors"), llm_compressor),
    "mlx-lm": Runner(("mlx-lm", "mlx"), mlx_lm),
    "mlx-lm-dwq": Runner(("mlx-lm", "mlx"), mlx_lm_dwq),
    "mlx-lm-dynamic": Runner(("mlx-lm", "mlx"), mlx_lm_dynamic),
    "mlx-lm-gptq": Runner(("mlx-lm", "mlx"), mlx_lm_gptq),
}

if __name__ == "__main__":
    main()

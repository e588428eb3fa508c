"""mlx_lm's own ways to quantize; run_peer.py has the others.

On CPUs its wheel multiplies with a reference BLAS; with OpenBLAS in LD_PRELOAD that takes a tenth of the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peer_task import BITS, Quantized, Task, stored_tensors, unpack


def mlx_lm(task: Task) -> Quantized:
    """mlx_lm.convert -q: rounding to nearest, of embeddings, too."""
    from mlx_lm import convert

    settings = {"q_bits": BITS, "q_group_size": task.group_size}
    task.artifact.rmdir()  # which it wants to make
    convert(str(task.model), str(task.artifact), quantize=True, **settings)
    return mlx_quantized(task, settings)


def mlx_lm_gptq(task: Task) -> Quantized:
    """mlx_lm.gptq (Frantar et al., 2022)."""
    import mlx.core as mx
    from mlx_lm.quant.gptq import gptq_quantize

    # What it does not round with GPTQ are the embeddings; its own choice for them is 6 bits.
    settings = {"bits": BITS, "group_size": task.group_size, "fallback_bits": BITS}
    settings |= {"fallback_group_size": task.group_size, "batch_size": 8}
    loaded = MlxModel.load(task)
    model, config = gptq_quantize(loaded.model, mx.array(task.calibration.numpy()), **settings)
    return loaded.saved(task, model, {**loaded.config, "quantization": config}, settings)


# mlx_lm.dwq takes 512 batches of 4 windows by default, at a rate of 1e-6. Adam moves a parameter by no more than about
# the rate in a step, so that fewer steps need a higher one to come as far.
DWQ_BATCH, DWQ_WAY = 2, 512 * 1e-6


def mlx_lm_dwq(task: Task) -> Quantized:
    """mlx_lm.dwq: scales and offsets of mlx_lm.convert -q distilled, --iterations steps of two windows.

    Weights are dequantized before they are multiplied: CPUs multiply packed ones slowly there.
    """
    import copy

    import mlx.core as mx
    import mlx.nn
    from mlx.optimizers import Adam
    from mlx_lm.quant.dwq import dwq_quantize
    from mlx_lm.utils import quantize_model

    class Linear(mlx.nn.QuantizedLinear):  # type: ignore[misc]
        def __call__(self, features: Any) -> Any:
            found = features @ dense(self).T
            return found + self["bias"] if "bias" in self else found

    class Embedding(mlx.nn.QuantizedEmbedding):  # type: ignore[misc]
        def as_linear(self, features: Any) -> Any:
            return features @ dense(self).T

    def dense(module: Any) -> Any:
        return mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)

    loaded = MlxModel.load(task)
    model = copy.deepcopy(loaded.model)
    model, config = quantize_model(model, loaded.config, task.group_size, BITS)
    for _, module in model.named_modules():
        for kind in (Linear, Embedding):
            if type(module) in kind.__bases__:
                module.__class__ = kind
    windows = [(ids, 0) for ids in task.calibration.tolist()]
    passes = -(-task.iterations * DWQ_BATCH // len(windows))
    windows_of_all_steps = (passes * windows)[: task.iterations * DWQ_BATCH]
    settings = {"batch_size": DWQ_BATCH, "max_seq_length": task.calibration.shape[1], "seed": 123}
    rate = DWQ_WAY / task.iterations
    dwq_quantize(
        model,
        lambda batch, index, split: loaded.model(batch),
        Adam(learning_rate=rate, bias_correction=True),
        windows_of_all_steps,
        windows[:DWQ_BATCH],
        dtype=mx.float32,
        **settings,
    )
    settings |= {"bits": BITS, "group_size": task.group_size, "learning_rate": rate, "steps": task.iterations}
    return loaded.saved(task, model, config, settings)


def mlx_lm_dynamic(task: Task) -> Quantized:
    """mlx_lm.dynamic_quant: 4 bits, and 5 where its estimate says; 5 bits a weight of the whole model, its default."""
    import mlx.core as mx
    from mlx_lm.quant.dynamic_quant import estimate_sensitivities, estimate_threshold
    from mlx_lm.utils import quantize_model

    settings = {"low_bits": BITS, "low_group_size": task.group_size}
    settings |= {"high_bits": BITS + 1, "high_group_size": task.group_size}
    loaded = MlxModel.load(task)
    found = dict(estimate_sensitivities(loaded.model, mx.array(task.calibration.numpy()), **settings))
    loaded.model.set_dtype(loaded.stored_as)  # in which it counts bits
    target = 5.0
    threshold = estimate_threshold(loaded.model, found, target_bpw=target, **settings)

    def scheme(name: str, module: Any) -> bool | dict[str, int]:
        if not hasattr(module, "to_quantized"):
            return False
        return {"bits": BITS + 1, "group_size": task.group_size} if found[name] > threshold else True

    model, config = quantize_model(loaded.model, loaded.config, task.group_size, BITS, quant_predicate=scheme)
    return loaded.saved(task, model, config, {**settings, "target_bpw": target})


@dataclass(frozen=True)
class MlxModel:
    """The original in mlx_lm in float32: CPUs multiply numbers of 16 bits slowly there.

    stored_as: the dtype that its weights have.
    """

    model: Any
    tokenizer: Any
    config: dict[str, Any]
    stored_as: Any

    @staticmethod
    def load(task: Task) -> MlxModel:
        import mlx.core as mx
        from mlx_lm.utils import load

        model, tokenizer, config = load(str(task.model), return_config=True)
        stored_as = model.parameters()["model"]["norm"]["weight"].dtype
        model.set_dtype(mx.float32)
        return MlxModel(model, tokenizer, config, stored_as)

    def saved(self, task: Task, model: Any, config: dict[str, Any], settings: Mapping[str, Any]) -> Quantized:
        """Save what became of it."""
        from mlx_lm.utils import save

        model.set_dtype(self.stored_as)
        save(str(task.artifact), str(task.model), model, self.tokenizer, config)
        return mlx_quantized(task, settings)


def mlx_quantized(task: Task, settings: Mapping[str, Any]) -> Quantized:
    """What mlx_lm has saved, of the linears in the blocks."""
    import mlx.core as mx
    import mlx_lm as package

    cost = task.cost()
    stored = stored_tensors(task.artifact)
    names = [name.removesuffix(".scales") for name in stored if name.endswith(".scales") and ".layers." in name]
    loaded = dict(package.load(str(task.artifact))[0].named_modules())
    weights, in_memory = {}, {}
    for name in names:
        module = loaded[name]
        weights[name] = mlx_weight(stored, name, module.group_size, module.bits)
        dense = mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)
        in_memory[name] = torch.from_numpy(np.array(dense.astype(mx.float32)))
    return Quantized(cost, stored, weights, in_memory, settings)


def mlx_weight(stored: Mapping[str, torch.Tensor], name: str, group_size: int, bits: int) -> torch.Tensor:
    """One linear's weight, float32 [N, K].

    weight uint32 [N, K * bits / 32] holds the codes of one row one behind the other, low bits first; scales and biases
    [N, groups].
    """
    codes = unpack(stored[f"{name}.weight"].view(torch.int32), bits)
    scales, biases = stored[f"{name}.scales"].float(), stored[f"{name}.biases"].float()
    group = torch.arange(codes.shape[1]) // group_size
    return codes.float() * scales[:, group] + biases[:, group]

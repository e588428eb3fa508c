"""What quantize passed to rounding, and what it left in the run directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.linear import QuantizedLinear
from accullm_cli.quant.plan import Plan
from accullm_cli.stages.profile import load_plan
from tests.stages.references import Seen

LLAMA_ORDER = [
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
]


@dataclass(frozen=True)
class Call:
    """One call of `round_linears`, as the stage made it."""

    names: tuple[str, ...]
    hessian: torch.Tensor | None
    pulls: dict[str, torch.Tensor]
    importance: torch.Tensor | None
    seed: int
    source_dtype: torch.dtype
    fishers: dict[str, torch.Tensor]


def shard(run: Path, index: int) -> dict[str, torch.Tensor]:
    return load_file(run / "quantize" / f"block-{index:05d}.safetensors")


def record(run: Path, index: int) -> dict[str, object]:
    content: dict[str, object] = json.loads((run / "quantize" / f"block-{index:05d}.json").read_text())
    return content


def linear_of(run: Path, plan: Plan, name: str) -> QuantizedLinear:
    """One linear from its shard."""
    index = int(name.removeprefix("model.layers.").removeprefix("transformer.h.").split(".")[0])
    own = {
        key.removeprefix(f"{name}."): value for key, value in shard(run, index).items() if key.startswith(f"{name}.")
    }
    entry = plan.linears[name]
    linear = ENCODINGS[entry.encoding].from_tensors(own, entry)
    assert isinstance(linear, QuantizedLinear)
    return linear


def weights_of(run: Path) -> Callable[[str], torch.Tensor]:
    """Rounded weights [N, K] by name, as the shards hold them."""
    plan = load_plan(run / "plan.json")
    return lambda name: linear_of(run, plan, name).dequantize(torch.float32)


def close(found: torch.Tensor | None, expected: torch.Tensor) -> None:
    """Equal up to float32 sums, measured by the largest element."""
    assert found is not None
    np.testing.assert_allclose(found, expected, atol=2e-5 * float(expected.abs().max()), rtol=0)


def check_pulls(call: Call, original: Seen, rounded: Seen) -> None:
    """Against Y^T (O - P) / T. O and P are near each other, so float32 leaves fewer digits than for the Hessian."""
    y = rounded.inputs[call.names[0]]
    assert call.pulls.keys() == set(call.names)
    for name, found in call.pulls.items():
        expected = y.T @ (original.outputs[name] - rounded.outputs[name]) / len(y)
        assert expected.abs().max() > 1e-3
        np.testing.assert_allclose(found, expected, atol=1e-3 * float(expected.abs().max()), rtol=0)


def edit_plan(run: Path, **bits: int) -> None:
    """Give linears whose names end like this other bits; 16-bit ones have no outliers."""
    plan = json.loads((run / "plan.json").read_text())
    for end, value in bits.items():
        found = [entry for name, entry in plan["linears"].items() if name.endswith(end)]
        assert found
        for entry in found:
            entry["bits"] = value
            if value == 16:
                entry["outlier_index"] = []
    (run / "plan.json").write_text(json.dumps(plan))

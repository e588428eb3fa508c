"""How long llama.cpp takes over a token on a CPU, as far as the encodings of a file decide it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from accullm_cli.errors import AccullmError
from accullm_cli.model.gguf_file import MAGIC, GgufFile, read_gguf
from accullm_cli.quant.plan import KEPT_BITS, LinearPlan

# Over a weight, in that of IQ4_NL: one token at a time on a core of Zen 4, as scripts/bench_gguf_encodings.py measures
# it (docs/gguf.md).
TIMES: Mapping[str, float] = {
    "Q4_K": 0.91,
    "Q4_0": 0.98,
    "IQ4_NL": 1.0,
    "Q6_K": 1.23,
    "Q3_K": 1.31,
    "IQ4_XS": 1.49,
    "Q5_K": 1.53,
    "Q8_0": 1.73,
    "Q5_0": 2.02,
    "Q4_1": 2.10,
    "BF16": 2.14,
    "F16": 2.15,
    "Q5_1": 2.34,
}
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
# Matrices that are small and alike in all files of a model, or looked up: routers, positions.
_BESIDE = (".ffn_gate_inp.weight", ".ffn_gate_inp_shexp.weight", "position_embd.weight")


@dataclass(frozen=True)
class Pace:
    """What a file takes over a token; of a mixture, over the experts that a token meets.

    time: of its matrices, in that of a weight in IQ4_NL. expert_share: of all experts, those that a token meets.
    unknown: its encodings whose time is not known, by name; the time says nothing then.
    """

    time: float
    expert_share: float
    unknown: tuple[str, ...] = ()

    @classmethod
    def of(cls, file: GgufFile) -> Pace:
        """That of an opened file."""
        architecture = file.metadata.get("general.architecture")
        used, experts = (file.metadata.get(f"{architecture}.{key}") for key in ("expert_used_count", "expert_count"))
        share = used / experts if isinstance(used, int) and isinstance(experts, int) and 0 < used <= experts else 1.0
        time, unknown = 0.0, set()
        for name, tensor in file.tensors.items():
            looked_up = name == _EMBEDDING and _HEAD in file.tensors
            if len(tensor.shape) == 1 or looked_up or name.endswith((*_BESIDE, ".bias")):
                continue
            if tensor.kind.name not in TIMES:
                unknown.add(tensor.kind.name)
                continue
            time += prod(tensor.shape) * TIMES[tensor.kind.name] * (share if len(tensor.shape) == 3 else 1.0)
        return cls(time, share, tuple(sorted(unknown)))

    def of_row(self, row: LinearPlan, is_expert: bool) -> float:
        """What a linear of the same model takes; kept ones have the source's two bytes, or four."""
        known = TIMES["F16"] * row.source_itemsize / 2 if row.bits == KEPT_BITS else TIMES[row.encoding]
        return row.weights * known * (self.expert_share if is_expert else 1.0)


def pace_of(path: Path) -> Pace | None:
    """That of a file; None where it is no GGUF, or holds no matrix.

    Raises:
        AccullmError: it cannot be read, or begins as one and is damaged.
    """
    try:
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                return None
    except OSError as error:
        raise AccullmError(f"cannot be read ({error.strerror or error})", path) from None
    pace = Pace.of(read_gguf(path))
    return pace if pace.time or pace.unknown else None

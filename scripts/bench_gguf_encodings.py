"""How long llama.cpp takes over a weight on a CPU, by the encoding it is in: the table in `formats.gguf_pace`.

A model of random weights is quantized by llama.cpp to one encoding after the other, all of its matrices alike, and the
files take turns at decoding. Bring a core on which nothing else runs.

    python scripts/bench_gguf_encodings.py --work work/bench-gguf-encodings
"""

from __future__ import annotations

import argparse
import shutil
from contextlib import ExitStack
from pathlib import Path

from bench_gguf import unquantized
from llama_cpp import LlamaCpp
from random_model import ensure_model

# One file type for each encoding; Q4_K_S is Q4_K alone where the quantizer is told to mix nothing.
FILE_TYPES = {
    **{name: name for name in ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_K", "IQ4_NL", "IQ4_XS")},
    **{name: f"{name}_S" for name in ("Q3_K", "Q4_K", "Q5_K")},
}
UNIT = "IQ4_NL"
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 49152,
    "num_hidden_layers": 8,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("work/bench-gguf-encodings"))
    parser.add_argument("--tokenizer", type=Path, default=Path("work/smollm2-135m"), help="a model whose it has")
    parser.add_argument("--encodings", nargs="+", default=list(FILE_TYPES), metavar="NAME")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    options = parser.parse_args(arguments)
    llama, model = LlamaCpp(), options.work / "model"
    ensure_model(model, {**SHAPE, "num_hidden_layers": options.layers})
    # The model's own is of single bytes, which llama.cpp has not.
    shutil.copy(options.tokenizer / "tokenizer.json", model)
    source, _ = unquantized(model, options.work)
    files = {}
    for name in dict.fromkeys([UNIT, *options.encodings]):
        files[name] = options.work / f"{name}.gguf"
        if not files[name].exists():
            llama.quantize(source, files[name], FILE_TYPES[name], pure=True)
    prompt = list(range(1, 17))
    least = dict.fromkeys(files, float("inf"))
    with ExitStack() as opened:
        models = {name: opened.enter_context(llama.model(path, 512)) for name, path in files.items()}
        for _ in range(options.turns):
            for name, loaded in models.items():
                least[name] = min(least[name], 1000 / loaded.tokens_per_second(prompt, options.tokens))
    print("| encoding | milliseconds a token, the least of the turns | of that of IQ4_NL |")
    print("| --- | --- | --- |")
    for name, took in sorted(least.items(), key=lambda entry: entry[1]):
        print(f"| {name} | {took:.2f} | {took / least[UNIT]:.2f} |")


if __name__ == "__main__":
    main()

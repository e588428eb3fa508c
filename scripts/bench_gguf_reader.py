"""Is a GGUF file in llama.cpp what accullm reads in it? Mean KL between the two, over the same windows.

    python scripts/bench_gguf.py --types Q4_K_M
    python scripts/bench_gguf_reader.py [FILE ...]

takes the files that bench_gguf.py left, by default a pair, and its held-out windows. On a CPU llama.cpp rounds what it
multiplies quantized weights by to 8 bits; accullm reads weights, and computes in float32. So the same weights in
float32, as llama.cpp's own dequantization gives them, are held against accullm, too: what the two have apart there is
no difference of weights, nor of the model.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from bench_gguf import THEIRS, held_out, log_softmax, measure
from llama_cpp import LlamaCpp

from accullm_cli.formats import adopted
from accullm_cli.stages.artifact_weights import open_artifact_decoder


def read_by_accullm(path: Path, windows: Sequence[list[int]], scratch: Path) -> Iterator[np.ndarray]:
    """Log-probabilities of a file, float32 [T, vocabulary] of each window, as `accullm validate` has them."""
    decoder = open_artifact_decoder(adopted(path, scratch))
    decoder.load_outside()
    for index in range(len(decoder.block_names)):
        decoder.load_block(index)
    for window in windows:
        with torch.no_grad():
            logits = decoder.model(torch.tensor([window]), use_cache=False).logits[0]
        yield log_softmax(logits.numpy()).astype(np.float32)


def divergence(known: np.ndarray, found: np.ndarray) -> float:
    """Mean KL from `known` to `found`, log-probabilities [T, vocabulary], in nats."""
    first, second = known.astype(np.float64), found.astype(np.float64)
    return float((np.exp(first) * (first - second)).sum(-1).mean())


def compare(llama: LlamaCpp, path: Path, windows: Sequence[list[int]], threads: int = 1) -> tuple[float, float]:
    """Mean KL from llama.cpp's distributions to accullm's: of the file, and of its weights in float32."""
    with tempfile.TemporaryDirectory() as place:
        single = Path(place) / "float32.gguf"
        llama.quantize(path, single, "F32", threads=threads)
        ours = list(read_by_accullm(path, windows, Path(place) / "adopted"))

        def apart(file: Path) -> float:
            return float(np.mean([*map(divergence, measure(llama, file, windows, threads), ours)]))

        return apart(path), apart(single)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE")
    parser.add_argument("--work", type=Path, default=Path("work/bench-gguf/smollm2-135m"), help="of bench_gguf.py")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    work = options.work
    ours = sorted((work / "accullm-Q4_K_M").glob("*.gguf"))
    files = options.files or [work / f"{THEIRS}Q4_K_M.gguf", *ours]
    windows = held_out(work / "run", options.windows, options.seq_len)
    llama = LlamaCpp()
    print("| file | llama.cpp and accullm, mean KL | with the weights in float32 |")
    print("| --- | --- | --- |")
    for path in files:
        as_it_is, single = compare(llama, path, windows, options.threads)
        print(f"| {path.parent.name}/{path.name} | {as_it_is:.2e} | {single:.2e} |", flush=True)


if __name__ == "__main__":
    main()

"""Measure a model directory in the stock client of this Python; bench_runtimes.py starts it.

It needs the client, numpy, and nothing of this project. Original and artifact are loaded by the client's own loader:

    python run_client.py mlx_lm --original DIR --artifact DIR --windows FILE.npz --out FILE.npz

--windows has "ids", int64 [V, T]. --out is then

    kl                  float64 [V, T], KL(original || artifact) of each position in nats, both in float32
    agrees              bool [V, T], whether both have the same most likely token
    logits              float32 [P, vocabulary] of the first P tokens of the first window, by the client's own
                        products of packed weights where it has such, in float32
    tokens_per_second   float64, one token after the other, in the dtype that the client chooses by itself
    versions            str, JSON
"""

from __future__ import annotations

import argparse
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

# Logits [T, vocabulary] in float32, of token ids int64 [T].
Logits = Callable[[np.ndarray], np.ndarray]
PROMPT_TOKENS = 16


class Client(ABC):
    """How one client loads a directory and runs it."""

    packages: tuple[str, ...]
    # Packed products may be slow on a CPU.
    generated_tokens: int

    @abstractmethod
    def packed(self, directory: Path) -> Logits:
        """The model as the client runs it, in float32."""

    @abstractmethod
    def dequantized(self, directory: Path) -> Logits:
        """The same, where the client can unpack weights once and for all."""

    @abstractmethod
    def seconds(self, directory: Path, prompt: np.ndarray, count: int) -> float:
        """What it takes to generate so many tokens, the prompt apart."""


class MlxLm(Client):
    """mlx_lm. On CPUs its products take 0.1 s a token for a model of 135 million parameters, of packed weights 0.8 s.

    So many tokens run on the weights that mlx dequantizes to, multiplied by transformers, which comes with mlx_lm.
    """

    packages = ("mlx", "mlx-lm")
    generated_tokens = 6

    def packed(self, directory: Path) -> Logits:
        return self._logits(self._model(directory))

    def dequantized(self, directory: Path) -> Logits:
        import mlx.core as mx
        import torch
        import transformers
        from mlx.utils import tree_flatten
        from mlx_lm.utils import dequantize_model

        weights = {
            name: torch.from_numpy(np.array(weight.astype(mx.float32)))
            for name, weight in tree_flatten(dequantize_model(self._model(directory)).parameters())
        }
        config = transformers.AutoConfig.from_pretrained(directory)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        missing, unknown = model.load_state_dict(weights, strict=False)
        if unknown or set(missing) - set(model.all_tied_weights_keys):
            raise SystemExit(f"mlx_lm has {unknown or 'no'} weights where transformers has {missing or 'none'}")
        return torch_logits(model)

    def seconds(self, directory: Path, prompt: np.ndarray, count: int) -> float:
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        moments = []
        for _ in generate_step(mx.array(prompt), self._model(directory), max_tokens=count + 1):
            moments.append(time.perf_counter())
        return moments[-1] - moments[0]

    def _model(self, directory: Path) -> Any:
        import mlx_lm

        return mlx_lm.load(str(directory))[0]

    def _logits(self, model: Any) -> Logits:
        """In float32, scales and offsets of packed weights included."""
        import mlx.core as mx

        model.set_dtype(mx.float32)
        return lambda ids: np.array(model(mx.array(ids)[None])[0])


class Transformers(Client):
    """transformers with whatever package an artifact's format needs; it unpacks weights when it first runs."""

    packages = ("transformers", "torch")
    generated_tokens = 32

    def packed(self, directory: Path) -> Logits:
        import torch

        return torch_logits(self._model(directory, torch.float32))

    def dequantized(self, directory: Path) -> Logits:
        return self.packed(directory)

    def seconds(self, directory: Path, prompt: np.ndarray, count: int) -> float:
        import torch

        model = self._model(directory, "auto")

        def took(tokens: int) -> float:
            started = time.perf_counter()
            ids = torch.from_numpy(prompt)[None]
            model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
            return time.perf_counter() - started

        took(1)  # unpacks
        return took(count + 1) - took(1)

    def _model(self, directory: Path, dtype: Any) -> Any:
        import transformers

        return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def torch_logits(model: Any) -> Logits:
    """By a model of transformers in float32."""
    import torch

    @torch.no_grad()
    def logits(ids: np.ndarray) -> np.ndarray:
        found: np.ndarray = model(torch.from_numpy(ids)[None], use_cache=False).logits[0].float().numpy()
        return found

    return logits


CLIENTS: Mapping[str, Client] = {"mlx_lm": MlxLm(), "transformers": Transformers()}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 of float32 [T, vocabulary]."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    found: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


def divergence(original: Logits, artifact: Logits, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """KL(original || artifact) of each position, and whether both have the same most likely token: [V, T] both."""
    kl, agrees = np.empty(windows.shape), np.empty(windows.shape, dtype=bool)
    for window, ids in enumerate(windows):
        known, found = log_softmax(original(ids)), log_softmax(artifact(ids))
        kl[window] = (np.exp(known) * (known - found)).sum(-1)
        agrees[window] = known.argmax(-1) == found.argmax(-1)
    return kl, agrees


def main() -> None:
    """Measure one artifact."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("client", choices=sorted(CLIENTS))
    for name in ("original", "artifact", "windows", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    client, windows = CLIENTS[options.client], np.load(options.windows)["ids"]
    prompt = windows[0, :PROMPT_TOKENS]
    kl, agrees = divergence(client.dequantized(options.original), client.dequantized(options.artifact), windows)
    logits = client.packed(options.artifact)(prompt)
    seconds = client.seconds(options.artifact, prompt, client.generated_tokens)
    np.savez(
        options.out,
        kl=kl,
        agrees=agrees,
        logits=logits,
        tokens_per_second=client.generated_tokens / seconds,
        versions=json.dumps({name: version(name) for name in client.packages}),
    )


if __name__ == "__main__":
    main()

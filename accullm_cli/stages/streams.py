"""Activation streams: hidden states between two blocks, stored now and then so that a resume need not begin again."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from accullm_cli.run import write_file

# A resume repeats at most about this much forward work.
SECONDS_BETWEEN_STORES = 60.0


class StreamStore:
    """One file with the streams after some number of blocks, valid for one chain of block keys."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last = time.monotonic()

    def store_if_due(self, key: str, streams: dict[str, torch.Tensor]) -> None:
        """Store the streams behind the block with this key, if the last store is long enough ago."""
        if time.monotonic() - self._last >= SECONDS_BETWEEN_STORES:
            write_file(self.path, lambda temporary: save_file(streams, temporary, metadata={"key": key}))
            self._last = time.monotonic()

    def restore(self, keys: list[str]) -> tuple[int, dict[str, torch.Tensor]] | None:
        """The number of blocks behind the stored streams and the streams; None where none fits.

        Args:
            keys: keys of the finished blocks, in order.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                key = (file.metadata() or {}).get("key")
                if key not in keys:
                    return None
                return keys.index(key) + 1, {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError):
            return None

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

"""A weight that is dequantized when it is used, for modeling code that reads weights instead of calling modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class LazyWeight:
    """Behaves like the tensor that `dequantize` returns. That is called for each use of the values; nobody keeps them.

    `linear.weight.dtype` costs nothing; `x @ linear.weight.T` and `F.linear(x, linear.weight)` cost a dequantization.
    It says of itself that it is initialized, so that transformers writes nothing to it.
    """

    _is_hf_initialized = True

    def __init__(self, shape: tuple[int, ...], like: torch.Tensor, dequantize: Callable[[], torch.Tensor]) -> None:
        """`like`: a tensor of the weight's dtype and on its device."""
        self.shape = torch.Size(shape)
        self.dtype = like.dtype
        self.device = like.device
        self.ndim = len(shape)
        self.requires_grad = False
        self._dequantize = dequantize

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*map(_tensor, args), **{key: _tensor(value) for key, value in (kwargs or {}).items()})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name}")
        return getattr(self._dequantize(), name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._dequantize()[index]

    def __len__(self) -> int:
        return self.shape[0]

    def __matmul__(self, other: Any) -> torch.Tensor:
        return self._dequantize() @ _tensor(other)

    def __rmatmul__(self, other: torch.Tensor) -> torch.Tensor:
        return other @ self._dequantize()

    def __mul__(self, other: Any) -> torch.Tensor:
        return self._dequantize() * _tensor(other)

    __rmul__ = __mul__

    def size(self, dim: int | None = None) -> Any:
        """As torch.Tensor.size."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As torch.Tensor.dim."""
        return self.ndim

    def numel(self) -> int:
        """As torch.Tensor.numel."""
        return self.shape.numel()


def _tensor(value: Any) -> Any:
    return value._dequantize() if isinstance(value, LazyWeight) else value

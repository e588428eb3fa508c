"""The modules that stand in for a model's own, with weights as the native format stores them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from accullm_cli.formats.accullm import SUFFIXES, linear_schema
from accullm_cli.kernels.matmul import hybrid_matmul
from accullm_cli.kernels.stored_weight import StoredWeight
from accullm_cli.lazy_weight import LazyWeight
from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.plan import LinearPlan


class HybridWeight(StoredWeight):
    """A weight [N, K] as codes, group scales and outlier features, in the buffers of the native format."""

    like: torch.Tensor

    def __init__(self, plan: LinearPlan, outliers: int, outlier_dtype: torch.dtype, dtype: torch.dtype) -> None:
        """Empty buffers on the meta device; `dtype`: of the activations."""
        schema = linear_schema(plan, outliers, outlier_dtype)
        buffers: dict[str, torch.Tensor | None] = {}
        for suffix in SUFFIXES:
            wanted = schema.get(f"{plan.name}.{suffix}")
            buffers[suffix] = None if wanted is None else torch.empty(wanted.shape, dtype=wanted.dtype, device="meta")
        levels = ENCODINGS[plan.encoding].levels(plan)
        super().__init__(buffers, plan.in_features, plan.bits, plan.group_size, levels)
        self.out_features = plan.out_features
        # Follows `model.to(...)`, and so knows the dtype of the activations.
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}"


class HybridLinear(HybridWeight):
    """Stands in for a torch.nn.Linear or a Conv1D."""

    bias: nn.Parameter | None

    def __init__(
        self,
        plan: LinearPlan,
        outliers: int,
        outlier_dtype: torch.dtype,
        dtype: torch.dtype,
        bias: nn.Parameter | None,
        transposed: bool = False,
    ) -> None:
        super().__init__(plan, outliers, outlier_dtype, dtype)
        self.transposed = transposed  # a Conv1D's weight is [K, N]
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> LazyWeight:
        """For modeling code that reads it; `forward` does not."""
        shape = (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)
        return LazyWeight(shape, self.like, self._dequantized)

    def _dequantized(self) -> torch.Tensor:
        weight = self.dequantize(self.like.dtype)
        return weight.T if self.transposed else weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] to [..., N] in x's dtype."""
        return hybrid_matmul(x, self.operand(x), self.bias)


class HybridEmbedding(HybridWeight):
    """Stands in for a torch.nn.Embedding; only the rows that are looked up are dequantized."""

    def __init__(self, plan: LinearPlan, embedding: nn.Embedding, dtype: torch.dtype) -> None:
        super().__init__(plan, 0, dtype, dtype)
        # What the model's own kind of embedding makes of a row, such as scale it, it does still.
        self.lookup = embedding
        del embedding.weight
        embedding.weight = torch.empty(0)  # no parameter: a place for the rows
        embedding.padding_idx = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids, int64 [...], to [..., K] in the model's dtype."""
        rows = self.quantized(ids.flatten()).dequantize(self.like.dtype)
        places = torch.arange(len(rows), device=ids.device).view(ids.shape)
        looked_up: torch.Tensor = functional_call(self.lookup, {"weight": rows}, (places,))
        return looked_up


class TiedHead(nn.Module):
    """Stands in for an output head that shares its weight with the embedding: it has no buffers of its own."""

    bias: nn.Parameter | None

    def __init__(self, embedding: HybridEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._shared = (embedding,)  # in a tuple, so that it is not registered under a second name
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] to logits [..., N] in x's dtype."""
        (embedding,) = self._shared
        return hybrid_matmul(x, embedding.operand(x), self.bias)


class KeptWeight(nn.Module):
    """An expert's weight [N, K] that was left as it is, among quantized ones."""

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device="meta"), False)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.to(dtype)


class HybridExperts(nn.Module):
    """Stands in for a parameter that holds the weights of E experts: [E, N, K], or as `transposed` says [E, K, N].

    Indexing gives one expert's weight; everything else that is done to a tensor is done to all of them, dequantized. A
    parameter of two dimensions, [E N, K] or [E K, N], is used as a whole.
    """

    like: torch.Tensor
    _is_hf_initialized = True  # nothing of it is left to initialize

    def __init__(
        self, experts: list[HybridWeight | KeptWeight], dtype: torch.dtype, shape: torch.Size, transposed: bool
    ) -> None:
        super().__init__()
        self.transposed = transposed
        self.stored_shape = shape
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)
        # Follows `model.to(...)`, and so knows the dtype of the activations.
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*map(_as_weight, args), **{key: _as_weight(value) for key, value in (kwargs or {}).items()})

    def __len__(self) -> int:
        return self.stored_shape[0]

    def __getitem__(self, index: Any) -> torch.Tensor:
        """One expert's weight, or another part of the parameter, in the model's dtype."""
        number = index.item() if isinstance(index, torch.Tensor) and index.numel() == 1 else index
        if isinstance(number, int) and len(self.stored_shape) == 3:
            return self._expert(number % len(self))
        return self.as_weight()[index]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(torch.Tensor, name):
                raise
        return getattr(self.as_weight(), name)

    def __matmul__(self, other: torch.Tensor) -> torch.Tensor:
        return self.as_weight() @ other

    def __rmatmul__(self, other: torch.Tensor) -> torch.Tensor:
        return other @ self.as_weight()

    def as_weight(self) -> LazyWeight:
        """The whole parameter."""
        return LazyWeight(self.stored_shape, self.like, self._dequantized)

    def _dequantized(self) -> torch.Tensor:
        return torch.stack([self._expert(number) for number in range(len(self._modules))]).view(self.stored_shape)

    def _expert(self, number: int) -> torch.Tensor:
        expert = self.get_submodule(str(number))
        assert isinstance(expert, HybridWeight | KeptWeight)
        weight = expert.dequantize(self.like.dtype)
        return weight.T if self.transposed else weight


def _as_weight(value: Any) -> Any:
    return value._dequantized() if isinstance(value, HybridExperts) else value

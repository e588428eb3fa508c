"""The bit plan: how every linear is to be stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from accullm_cli.quant.encodings import ENCODINGS

# The bits of a linear that is left as it is in the source.
KEPT_BITS = 16


@dataclass(frozen=True)
class LinearPlan:
    """How one linear of shape [N, K] is stored.

    bits: 2 to 8, or 16 for "left as it is in the source".
    group_size: input features that share a scale; -1 for one scale per output row. A last shorter group is allowed.
    scale_bits: 16 for a float16 per scale; else the bits of its place in a table of 2**scale_bits scales.
    symmetric: the zero point is 2**(bits-1) and is not stored.
    outlier_index: ascending input features that stay in the source's dtype.
    adapter: what holds them beside the artifact's files, see `Capabilities.adapter`; "" where the files do.
    source_itemsize: bytes of one weight in the source's dtype.
    encoding: the name of the way in which codes and grid are stored; see `quant.encodings`.
    """

    name: str
    out_features: int
    in_features: int
    bits: int
    group_size: int
    symmetric: bool
    outlier_index: tuple[int, ...] = ()
    source_itemsize: int = 2
    scale_bits: int = 16
    encoding: str = "integer"
    adapter: str = ""

    @property
    def groups(self) -> int:
        """Scales per output row: ceil(K / group size)."""
        return 1 if self.group_size == -1 else -(-self.in_features // self.group_size)

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def stored_bytes(self) -> int:
        """Bytes of everything that is stored: what the encoding has, outlier features and their index."""
        if self.bits == KEPT_BITS:
            return self.source_itemsize * self.weights
        return ENCODINGS[self.encoding].stored_bytes(self) + self.outlier_bytes * len(self.outlier_index)

    @property
    def outlier_bytes(self) -> int:
        """Bytes that are stored for an outlier feature: its weights and where it is.

        An adapter has a row of ones and zeros for that, 8 bits each, and 16 bits a weight.
        """
        if self.adapter:
            return self.in_features + 2 * self.out_features
        return self.source_itemsize * self.out_features + 4


@dataclass(frozen=True)
class Plan:
    """How every linear of a model is stored, by name, in model order.

    linears: those in the decoder's blocks.
    scale_dtype: "float16", or "bfloat16" where an export stores scales in bfloat16: scales are then rounded to
    values that both hold exactly.
    embeddings: token embedding and output head, [vocabulary, hidden] each, where they are quantized; one entry where
    they are tied.
    """

    linears: Mapping[str, LinearPlan]
    scale_dtype: str = "float16"
    embeddings: Mapping[str, LinearPlan] = field(default_factory=dict)

    @property
    def quantized(self) -> dict[str, LinearPlan]:
        """All that is stored as codes: linears that are not left as they are, and embeddings."""
        linears = {name: linear for name, linear in self.linears.items() if linear.bits != KEPT_BITS}
        return linears | dict(self.embeddings)

    @property
    def bits_per_weight(self) -> float:
        """Everything stored for the linear weights, in bits, over their number; embeddings do not count."""
        weights = sum(linear.weights for linear in self.linears.values())
        return 8 * sum(linear.stored_bytes for linear in self.linears.values()) / weights

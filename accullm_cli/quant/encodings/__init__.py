"""The ways to store a linear, by the names that rows of a plan have for them."""

from __future__ import annotations

from collections.abc import Mapping

from accullm_cli.quant.encodings.affine import AffineGroups
from accullm_cli.quant.encodings.base import Encoding
from accullm_cli.quant.encodings.ggml import GgmlBlocks
from accullm_cli.quant.encodings.ggml_layout import BLOCK_TYPES
from accullm_cli.quant.encodings.integer import IntegerZero, PositiveZero
from accullm_cli.quant.encodings.levels import LevelGroups
from accullm_cli.quant.encodings.trellis import TrellisGroups

_BLOCKS = tuple(map(GgmlBlocks, BLOCK_TYPES.values()))
ENCODINGS: Mapping[str, Encoding] = {
    encoding.name: encoding
    for encoding in (IntegerZero(), PositiveZero(), LevelGroups(), TrellisGroups(), AffineGroups(), *_BLOCKS)
}

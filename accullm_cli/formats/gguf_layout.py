"""Which tensors of a GGUF file the parameters and linears of an artifact are, and what type each has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gguf import GGMLQuantizationType
from transformers import PreTrainedConfig

from accullm_cli.errors import AccullmError
from accullm_cli.model.gguf_architectures import Architecture, placed
from accullm_cli.model.skeleton import build_skeleton, stored_shapes
from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.plan import LinearPlan, Plan


class Layout:
    """Which tensors of a GGUF file the parameters of a model are.

    parameters: their shapes by name, tied ones once, and those of buffers that a checkpoint holds. pieces: of each.
    linears: of those whose codes are stored, the names of their linears, in a stack one for each expert.
    """

    @classmethod
    def of(cls, directory: Path, config: PreTrainedConfig, architecture: Architecture, plan: Plan) -> Layout:
        """That of the model whose config.json lies in a directory.

        Raises:
            AccullmError: the plan has a linear that the model has not.
        """
        model = build_skeleton(directory)
        layout = cls(stored_shapes(model), config, architecture, plan)
        found = {linear for own in layout.linears.values() for linear in own}
        for linear in plan.quantized:
            if linear not in found:
                raise AccullmError(f"{linear} is no linear of this model", directory, "copy the artifact again")
        return layout

    def __init__(
        self,
        parameters: Mapping[str, tuple[int, ...]],
        config: PreTrainedConfig,
        architecture: Architecture,
        plan: Plan,
    ) -> None:
        self.parameters = parameters
        self.config, self.architecture, self.plan = config, architecture, plan
        self.pieces = placed(architecture, config, self.parameters)
        self._quantized = quantized = plan.quantized
        self.linears: dict[str, tuple[str, ...]] = {}
        for name, shape in self.parameters.items():
            own: tuple[str, ...] = (name.removesuffix(".weight"),)
            if len(shape) == 3:
                own = tuple(f"{name}.{number}" for number in range(shape[0]))
            if own[0] in quantized:
                self.linears[name] = own

    def row(self, parameter: str) -> LinearPlan:
        """How the linears of a parameter are stored, which for a stack is the same for all."""
        return self._quantized[self.linears[parameter][0]]


def ggml_type(row: LinearPlan) -> GGMLQuantizationType:
    """What ggml calls the encoding of a row."""
    return GGMLQuantizationType[ENCODINGS[row.encoding].ggml_type]  # type: ignore[attr-defined]

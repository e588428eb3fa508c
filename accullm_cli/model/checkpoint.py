"""Reading a checkpoint a part at a time into a model that has no weights.

Names and layouts differ between a checkpoint and the module tree (prefixes, renamed parts, experts stored one by
one): transformers' own conversion rules translate them, here for a few tensors at a time.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from accullm_cli.errors import AccullmError
from accullm_cli.model.ahead import ReadAhead, fetch
from accullm_cli.model.integrity import read_tensor
from accullm_cli.model.names import destinations
from accullm_cli.model.source import ModelSource, TensorInfo, check_finite, check_shapes


class Checkpoint:
    """The weights of `source` by the names they have in `model`'s module tree.

    Raises:
        AccullmError: a tensor is missing, or has another shape than the configuration says; parts of a parameter that
            do not fit together.
    """

    def __init__(self, source: ModelSource, model: PreTrainedModel) -> None:
        self.source = source
        self.model = model
        self._rules = get_model_conversion_mapping(model)
        self._tied = dict(model.all_tied_weights_keys)
        self._sources = self._match_names()
        self._check_complete()
        self._give_source_dtypes()
        self._check_conversions()
        self._meta = dict(model.named_parameters(remove_duplicate=False))
        self._ahead = ReadAhead()

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of the parameter or buffer `name`."""
        if name in self._meta:
            return self._meta[name].dtype
        if name in self._sources:
            return self.source.tensors[self._sources[name][0]].torch_dtype
        return self.model.get_buffer(name).dtype  # as the class computes it: it is not stored

    def load(self, prefixes: Iterable[str]) -> None:
        """Read every parameter under the given module names, as stored, and check that it is finite.

        Raises:
            AccullmError: NaN or Inf; a converted tensor that does not fit its parameter.
        """
        prefixes = tuple(f"{prefix}." for prefix in prefixes)
        wanted = {name for name in self._sources if name.startswith(prefixes)}
        self._load(wanted)
        for name, other in self._tied.items():
            if name.startswith(prefixes) and name not in self._sources:
                self._place(name, self._value(other) if other in wanted else self.read(other))

    def load_outside(self, blocks: Iterable[str], without: Container[str] = frozenset()) -> None:
        """Read every parameter that lies outside the given blocks, but those in `without`."""
        prefixes = tuple(f"{block}." for block in blocks)
        self._load({name for name in self._sources if not name.startswith(prefixes) and name not in without})

    def warm(self, prefix: str, device: torch.device) -> None:
        """Begin to fetch what `load` of this module will want, while the caller goes on.

        For a CPU into the system's page cache, from where it comes at the speed of memory; for a GPU into pinned
        memory, a block in its stored form more.
        """
        wanted = [stored for name, stored in self._sources.items() if name.startswith(f"{prefix}.")]
        infos = dict.fromkeys(self.source.tensors[part] for stored in wanted for part in stored)
        if device.type == "cpu":
            fetch(infos)
        else:
            self._ahead.begin(infos)

    def release(self, prefix: str) -> None:
        """Drop the weights of one module."""
        for name, _ in list(self.model.get_submodule(prefix).named_parameters(remove_duplicate=False)):
            self._place(f"{prefix}.{name}", self._meta[f"{prefix}.{name}"])

    def outside(
        self, blocks: Iterable[str], without: Container[str] = frozenset()
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Every stored parameter outside the blocks but those in `without`, one at a time, in its stored dtype.

        What the model has no place for comes last, under its name in the checkpoint.
        """
        prefixes = tuple(f"{block}." for block in blocks)
        for name in self._sources:
            if not name.startswith(prefixes) and name not in without:
                yield name, self.read(name)
        for name in self.source.kept:
            yield name, read_tensor(self.source.tensors[name])

    def read(self, name: str) -> torch.Tensor:
        """One parameter or buffer in its stored dtype; the model does not keep a parameter."""
        self._load({name})
        value = self._value(name).data
        for other in self._siblings.get(name, [name]):
            if other in self._meta:
                self._place(other, self._meta[other])
        return value

    # -- names ---------------------------------------------------------------------------------------------

    def _match_names(self) -> dict[str, list[str]]:
        """For each parameter and buffer the stored tensors that it is made of."""
        targets = self.model.state_dict()
        sources: dict[str, list[str]] = {}
        self._converted: set[str] = set()
        # The results of one conversion, by the name of each.
        self._siblings: dict[str, list[str]] = {}
        # Of a tied pair it may be the other one that is stored: the name under which such a tensor is loaded.
        self._loaded_as: dict[str, str] = {}
        for stored, (name, converted, others) in destinations(self.model, self.source.tensors).items():
            if name not in targets or (not converted and name in sources):
                continue  # no place, or stored twice with the same values
            results = [name, *(other for other in others if other in targets)]
            if converted:
                self._converted.update(results)
                self._siblings |= dict.fromkeys(results, results)
            for result in results:
                sources.setdefault(result, []).append(stored)
        for target, source in self._tied.items():
            stored_parts = sources.pop(target, None)
            if stored_parts is not None and source not in sources:
                sources[source] = stored_parts
                self._loaded_as[stored_parts[0]] = source
        return {name: sources[name] for name in targets if name in sources}

    def _check_complete(self) -> None:
        parameters = {name: tuple(tensor.shape) for name, tensor in self.model.named_parameters()}
        plain = {
            stored[0]: parameters[name]
            for name, stored in self._sources.items()
            if name not in self._converted and name in parameters
        }
        absent = {name: shape for name, shape in parameters.items() if name not in {*self._sources, *self._tied}}
        check_shapes(self.source, plain | absent)

    def _give_source_dtypes(self) -> None:
        """Make each meta parameter's dtype that of its stored tensor, so that loading never casts."""
        made_of = {**self._sources, **{name: self._sources.get(other, []) for name, other in self._tied.items()}}
        for name, stored in made_of.items():
            module_name, _, attribute = name.rpartition(".")
            module = self.model.get_submodule(module_name)
            if stored and module._parameters.get(attribute) is not None:
                dtype = self.source.tensors[stored[0]].torch_dtype
                meta = torch.empty(module._parameters[attribute].shape, dtype=dtype, device="meta")
                setattr(module, attribute, nn.Parameter(meta, requires_grad=False))

    def _check_conversions(self) -> None:
        """Convert once without values what is stored in other parts: shapes alone tell what does not fit."""
        stored = {part: self.source.tensors[part] for name in self._converted for part in self._sources[name]}
        tensors = {
            part: torch.empty(info.shape, dtype=info.torch_dtype, device="meta") for part, info in stored.items()
        }
        try:
            self._convert(tensors, "meta")
        except NotImplementedError:
            return  # a conversion that needs values: it is checked when these are read

    # -- tensors -------------------------------------------------------------------------------------------

    def _load(self, names: set[str]) -> None:
        parts = {part: self.source.tensors[part] for name in names for part in self._sources[name]}
        files = sorted({info.file for info in parts.values()})
        try:
            self._convert({self._loaded_as.get(part, part): _Stored(info, self._ahead) for part, info in parts.items()})
        except AccullmError:
            self.source.check_unchanged(files)
            raise
        self.source.check_unchanged(files)
        for name in names:
            try:
                check_finite(name, self._value(name).data)
            except AccullmError as error:
                raise AccullmError(error.what, self.source.directory, error.hint) from None

    def _value(self, name: str) -> torch.Tensor:
        value: torch.Tensor = self.model.get_parameter_or_buffer(name)
        return value

    def _place(self, name: str, value: torch.Tensor) -> None:
        module_name, _, attribute = name.rpartition(".")
        parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        setattr(self.model.get_submodule(module_name), attribute, parameter)

    def _convert(self, tensors: Mapping[str, Any], device: str = "cpu") -> None:
        """Put stored tensors (or slices of files) into the model, by transformers' conversion rules."""
        config = LoadStateDictConfig(weight_mapping=self._rules, device_map={"": device})
        info, _ = convert_and_load_state_dict_in_model(self.model, dict(tensors), config, None)
        hint = "download the weights again, or correct config.json"
        for name, found, wanted in sorted(info.mismatched_keys):
            raise AccullmError(
                f"tensor {name} has shape {list(found)}, but config.json makes it {list(wanted)}",
                self.source.directory,
                hint,
            )
        for name, text in sorted(info.conversion_errors.items()):
            # A traceback, the error's own words, and one line by transformers.
            lines = text.strip().splitlines()
            reason = lines[-2] if len(lines) > 1 else text
            raise AccullmError(
                f"tensor {name} cannot be made of the {len(self._sources[name])} stored for it ({reason})",
                self.source.directory,
                hint,
            )
        if info.error_msgs:
            raise AccullmError(f"cannot be read ({' '.join(info.error_msgs[0].split())})", self.source.directory, hint)


@dataclass(frozen=True)
class _Stored:
    """A tensor that transformers reads when it wants it, as it does those of an opened safetensors file."""

    info: TensorInfo
    ahead: ReadAhead

    def __getitem__(self, key: Any) -> torch.Tensor:
        return self.ahead.take(self.info)[key]

"""Reading a checkpoint a part at a time into a model that has no weights.

Names and layouts differ between a checkpoint and the module tree (prefixes, renamed parts, experts stored one by
one): transformers' own conversion rules translate them, here for a few tensors at a time.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from accullm_cli.errors import AccullmError
from accullm_cli.model.names import destinations
from accullm_cli.model.source import ModelSource, TensorInfo, check_finite, check_shapes

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def build_skeleton(directory: Path, untied: bool = False) -> PreTrainedModel:
    """The model that `directory`/config.json describes, in float32: parameters on the meta device, buffers real.

    Experts run one after another ("eager"), so that each product with an expert's weight can be seen.

    Args:
        untied: tie no weights, whatever config.json says.
    """
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if untied:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
    return model.eval().requires_grad_(False)


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
        self._sources = self._match_names()
        self._check_complete()
        self._give_source_dtypes()
        self._check_conversions()
        self._meta = dict(model.named_parameters(remove_duplicate=False))

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of the parameter `name`."""
        return self._meta[name].dtype

    def load(self, prefixes: Iterable[str]) -> None:
        """Read every parameter under the given module names, as stored, and check that it is finite.

        Raises:
            AccullmError: NaN or Inf; a converted tensor that does not fit its parameter.
        """
        prefixes = tuple(f"{prefix}." for prefix in prefixes)
        wanted = {name for name in self._sources if name.startswith(prefixes)}
        self._load(wanted)

    def load_outside(self, blocks: Iterable[str]) -> None:
        """Read every parameter that lies outside the given blocks."""
        prefixes = tuple(f"{block}." for block in blocks)
        self._load({name for name in self._sources if not name.startswith(prefixes)})

    def warm(self, prefix: str) -> None:
        """Have the system read what `load` of this module will want into its page cache, while the caller goes on.

        This process holds none of it. Where the system knows no such request (macOS), nothing happens.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        parts = [part for name, stored in self._sources.items() if name.startswith(f"{prefix}.") for part in stored]
        for file, infos in _by_file(self.source.tensors[part] for part in parts).items():
            try:
                descriptor = os.open(file, os.O_RDONLY)
            except OSError:
                return  # `load` will say what is wrong with it
            try:
                for info in infos:
                    os.posix_fadvise(descriptor, info.begin, info.end - info.begin, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)

    def release(self, prefix: str) -> None:
        """Drop the weights of one module."""
        for name, _ in list(self.model.get_submodule(prefix).named_parameters()):
            module_name, _, attribute = f"{prefix}.{name}".rpartition(".")
            setattr(self.model.get_submodule(module_name), attribute, self._meta[f"{prefix}.{name}"])

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
            with safe_open(self.source.tensors[name].file, framework="pt") as file:
                yield name, file.get_tensor(name)

    def read(self, name: str) -> torch.Tensor:
        """One parameter in its stored dtype; the model does not keep it."""
        self._load({name})
        value = self.model.get_parameter(name).data
        module_name, _, attribute = name.rpartition(".")
        setattr(self.model.get_submodule(module_name), attribute, self._meta[name])
        return value

    # -- names ---------------------------------------------------------------------------------------------

    def _match_names(self) -> dict[str, list[str]]:
        """For each parameter (the first one of a conversion with several results) the stored tensors it is made of."""
        targets = self.model.state_dict()
        tied = self.model.all_tied_weights_keys
        sources: dict[str, list[str]] = {}
        self._converted: set[str] = set()
        # Of a tied pair it may be the other one that is stored: the name under which such a tensor is loaded.
        self._loaded_as: dict[str, str] = {}
        for stored, (name, converted) in destinations(self.model, self.source.tensors).items():
            if name not in targets:
                continue
            if not converted and name in sources:
                continue  # stored twice, with the same values
            sources.setdefault(name, []).append(stored)
            if converted:
                self._converted.add(name)
        for target, source in tied.items():
            stored_parts = sources.pop(target, None)
            if stored_parts is not None and source not in sources:
                sources[source] = stored_parts
                self._loaded_as[stored_parts[0]] = source
        return {name: sources[name] for name in targets if name in sources}

    def _check_complete(self) -> None:
        parameters = {name: tuple(tensor.shape) for name, tensor in self.model.named_parameters()}
        tied = set(self.model.all_tied_weights_keys)
        if not self._converted:
            plain = {self._sources[name][0]: shape for name, shape in parameters.items() if name in self._sources}
            absent = {name: shape for name, shape in parameters.items() if name not in {*self._sources, *tied}}
            check_shapes(self.source, plain | absent)
            return
        covered = set(self._sources) | tied
        for name in self._converted:
            covered |= {other for other in parameters if other.rpartition(".")[0] == name.rpartition(".")[0]}
        missing = sorted(set(parameters) - covered)
        if missing:
            raise AccullmError(
                f"tensor {missing[0]} is missing from the checkpoint", self.source.directory, "download it again"
            )
        plain = {
            self._sources[name][0]: parameters[name]
            for name in self._sources
            if name not in self._converted and name in parameters
        }
        check_shapes(self.source, plain)

    def _give_source_dtypes(self) -> None:
        """Make each meta parameter's dtype that of its stored tensor, so that loading never casts."""
        for name, stored in self._sources.items():
            dtype = DTYPES[self.source.tensors[stored[0]].dtype]
            module_name, _, attribute = name.rpartition(".")
            module = self.model.get_submodule(module_name)
            if attribute in module._parameters:
                meta = torch.empty(module._parameters[attribute].shape, dtype=dtype, device="meta")
                setattr(module, attribute, nn.Parameter(meta, requires_grad=False))

    def _check_conversions(self) -> None:
        """Convert once without values what is stored in other parts: shapes alone tell what does not fit."""
        stored = {part: self.source.tensors[part] for name in self._converted for part in self._sources[name]}
        self._convert(
            {part: torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta") for part, info in stored.items()},
            "meta",
        )

    # -- tensors -------------------------------------------------------------------------------------------

    def _load(self, names: set[str]) -> None:
        by_file: dict[str, list[str]] = {}
        for name in names:
            for stored in self._sources[name]:
                by_file.setdefault(str(self.source.tensors[stored].file), []).append(stored)
        handles = [safe_open(file, framework="pt") for file in by_file]
        slices = {
            self._loaded_as.get(stored, stored): handle.get_slice(stored)
            for handle, stored_names in zip(handles, by_file.values(), strict=True)
            for stored in stored_names
        }
        self._convert(slices)
        for name in names:
            try:
                check_finite(name, self.model.get_parameter_or_buffer(name).data)
            except AccullmError as error:
                raise AccullmError(error.what, self.source.directory, error.hint) from None

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


def _by_file(infos: Iterable[TensorInfo]) -> dict[Path, list[TensorInfo]]:
    found: dict[Path, list[TensorInfo]] = {}
    for info in infos:
        found.setdefault(info.file, []).append(info)
    return found

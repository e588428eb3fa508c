"""Teaches transformers the native format: `import accullm_cli.hf`, then load an artifact with from_pretrained.

    import accullm_cli.hf
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("path/of/an/artifact")

Codes stay packed in memory, scales stay float16 and outlier weights in the source's dtype, whatever dtype the model is
loaded in or moved to: the weights are rounded to the activations' dtype when they are multiplied.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from accullm_cli.errors import AccullmError
from accullm_cli.formats import NATIVE
from accullm_cli.formats.accullm import DEFAULT_SCHEME, LOADER_GUARD, SCHEME_KEYS, SUFFIXES
from accullm_cli.formats.manifest import check_version
from accullm_cli.formats.shards import dtype_name, tensors_of
from accullm_cli.hybrid import HybridEmbedding, HybridExperts, HybridLinear, HybridWeight, KeptWeight, TiedHead
from accullm_cli.model.integrity import TensorInfo
from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.linear import check_outlier_index
from accullm_cli.quant.plan import LinearPlan

logger = logging.get_logger(__name__)


# -- what transformers calls -------------------------------------------------------------------------------


@register_quantization_config(NATIVE)
class AccullmConfig(QuantizationConfigMixin):
    """The `quantization_config` of an artifact's config.json; docs/format.md says what is in it."""

    def __init__(
        self,
        format_version: int | None = None,
        linears: Mapping[str, Mapping[str, Any]] | None = None,
        skipped: list[str] | None = None,
        embeddings: Mapping[str, Mapping[str, Any]] | None = None,
        stacks: Mapping[str, Mapping[str, Any]] | None = None,
        **common: Any,
    ) -> None:
        self.quant_method = NATIVE
        check_version(format_version, Path("config.json"))
        self.format_version = format_version
        self.linears = dict(linears or {})
        self.skipped = list(skipped or [])
        self.embeddings = dict(embeddings or {})
        self.stacks = dict(stacks or {})
        for key in SCHEME_KEYS:
            setattr(self, key, common.get(key, DEFAULT_SCHEME.get(key)))

    def rename(self, renamed: Callable[[str], str]) -> None:
        """Give linears, embeddings and stacks other names."""
        for part in ("linears", "embeddings", "stacks"):
            setattr(self, part, {renamed(name): entry for name, entry in getattr(self, part).items()})

    def scheme(self, name: str) -> dict[str, Any]:
        """bits, group_size, symmetric and outliers of a quantized linear or embedding."""
        if name in self.embeddings:
            return {**DEFAULT_SCHEME, **self.embeddings[name], "outliers": 0}
        return {key: getattr(self, key) for key in SCHEME_KEYS} | dict(self.linears[name])


@register_quantizer(NATIVE)
class AccullmQuantizer(HfQuantizer):
    """Puts hybrid modules into the model's skeleton; transformers then loads their buffers like any other."""

    requires_calibration = True  # transformers' words for: only loads what is quantized already
    quantization_config: AccullmConfig

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The one hook that sees the config before transformers looks for files and builds the model."""
        if getattr(config, "transformers_weights", None) == LOADER_GUARD:
            del config.transformers_weights
        # The other implementations multiply by the whole stack of experts at once.
        config._experts_implementation = "eager"
        return config

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Swap linears and embeddings for hybrid modules, and make sure that the files fill every tensor.

        Raises:
            AccullmError: one of them is not in the model, or a tensor not in the files. (transformers would give random
                values to what is missing.)
        """
        found: dict[str, TensorInfo] = {}
        for file in checkpoint_files or []:
            found |= tensors_of(Path(file))
        self._prefixes = other_prefixes(model, self.quantization_config)
        stored = {self._renamed(name): info for name, info in found.items()}
        self.quantization_config.rename(self._renamed)
        where = model.config.name_or_path
        config, dtype = self.quantization_config, dtype or torch.get_default_dtype()
        for name in (*config.linears, *config.embeddings):
            if f"{name}.qweight" not in stored:
                raise AccullmError(f"tensor {name}.qweight is missing", where, "copy the artifact again")
        replace_linears(model, config, stored, dtype)
        replace_embeddings(model, config, dtype)
        check_complete(model, stored, where)
        mark_initialized(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Look at what only the tensors themselves say.

        Raises:
            AccullmError: a linear's outlier features do not exist or do not ascend.
        """
        for name, module in model.named_modules():
            index = getattr(module, "outlier_index", None)
            if isinstance(module, HybridWeight) and index is not None and not index.is_meta:
                check_outlier_index(index, module.in_features, f"{name}.outlier_index", model.config.name_or_path)
        return model

    def _renamed(self, name: str) -> str:
        for rule in self._prefixes:
            name, _ = rule.rename_source_key(name)
        return name

    def update_weight_conversions(self, weight_conversions: list[Any], *_: object) -> list[Any]:
        """An artifact's tensors have the names and shapes of the module tree. (Newer versions pass the model.)"""
        return self._prefixes

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Buffers of hybrid modules load as they are, also where a model asks for some modules in float32."""
        if any(pattern.rpartition(".")[2] in SUFFIXES for pattern in converter._original_source_patterns):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def is_serializable(self) -> bool:
        """False: what save_pretrained writes has no manifest, so nothing could be verified."""
        logger.warning("An AccuLLM artifact is not saved by save_pretrained: copy its directory instead.")
        return False

    @property
    def is_trainable(self) -> Literal[False]:
        return False


def other_prefixes(model: PreTrainedModel, config: AccullmConfig) -> list[PrefixChange]:
    """transformers' rules for a class that names its modules otherwise than the one that was converted.

    Such is the language part of a checkpoint for images and text, loaded alone.
    """
    linear = next((name.removesuffix(".0") for name in (*config.linears, *config.embeddings)), None)
    if linear is None or _find(model, linear) is not None:
        return []
    return [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, PrefixChange)]


# -- swapping modules --------------------------------------------------------------------------------------


def replace_linears(
    model: nn.Module, config: AccullmConfig, stored: Mapping[str, TensorInfo], dtype: torch.dtype
) -> None:
    """Swap every linear that `config` names for a hybrid module on the meta device.

    Raises:
        AccullmError: the model has no such linear.
    """
    stacks: dict[str, None] = {}
    for name in config.linears:
        parent_name, _, attribute = name.rpartition(".")
        if attribute.isdigit() and isinstance(_find(model, parent_name), nn.Parameter):
            stacks[parent_name] = None
            continue
        _replace_linear(model, name, config, _outlier_dtype(name, stored), dtype)
    for name in stacks:
        _replace_stack(model, name, config, stored, dtype)


def replace_embeddings(model: PreTrainedModel, config: AccullmConfig, dtype: torch.dtype) -> None:
    """Swap embedding and output head, as far as `config` names them, for hybrid modules on the meta device.

    Raises:
        AccullmError: the model has no embedding of this name.
    """
    head = model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    for name in config.embeddings:
        module = _find(model, name)
        if module is head and head is not None:
            _replace_linear(model, name, config, dtype, dtype)
            continue
        if not isinstance(module, nn.Embedding):
            raise _not_in_model(model, f"embedding {name}")
        plan, _ = _plan(name, (module.num_embeddings, module.embedding_dim), config)
        hybrid = HybridEmbedding(plan, module, dtype)
        _put(model, name, hybrid)
        tied = [target for target, source in model.all_tied_weights_keys.items() if source == f"{name}.weight"]
        if head is not None and f"{names[head]}.weight" in tied:
            _put(model, names[head], TiedHead(hybrid, _empty_bias(head)))
            _untie(model, f"{names[head]}.weight")


def _replace_linear(
    model: nn.Module, name: str, config: AccullmConfig, outlier_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """Swap a Linear or a Conv1D for a HybridLinear."""
    module = _find(model, name)
    if isinstance(module, nn.Linear):
        shape = (module.out_features, module.in_features)
    elif isinstance(module, Conv1D):
        shape = (module.nf, module.nx)
    else:
        raise _not_in_model(model, f"linear layer {name}")
    plan, outliers = _plan(name, shape, config)
    transposed = isinstance(module, Conv1D)
    _put(model, name, HybridLinear(plan, outliers, outlier_dtype, dtype, _empty_bias(module), transposed))
    _untie(model, f"{name}.weight")


def _untie(model: nn.Module, name: str) -> None:
    """Nothing is left to tie where a weight was swapped: what transformers would look for is gone."""
    tied = getattr(model, "all_tied_weights_keys", {})
    for target in [target for target, source in tied.items() if name in (target, source)]:
        del tied[target]
    model._tied_weights_keys = dict(tied)  # type: ignore[assignment]


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent_name, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent_name), attribute, module)


def _empty_bias(module: Any) -> nn.Parameter | None:
    """For the files to fill: tensors of the module tree that are not stored are refused below."""
    return None if module.bias is None else nn.Parameter(torch.empty_like(module.bias), False)


def _replace_stack(
    model: nn.Module, name: str, config: AccullmConfig, stored: Mapping[str, TensorInfo], dtype: torch.dtype
) -> None:
    """Swap a parameter that holds experts for a HybridExperts."""
    parent_name, _, attribute = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    parameter = getattr(parent, attribute)
    stack = config.stacks.get(name, {})
    count, transposed = stack.get("experts", len(parameter)), bool(stack.get("transposed", False))
    if len(parameter.shape) not in (2, 3) or parameter.numel() % (count * parameter.shape[-1]):
        raise _not_in_model(model, f"linear layer {name}")
    columns = parameter.shape[-1]
    rows = parameter.numel() // (count * columns)
    shape = (columns, rows) if transposed else (rows, columns)
    experts: list[HybridWeight | KeptWeight] = []
    for full in (f"{name}.{number}" for number in range(count)):
        if full in config.linears:
            plan, outliers = _plan(full, shape, config)
            experts.append(HybridWeight(plan, outliers, _outlier_dtype(full, stored), dtype))
        else:
            experts.append(KeptWeight(*shape, parameter.dtype))
    delattr(parent, attribute)
    setattr(parent, attribute, HybridExperts(experts, dtype, parameter.shape, transposed))
    _untie(model, name)


def _plan(name: str, shape: tuple[int, int], config: AccullmConfig) -> tuple[LinearPlan, int]:
    scheme = config.scheme(name)
    own = {key: scheme[key] for key in ("bits", "group_size", "symmetric", "scale_bits", "encoding")}
    plan = LinearPlan(name, *shape, **own)
    if plan.encoding not in ENCODINGS or ENCODINGS[plan.encoding].problem(plan):
        raise AccullmError(f"describes {name} as no accullm stores it", "config.json", "copy the artifact again")
    return plan, scheme["outliers"]


def _outlier_dtype(name: str, stored: Mapping[str, TensorInfo]) -> torch.dtype:
    info = stored.get(f"{name}.outlier_weight")
    return torch.float16 if info is None else info.torch_dtype


def _find(model: nn.Module, name: str) -> object:
    """The module, parameter or attribute of that name; None where there is none."""
    found: object = model
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _not_in_model(model: nn.Module, what: str) -> AccullmError:
    return AccullmError(
        f"{type(model).__name__} has no {what}", "config.json", "load the artifact with AutoModelForCausalLM"
    )


def check_complete(model: PreTrainedModel, stored: Mapping[str, TensorInfo], where: object) -> None:
    """Make sure that the files hold every tensor of the model, with its shape and (codes and scales) its dtype.

    Raises:
        AccullmError: one is missing or different, or a stored quantized linear has no place in the model.
    """
    wanted = model.state_dict()
    tied = getattr(model, "all_tied_weights_keys", {})
    # Tied weights are stored once, under either name.
    elsewhere = {target for target, source in tied.items() if source in stored}
    elsewhere |= {source for target, source in tied.items() if target in stored}
    computed = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    for name, tensor in wanted.items():
        info = stored.get(name)
        if info is None:
            if name not in elsewhere and not any(pattern.search(name) for pattern in computed):
                raise AccullmError(f"tensor {name} is missing", where, "copy the artifact again")
            continue
        if info.shape != tuple(tensor.shape):
            raise AccullmError(f"tensor {name} has shape {list(info.shape)}, expected {list(tensor.shape)}", where)
        dtype = info.torch_dtype
        if name.rpartition(".")[2] in SUFFIXES and dtype != tensor.dtype:
            raise AccullmError(f"tensor {name} is {dtype_name(dtype)}, expected {dtype_name(tensor.dtype)}", where)
    for name in stored:
        if name.endswith(".qweight") and name not in wanted:
            raise AccullmError(f"tensor {name} has no place in {type(model).__name__}", where)


def mark_initialized(model: nn.Module) -> None:
    """Keep the model's own initialization away from hybrid modules: `check_complete` found all they have in the files.

    Modules around them initialize what is left, such as buffers that are computed and never stored.
    """
    for module in model.modules():
        if isinstance(module, HybridWeight | HybridExperts | KeptWeight | TiedHead):
            module._is_hf_initialized = True

"""A recipe's base and adapter by their shapes alone: built from the configuration on the `meta` device, without weights.

Quantised layers hold what bitsandbytes makes of their weights (packed values and block statistics), as shapes too.
"""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import PlanError
from ..methods import TaskType
from ..model import PeftModel, get_peft_model
from ..quantization import bitsandbytes, config_scheme, loading_options, quantized_layers
from ..training.bases import auto_class, auto_dtype, checked_path, cpu_has_bf16, loading, torch_dtype
from ..training.defaults import config_type, defaults_of
from ..training.schema import Recipe
from ..training.setup import INIT_FIELDS

META, CPU = torch.device("meta"), torch.device("cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skeleton:
    """What a run is made of, by shapes.

    Attributes:
        config: transformers' configuration of the base.
        model: the base on the meta device with the recipe's adapter, in training mode.
        dtype: in which the base is loaded.
        scheme: how it is quantised ("int8", "nf4", "fp4"), or None.
        path: where its files are, as `from_pretrained` takes it ("" where only a configuration is known).
    """

    config: Any
    model: PeftModel
    dtype: torch.dtype
    scheme: str | None
    path: str = ""

    @property
    def seq2seq(self) -> bool:
        return bool(getattr(self.config, "is_encoder_decoder", False))


def config_of(recipe: Recipe) -> tuple[Any, str]:
    """The base's configuration and where its files are; no weights are read.

    Raises:
        BaseModelError: no such base, or a hub id without network.
    """
    from transformers import AutoConfig

    from .. import architectures  # noqa: F401  (makes our own architectures known to transformers)

    path = checked_path(recipe.base)
    return loading(recipe.base, path, lambda: AutoConfig.from_pretrained(path)), path


def skeleton(recipe: Recipe, config: Any = None, path: str = "") -> Skeleton:
    """The recipe's base and adapter on the meta device.

    Args:
        config: transformers' configuration in place of the recipe's base.

    Raises:
        BaseModelError, ConfigError, UnsupportedError: as loading and attaching would.
    """
    if config is None:
        config, path = config_of(recipe)
    loader = auto_class(config, recipe.task, recipe.base)
    scheme = recipe.quantization or config_scheme(config)
    dtype = dtype_of(recipe, config, loader)
    with META:
        base = loader.from_config(without_quantization(config), dtype=dtype)
    if scheme is not None:
        quantize(base, scheme, compute_dtype(recipe, dtype))
    model = attached(recipe, base)
    return Skeleton(config=config, model=model.train(), dtype=dtype, scheme=scheme, path=path)


def dtype_of(recipe: Recipe, config: Any, loader: Any) -> torch.dtype:
    """The dtype that `resolve_base` would load the base in, on a CPU."""
    return auto_dtype(config, loader, CPU) if recipe.dtype == "auto" else torch_dtype(recipe.dtype, CPU)


def compute_dtype(recipe: Recipe, dtype: torch.dtype) -> torch.dtype:
    """In which 4-bit layers multiply (see `resolve_base`)."""
    return torch.bfloat16 if recipe.dtype == "auto" and cpu_has_bf16() else dtype


def without_quantization(config: Any) -> Any:
    """The configuration of the same model, not quantised."""
    import copy

    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    return plain


def quantize(base: nn.Module, scheme: str, compute: torch.dtype) -> None:
    """Put quantised layers in the place of a meta base's linear ones, as transformers would while loading.

    Raises:
        UnsupportedError: bitsandbytes is missing. PlanError: a scheme that cannot be planned.
    """
    if scheme not in ("int8", "nf4", "fp4"):
        raise PlanError(f"a base in {scheme} cannot be planned; int8, nf4 and fp4 can")
    library = bitsandbytes()
    from transformers.quantizers.auto import AutoHfQuantizer

    options = loading_options(scheme, compute, "cpu")
    settings = options["quantization_config"]
    quantizer: Any = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    quantizer.preprocess_model(model=base, device_map={"": "cpu"})
    for kind, layer in quantized_layers(base):
        weight = torch.empty(layer.out_features, layer.in_features, device="meta", dtype=torch.float16)
        if kind == "int8":
            layer.weight = library.nn.Int8Params(weight.to(torch.int8), requires_grad=False, has_fp16_weights=False)
            layer.weight.SCB = torch.empty(layer.out_features, device="meta")
            layer.state.SCB, layer.state.CB = layer.weight.SCB, layer.weight.data
        else:
            pack_4bit(library, layer, scheme)
    base.is_quantized = True  # type: ignore[assignment]


def pack_4bit(library: Any, layer: Any, scheme: str) -> None:
    """A meta layer's weight as bitsandbytes packs it: two values a byte, a statistic of a byte for each 64 of them, and of
    four bytes for each 256 of these (arXiv:2305.14314, double quantisation)."""
    count, block, nested = layer.in_features * layer.out_features, 64, 256
    blocks = -(-count // block)
    empty: dict[str, Any] = {"device": "meta"}
    inner = library.functional.QuantState(
        absmax=torch.empty(-(-blocks // nested), **empty),
        blocksize=nested,
        code=torch.empty(256, **empty),
        dtype=torch.float32,
    )
    state = library.functional.QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8, **empty), shape=torch.Size((layer.out_features, layer.in_features)),
        code=torch.empty(16, **empty), blocksize=block, quant_type=scheme, dtype=layer.compute_dtype,
        offset=torch.empty((), **empty), state2=inner,
    )  # fmt: skip
    packed = torch.empty((count + 1) // 2, 1, dtype=torch.uint8, **empty)
    layer.weight = library.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, quant_type=scheme, blocksize=block, bnb_quantized=True, module=layer
    )
    layer.quant_state = state
    layer.compute_type_is_set = True  # as the first of the passes leaves it that try a model out


def quantized_tensors(layer: Any, kind: str) -> list[torch.Tensor]:
    """What a quantised layer holds besides its parameters: scales and block statistics."""
    if kind == "int8":
        return [layer.state.SCB]
    state = layer.weight.quant_state
    return [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]


def attached(recipe: Recipe, base: nn.Module) -> PeftModel:
    """A meta base with the recipe's adapter, whose start values are left out: they have no shape of their own."""
    task = TaskType.SEQ_2_SEQ_LM if getattr(base.config, "is_encoder_decoder", False) else TaskType.CAUSAL_LM  # type: ignore[union-attr]
    if recipe.init_from is not None:
        from ..methods import PeftConfig

        config = PeftConfig.from_pretrained(recipe.init_from)
        config.inference_mode = False
    else:
        options = defaults_of(recipe.method).options | recipe.method_options
        options = {k: v for k, v in options.items() if k not in INIT_FIELDS}
        config = config_type(recipe.method)(task_type=task, **options)
    if getattr(base, "is_quantized", False):
        prepared(base)
    return get_peft_model(base, config)  # type: ignore[arg-type]


def prepared(base: Any) -> None:
    """`prepare_model_for_kbit_training` on shapes: all that is not quantised in fp32."""
    from ..preparation import prepare_model_for_kbit_training

    with quietly():
        prepare_model_for_kbit_training(base, False)


@contextmanager
def quietly() -> Any:
    """Within the block nothing is printed."""
    import io
    from contextlib import redirect_stdout

    with redirect_stdout(io.StringIO()):
        yield

"""Parameters and bytes of a run's base, adapter and files, by shapes alone."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import fingerprint
from ..checkpoint.write import FORMAT, adapter_tensors
from ..files import HEADER_KEY
from ..methods.base import clean_path
from ..quantization import quantized_kind, quantized_layers
from .skeleton import Skeleton, quantized_tensors

SHORT = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Parameters and bytes.

    Attributes:
        trained, base: parameters (of a quantised layer as many as its weight has).
        base_bytes, adapter_bytes: in memory.
        adapter_file: of `adapter_model.safetensors`, None where the base's weights are not there: its header holds some of
            their values.
        adapter_tensors: the tensors in that file.
        checkpoint: tensors of a Trainer's checkpoint: the adapter, once, and AdamW's two moments.
        merged: tensors of the merged model in the base's dtype; None where the method has no merge.
    """

    trained: int
    base: int
    base_bytes: int
    adapter_bytes: int
    adapter_file: int | None
    adapter_tensors: int
    checkpoint: int
    merged: int | None


def sizes(found: Skeleton) -> Sizes:
    """Those of a skeleton."""
    host = found.model
    adapters = {id(p): p for _, p in host.adapter_parameters("default")}
    trained = [p for p in adapters.values() if p.requires_grad]
    shared = base_ids(host)
    own = [p for p in adapters.values() if id(p) not in shared]
    stored = adapter_tensors(host, "default")
    method = host.methods["default"]
    training = method.training_tensors(host)
    moments = 2 * sum(map(bytes_of, trained))
    kept = sum(map(bytes_of, stored.values())) + sum(map(bytes_of, training.values()))
    return Sizes(
        trained=sum(p.numel() for p in trained),
        base=base_parameters(host),
        base_bytes=sum(map(bytes_of, base_tensors(host))),
        adapter_bytes=max(sum(map(bytes_of, own)), sum(map(bytes_of, stored.values()))),  # frozen projections are stored
        adapter_file=adapter_file(found, stored),
        adapter_tensors=sum(map(bytes_of, stored.values())),
        checkpoint=kept + moments,
        merged=base_parameters(host) * found.dtype.itemsize if method.mergeable else None,
    )


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def base_ids(host: Any) -> set[int]:
    """The base's own parameters."""
    adapters = {id(p) for _, p in host.adapter_parameters("default")}
    return {id(p) for p in host.base.parameters()} - adapters


def base_tensors(host: Any) -> list[Tensor]:
    """All that a base holds in memory: parameters, buffers, and what quantised layers keep beside them."""
    wanted = base_ids(host)
    found: dict[int, Tensor] = {id(p): p for p in host.base.parameters() if id(p) in wanted}
    found |= {id(b): b for b in host.base.buffers()}
    for kind, layer in quantized_layers(host.base):
        found |= {id(t): t for t in quantized_tensors(layer, kind)}
    return list(found.values())


def base_parameters(host: Any) -> int:
    """Parameters of a base; a quantised layer has as many as its weight had."""
    wanted, total, seen = base_ids(host), 0, set()
    for module in host.base.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) not in wanted or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            packed = name == "weight" and quantized_kind(module) is not None
            total += module.in_features * module.out_features if packed else parameter.numel()
    return total


# -- the file -------------------------------------------------------------------------------------------------------------
def adapter_file(found: Skeleton, tensors: dict[str, Tensor]) -> int | None:
    """Bytes of the weights file that `checkpoint.write` makes of these tensors."""
    config = found.model.methods["default"].config
    own = {k: v for k, v in config.to_dict().items() if k in config.own_fields}
    base = fingerprint_of(found)
    if base is None:
        return None
    return safetensors_bytes(tensors, {HEADER_KEY: json.dumps({"format": FORMAT, "config": own, "base": base})})


def safetensors_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> int:
    """Size of a safetensors file: 8 bytes, a JSON header that is filled up to a multiple of 8, the values."""
    header: dict[str, Any] = {"__metadata__": metadata}
    place = 0
    # as safetensors lays them out: wide dtypes first, then by name
    for name in sorted(tensors, key=lambda n: (-order(tensors[n].dtype), n)):
        size = bytes_of(tensors[name])
        header[name] = {
            "dtype": SHORT[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [place, place + size],
        }  # fmt: skip
        place += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + len(text) + -len(text) % 8 + place


def order(dtype: torch.dtype) -> int:
    """Rank of a dtype in the files' order; of those that adapters have."""
    ranks = ["BOOL", "U8", "I8", "F16", "BF16", "I32", "F32", "F64", "I64"]
    return ranks.index(SHORT[dtype])


def fingerprint_of(found: Skeleton) -> dict[str, Any] | None:
    """The fingerprint that the loaded base would have: its few values are read from the checkpoint; None without one."""
    if not os.path.isdir(found.path):
        return None
    base = found.model.base
    paths = {id(module): clean_path(path) for path, module in base.named_modules()}
    samples: dict[str, list[float]] = {}
    for role, module in fingerprint.sampled_modules(base).items():
        if quantized_kind(module) is not None:
            continue
        rows = stored_rows(Path(found.path), paths[id(module)], module)
        if rows is None:
            return None
        samples[role] = fingerprint.sample(rows.to(module.weight.dtype).to(found.dtype))  # type: ignore[union-attr,arg-type]
    form = found.scheme or str(found.dtype).removeprefix("torch.")
    model_type = getattr(base.config, "model_type", None)
    return {"model_type": model_type, "samples": samples, "quantized": found.scheme is not None, "form": form}


def stored_rows(folder: Path, path: str, module: nn.Module) -> Tensor | None:
    """The first rows of a module's weight in a checkpoint's safetensors files; None where its key is not known."""
    from safetensors import safe_open

    names = [f"{path}.weight", f"{path.partition('.')[2]}.weight"]
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in (n for n in names if n in opened.keys()):  # noqa: SIM118
                part = opened.get_slice(name)
                if list(part.get_shape()) != list(module.weight.shape):  # type: ignore[union-attr,arg-type]
                    return None
                return part[:256]
    return None

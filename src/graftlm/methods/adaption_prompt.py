"""LLaMA-Adapter: trained prompts that the top layers' attention reads beside its own keys, behind a gate that starts at zero
(arXiv:2303.16199, section 3.2).

``y = attention(x) + W_o (g * softmax(q k_p^T / sqrt(d)) v_p)``, q the layer's own queries, k_p and v_p its frozen
projections of the prompt [L, H], g one number a layer.

Field names, defaults, maths and files are HF PEFT's (its `AdaptionPromptConfig`; GPT-2 has no W_o there, as with it). What
differs from it:
* queries are those that the layer has made, not computed again: other adapters of the layer act on them;
* W_o is taken without its bias, so that a gate at zero changes nothing on any model;
* several are active together (they add up), in mixed batches too; Qwen2, Qwen3, Gemma 3 and Bloom have a form as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import rotate_half

from ..architectures import base_modules, clean_path, innermost, model_type
from ..errors import ConfigError, TargetError, UnsupportedError
from ..layers import as_it_was
from ..routing import Group, Index, by_group
from .base import Method, PeftConfig, PeftType, Site, register
from .fields import Count, also_takes


@also_takes({"peft_version": ...})
@dataclass(kw_only=True)
class AdaptionPromptConfig(PeftConfig):
    """Configuration of LLaMA-Adapter.

    Args:
        target_modules: the name of the blocks' attention modules; None takes the family's.
        adapter_len: length L of each layer's prompt; None is the paper's 10. (HF PEFT needs both to be given.)
        adapter_layers: how many layers have one, from the top; None is all but the lowest two, as in the paper.
        modules_to_save: modules of the base that are trained in full and saved along.
    """

    target_modules: str | None = None
    adapter_len: Count | None = None
    adapter_layers: Count | None = None
    modules_to_save: list[str] | None = None

    own_fields: ClassVar[frozenset[str]] = frozenset({"modules_to_save"})  # HF PEFT's has none

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ADAPTION_PROMPT

    @property
    def is_adaption_prompt(self) -> bool:
        return True


# -- families ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family's attention makes queries, keys and values.

    Args:
        attention: the name of its modules.
        queries: of the layer whose output holds the queries.
        output: of the layer that the heads' values go through; None leaves it out.
        read: (module, that output [B, T, ...], the module's arguments by name) -> queries [B, T, heads, d].
        keys: (module, prompt [L, H]) -> keys and values [L, kv_heads, d].
    """

    attention: str
    queries: str
    output: str | None
    read: Callable[[Any, Tensor, dict], Tensor]
    keys: Callable[[Any, Tensor], tuple[Tensor, Tensor]]


def rotary_queries(module: Any, projected: Tensor, named: dict) -> Tensor:
    """Of Llama and its like: a norm where there is one, then the rotary positions."""
    q = projected.unflatten(-1, (-1, module.head_dim))
    q = module.q_norm(q) if hasattr(module, "q_norm") else q
    cos, sin = (t.unsqueeze(2) for t in named["position_embeddings"])
    return q * cos + rotate_half(q) * sin


def separate_keys(module: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
    k, v = (own(module, name)(prompt).unflatten(-1, (-1, module.head_dim)) for name in ("k_proj", "v_proj"))
    return (module.k_norm(k) if hasattr(module, "k_norm") else k), v


def thirds(module: Any, projected: Tensor) -> Any:
    """GPT-2's queries, keys and values out of its one product."""
    return tuple(t.unflatten(-1, (-1, module.head_dim)) for t in projected.split(module.split_size, dim=-1))


def by_head(module: Any, projected: Tensor) -> Any:
    """The same of Bloom, where they stand side by side in each head."""
    return projected.unflatten(-1, (module.num_heads, 3, module.head_dim)).unbind(-2)


LLAMA = Family(attention="self_attn", queries="q_proj", output="o_proj", read=rotary_queries, keys=separate_keys)
FAMILIES: dict[str, Family] = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma3_text"), LLAMA) | {
    "gpt2": Family(
        attention="attn", queries="c_attn", output=None, read=lambda m, x, _: thirds(m, x)[0],
        keys=lambda m, prompt: thirds(m, own(m, "c_attn")(prompt))[1:],
    ),
    "bloom": Family(
        attention="self_attention", queries="query_key_value", output="dense", read=lambda m, x, _: by_head(m, x)[0],
        keys=lambda m, prompt: by_head(m, own(m, "query_key_value")(prompt))[1:],
    ),
}  # fmt: skip


def own(module: nn.Module, name: str) -> Any:
    """A layer of an attention module as the base has it, without adapters: a prompt's keys are its adapter's alone."""
    return as_it_was(innermost(getattr(module, name)))


# -- one layer -----------------------------------------------------------------------------------------------------------
class AdaptionPrompt(nn.Module):
    """What one adapter trains of one layer. HF PEFT's names: `adaption_prompt` [1, L, H], `adaption_gate` [1]."""

    def __init__(self, length: int, width: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.adaption_prompt = nn.Parameter(torch.empty(1, length, width, device=device, dtype=dtype).normal_())
        self.adaption_gate = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def forward(self, module: Any, family: Family, q: Tensor) -> Tensor:
        """What is added to an attention's output, for queries q [B, T, heads, d]: [B, T, H]."""
        k, v = family.keys(module, self.adaption_prompt[0].to(q.dtype))  # [L, kv_heads, d]
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[1], dim=1) for t in (k, v))
        scores = torch.einsum("bthd,lhd->bthl", q, k.to(q.dtype)) * q.shape[-1] ** -0.5
        weights = (self.adaption_gate * scores.softmax(-1, dtype=torch.float32)).to(q.dtype)
        heads = torch.einsum("bthl,lhd->bthd", weights, v.to(q.dtype)).flatten(2)
        if family.output is None:
            return heads
        layer = own(module, family.output)
        made = layer(heads)
        return made if layer.bias is None else made - layer.bias.to(made.dtype)


class PromptSite:
    """The hooks on one attention module: what it has made of queries, and what is added to its output.

    Args:
        host: the wrapper that the prompts belong to.
    """

    def __init__(self, host: Site, family: Family) -> None:
        self.host, self.family = host, family
        self.prompts: dict[str, AdaptionPrompt] = {}
        self.projected: list[Tensor] = []

    def active(self) -> list[str]:
        return [name for name in self.host.active_now() if name in self.prompts]

    def note(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        """Forward hook of the layer that makes the queries."""
        if self.active():
            self.projected[:] = [output]

    def add(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Forward hook of the attention module."""
        names = self.active()
        if not names:
            return None
        plain, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        q = self.family.read(module, self.projected.pop(), kwargs)
        if (routes := self.host.routes_now()) is None:
            made = self.added(module, names, plain, q)
        else:

            def change(group: Group, index: Index) -> Tensor | None:
                own_names = [name for name in group if name in self.prompts]
                return self.added(module, own_names, plain[index], q[index]) if own_names else None

            made = by_group(routes, plain, change)
        return made if rest is None else (made, *rest)

    def added(self, module: nn.Module, names: list[str], output: Tensor, q: Tensor) -> Tensor:
        """`output` [B, T, H] with some adapters' prompts read by queries [B, T, heads, d]."""
        for name in names:
            output = output + self.prompts[name](module, self.family, q).to(output.dtype)
        return output


# -- the method ----------------------------------------------------------------------------------------------------------
class AdaptionPrompts(Method):
    """One adapter in a host: `host.prompt_encoder[name]`, one `AdaptionPrompt` a layer."""

    def attach(self, host: Site, *, for_loading: bool = False) -> None:
        config: AdaptionPromptConfig = self.config  # type: ignore[assignment]
        family = self.family(host)
        config.target_modules = config.target_modules or family.attention
        found = [clean_path(path) for path, _ in base_modules(host.base) if path.endswith(f".{config.target_modules}")]
        if not found:
            raise TargetError(f"target_modules={config.target_modules!r}: no module of this model is called so.")
        config.adapter_len = config.adapter_len or 10
        config.adapter_layers = config.adapter_layers or max(len(found) - 2, 1)
        if len(found) < config.adapter_layers:
            raise ConfigError(f"adapter_layers={config.adapter_layers}: this model has {len(found)} layers with attention.")
        prompts = {}
        for path in found[-config.adapter_layers :]:
            layer = self.queries(host, path, family)
            width = layer.weight.shape[0] if family.queries == "c_attn" else layer.in_features
            dtype = host.adapter_dtype(layer)
            prompts[path.replace(".", "/")] = AdaptionPrompt(config.adapter_len, width, layer.weight.device, dtype)
        host.prompt_encoder[self.name] = nn.ModuleDict(prompts)

    def family(self, host: Site) -> Family:
        """UnsupportedError for a model that there is no form for."""
        kind = model_type(host.base)
        if kind not in FAMILIES:
            raise UnsupportedError(
                f"LLaMA-Adapter has no form for model type {kind!r}; it takes {', '.join(FAMILIES)}. Use "
                "Prefix Tuning, LoRA or bottleneck adapters."
            )
        return FAMILIES[kind]

    @staticmethod
    def queries(host: Site, path: str, family: Family) -> Any:
        """The layer that makes the queries of the attention module at a path; TargetError where it has none."""
        try:
            return own(host.base.get_submodule(path), family.queries)
        except AttributeError:
            raise TargetError(f"{path!r} is no attention module of this family: it has no {family.queries!r}.") from None

    def connect(self, host: Site) -> list[Any]:
        handles, family = [], self.family(host)
        for key, prompt in host.prompt_encoder[self.name].items():
            module = host.base.get_submodule(key.replace("/", "."))
            sites = (getattr(hook, "__self__", None) for hook in module._forward_hooks.values())
            site = next((s for s in sites if isinstance(s, PromptSite) and s.host is host), None)
            if site is None:
                site = PromptSite(host, family)
                handles.append(getattr(module, family.queries).register_forward_hook(site.note))
                handles.append(module.register_forward_hook(site.add, with_kwargs=True))
            site.prompts[self.name] = prompt
        return handles

    def detach(self, host: Site) -> None:
        del host.prompt_encoder[self.name]

    # -- tensors ---------------------------------------------------------------------------------------------------------
    def named_parameters(self, host: Site) -> Iterator[tuple[str, nn.Parameter]]:
        for key, parameter in host.prompt_encoder[self.name].named_parameters():
            yield f"prompt_encoder.{self.name}.{key}", parameter

    def file_parameters(self, host: Site) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters under their keys in the file."""
        for key, parameter in host.prompt_encoder[self.name].named_parameters():
            yield f"{self.file_prefix}{key.replace('/', '.')}", parameter

    def tensors(self, host: Site) -> dict[str, Tensor]:
        return {key: parameter.detach() for key, parameter in self.file_parameters(host)}

    def load(self, host: Site, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for key, parameter in self.file_parameters(host):
                parameter.copy_(tensors[key])


register(PeftType.ADAPTION_PROMPT, AdaptionPromptConfig, AdaptionPrompts)

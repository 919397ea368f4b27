"""Where the parts of a decoder are that a lean step calls (see `lean`): one description a family.

x = embed(ids) [+ positions(places)] [embed_norm]
each layer    x += o(attention(qkv(norms[0](x))))       queries and keys normed and turned, where a family does
              x += down(activation(up(norms[1](x))))    or activation(gate) * up
norm(x)       reaches the head
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .gated import plain


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Dotted names of modules, those of a layer from the layer on.

    Args:
        positions: embeddings of positions, and which of them is the first position's.
        embed_norm: behind the embeddings.
        rotary: what turns queries and keys.
        head_norms: of queries and of keys, in families that have them.
        attention: a layer's module that knows `head_dim` and, under the name `scale`, the factor of its scores.
        qkv: those for queries, keys and values; one, whose output lies head by head where `by_head` is set (q0 k0 v0 q1 …),
            else all queries first.
        up: into the MLP; of two the first one is the gate.
        needs: what the configuration has to say, lest the family do something else.
    """

    layers: str
    embed: str
    norm: str
    norms: tuple[str, str]
    attention: str
    qkv: tuple[str, ...]
    o: str
    up: tuple[str, ...]
    down: str
    activation: str
    positions: tuple[str, int] | None = None
    embed_norm: str | None = None
    rotary: str | None = None
    head_norms: tuple[str, str] | None = None
    scale: str = "scaling"
    by_head: bool = False
    needs: Mapping[str, Any] = field(default_factory=dict)


_LLAMA = Decoder(
    layers="model.layers", embed="model.embed_tokens", rotary="model.rotary_emb", norm="model.norm",
    norms=("input_layernorm", "post_attention_layernorm"), attention="self_attn",
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), o="self_attn.o_proj",
    up=("mlp.gate_proj", "mlp.up_proj"), down="mlp.down_proj", activation="mlp.act_fn",
)  # fmt: skip

FAMILIES = {
    "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA,
    "bloom": Decoder(
        layers="transformer.h", embed="transformer.word_embeddings", embed_norm="transformer.word_embeddings_layernorm",
        norm="transformer.ln_f", norms=("input_layernorm", "post_attention_layernorm"), attention="self_attention",
        qkv=("self_attention.query_key_value",), by_head=True, scale="inv_norm_factor", o="self_attention.dense",
        up=("mlp.dense_h_to_4h",), down="mlp.dense_4h_to_h", activation="mlp.gelu_impl",
        needs={"apply_residual_connection_post_layernorm": False, "slow_but_exact": False},
    ),
    "gpt2": Decoder(
        layers="transformer.h", embed="transformer.wte", positions=("transformer.wpe", 0), norm="transformer.ln_f",
        norms=("ln_1", "ln_2"), attention="attn", qkv=("attn.c_attn",), o="attn.c_proj", up=("mlp.c_fc",),
        down="mlp.c_proj", activation="mlp.act", needs={"add_cross_attention": False},
    ),
    "opt": Decoder(
        layers="model.decoder.layers", embed="model.decoder.embed_tokens", positions=("model.decoder.embed_positions", 2),
        norm="model.decoder.final_layer_norm", norms=("self_attn_layer_norm", "final_layer_norm"), attention="self_attn",
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), o="self_attn.out_proj", up=("fc1",), down="fc2",
        activation="activation_fn", needs={"do_layer_norm_before": True, "_remove_final_layer_norm": False},
    ),
}  # fmt: skip


def part(root: Any, name: str) -> Any:
    """A module by its dotted name ("" is the root itself); None where there is none."""
    for step in name.split(".") if name else ():
        root = getattr(root, step, None)
    return root


def decoder(base: Any) -> Decoder | None:
    """What is known of a base's family; None where it is no such family, or not as its authors wrote it."""
    config = getattr(base, "config", None)
    kind = getattr(config, "model_type", "")
    found = FAMILIES.get(kind)
    if found is None or base.get_output_embeddings() is None or part(base, found.layers) is None:
        return None
    size, embedded = (getattr(config, name, None) for name in ("hidden_size", "word_embed_proj_dim"))
    if embedded not in (None, size) or any(getattr(config, n, v) != v for n, v in found.needs.items()):
        return None
    # modules that a lean step goes past: the base, those around its layers, each layer, and those around a layer's parts
    steps = found.layers.split(".")
    outer = [part(base, ".".join(steps[:end])) for end in range(len(steps))]
    inner = sorted({""} | {_parent(n) for n in (*found.qkv, found.o, *found.up, found.down)})
    by_layer = {tuple(plain(type(part(layer, n))) for n in inner) for layer in part(base, found.layers)}
    homes = {plain(type(m)).__module__ for m in outer} | {kind.__module__ for kinds in by_layer for kind in kinds}
    return found if len(by_layer) == 1 and homes == {f"transformers.models.{kind}.modeling_{kind}"} else None


def _parent(name: str) -> str:
    return name.rpartition(".")[0]

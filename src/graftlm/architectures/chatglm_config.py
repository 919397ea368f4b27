"""The configuration of ChatGLM models: the keys of their published config.json, and what is not implemented.

The published code has options that no checkpoint uses; those are refused, and so are ChatGLM-6B (version 1, another
architecture), chatglm2-6b-32k (there `rope_ratio` divides positions, where later models multiply the base of their
frequencies with it), weights in the published int4 format, and models that see images.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ..errors import UnsupportedError

# Options with one value that is implemented: that of every published checkpoint.
_FIXED = {
    "apply_residual_connection_post_layernorm": False, "fp32_residual_connection": False, "multi_query_attention": True,
    "original_rope": True, "post_layer_norm": True, "rmsnorm": True,
}  # fmt: skip
_VERSION_1 = ("position_encoding_2d", "inner_hidden_size")


class ChatGLMConfig(PreTrainedConfig):
    """The keys of the published config.json (defaults: chatglm3-6b). Keys that are not listed here are kept as they are.

    Raises:
        UnsupportedError: the configuration of a model that is not implemented here.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers", "vocab_size": "padded_vocab_size", "intermediate_size": "ffn_hidden_size",
        "head_dim": "kv_channels", "num_key_value_heads": "multi_query_group_num", "max_position_embeddings": "seq_length",
        "rms_norm_eps": "layernorm_epsilon",
    }  # fmt: skip

    num_layers: int = 28
    padded_vocab_size: int | None = None
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    kv_channels: int = 128
    num_attention_heads: int = 32
    multi_query_attention: bool = True
    multi_query_group_num: int = 2
    seq_length: int = 8192
    rope_ratio: float | None = 1.0
    original_rope: bool = True
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    layernorm_epsilon: float = 1e-5
    rmsnorm: bool = True
    post_layer_norm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    fp32_residual_connection: bool = False
    add_bias_linear: bool = False
    add_qkv_bias: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs: Any) -> None:
        vocab_size = kwargs.pop("vocab_size", None)  # published files have both; the weights follow the padded size
        if self.padded_vocab_size is None:
            self.padded_vocab_size = 65024 if vocab_size is None else vocab_size
        names = f"{kwargs.get('name_or_path')} {kwargs.get('_name_or_path')}".lower()
        super().__post_init__(**kwargs)
        self.check()
        if "chatglm2" in names and self.rope_ratio not in (None, 1):
            raise UnsupportedError(
                f"A ChatGLM2 model with rope_ratio={self.rope_ratio} interpolates its positions, which is not implemented. "
                "Use chatglm2-6b, or one of the chatglm3-6b models."
            )

    def check(self) -> None:
        """Raise UnsupportedError for what is not implemented, all of it at once."""
        if any(getattr(self, key, None) is not None for key in _VERSION_1):
            raise UnsupportedError(
                "This is the configuration of ChatGLM-6B, version 1 (it has "
                f"{' and '.join(k for k in _VERSION_1 if hasattr(self, k))}), another architecture than its successors. "
                "Use zai-org/chatglm3-6b or zai-org/chatglm2-6b."
            )
        given = {key: getattr(self, key) for key in _FIXED}
        wrong = [f"{key}={given[key]!r} (expected {value})" for key, value in _FIXED.items() if given[key] != value]
        if getattr(self, "vision_config", None) is not None:
            wrong.append("vision_config (a model that sees images; expected a text model)")
        if getattr(self, "pre_seq_len", None):
            wrong.append(f"pre_seq_len={self.pre_seq_len} (leave it out, and attach a PrefixTuningConfig)")
        if getattr(self, "quantization_bit", None):
            wrong.append(
                f"quantization_bit={self.quantization_bit} (take the checkpoint that is not quantised, and load it with "
                "quantization_config=BitsAndBytesConfig(load_in_4bit=True))"
            )
        if wrong:
            raise UnsupportedError(f"This ChatGLM configuration is not implemented: {'; '.join(wrong)}.")

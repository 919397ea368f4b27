"""P-Tuning: virtual tokens that a small network makes out of a trained table (arXiv:2103.10385).

``v = f(E)``, E [P, H]; f is a three-layer MLP ``W3 relu(W2 relu(W1 e))``, or a bidirectional LSTM followed by
``W2 relu(W1 h)``. Only v [P, H] is kept for use; E and f are kept in the training-state file.

What differs from HF PEFT: besides the random start there are Prompt Tuning's, from the base's embeddings. HF PEFT
stores one draw of the LSTM's dropout when saved in training mode and loses E and f; here neither happens.
"""

from __future__ import annotations

import enum
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..modes import evaluating
from .base import PeftType, PromptLearningConfig, Site, as_enum, register
from .fields import Count, Probability, also_takes
from .soft_prompt import SoftPrompt, start_embeddings, text_ids


class PromptEncoderReparameterizationType(str, enum.Enum):
    """The network behind the virtual tokens."""

    MLP = "MLP"
    LSTM = "LSTM"


@also_takes({"peft_version": ...})
@dataclass(kw_only=True)
class PromptEncoderConfig(PromptLearningConfig):
    """Configuration of P-Tuning.

    Args:
        encoder_reparameterization_type: MLP or LSTM.
        encoder_hidden_size: width of the network; token_dim when None.
        encoder_num_layers: layers of the LSTM (the MLP always has three linear layers).
        encoder_dropout: between the LSTM's layers.
        init_weights: None (random, HF PEFT's), or where the virtual tokens start: "vocab" (embeddings of random tokens) or
            "text" (of `init_text`, repeated or cut to their number; needs tokenizer_name_or_path, too).
        init_text: the text for "text".
        tokenizer_name_or_path: whose tokens `init_text` is.
    """

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: Count | None = None
    encoder_num_layers: Count = 2
    encoder_dropout: Probability = 0.0
    init_weights: str | None = None
    init_text: str | None = None
    tokenizer_name_or_path: str | None = None

    own_fields: ClassVar[frozenset[str]] = frozenset({"init_weights", "init_text", "tokenizer_name_or_path"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.P_TUNING
        self.encoder_reparameterization_type = as_enum(
            PromptEncoderReparameterizationType, self.encoder_reparameterization_type, "encoder_reparameterization_type"
        )
        if self.init_weights not in (None, "vocab", "text"):
            raise ConfigError(f"init_weights={self.init_weights!r}: expected None (random), 'vocab' or 'text'.")
        if self.init_weights == "text" and not (self.init_text and self.tokenizer_name_or_path):
            raise ConfigError("init_weights='text' needs init_text and tokenizer_name_or_path.")
        is_mlp = self.encoder_reparameterization_type is PromptEncoderReparameterizationType.MLP
        if is_mlp and self.encoder_num_layers != 2:
            warnings.warn("encoder_num_layers is for the LSTM; the MLP always has three linear layers.", stacklevel=4)


class PromptEncoder(nn.Module):
    """The trained table and its network, under HF PEFT's parameter names."""

    def __init__(self, rows: int, width: int, config: PromptEncoderConfig, device: torch.device | str, dtype: torch.dtype):
        super().__init__()
        hidden = config.encoder_hidden_size or width
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(rows, width, **options)
        self.lstm_head: nn.LSTM | None = None
        if config.encoder_reparameterization_type is PromptEncoderReparameterizationType.LSTM:
            self.lstm_head = nn.LSTM(
                width, hidden, config.encoder_num_layers, dropout=config.encoder_dropout, bidirectional=True,
                batch_first=True, **options,
            )  # fmt: skip
            sizes = [2 * hidden, 2 * hidden, width]
        else:
            sizes = [width, hidden, hidden, width]
        layers: list[nn.Module] = []
        for a, b in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(a, b, **options), nn.ReLU()]
        self.mlp_head = nn.Sequential(*layers[:-1])

    def features(self) -> Tensor:
        """What the last layer gets: [rows, its width]."""
        table = self.embedding.weight
        return self.mlp_head[:-1](table if self.lstm_head is None else self.lstm_head(table[None])[0][0])

    def forward(self) -> Tensor:
        """Virtual tokens [rows, width]."""
        return self.mlp_head[-1](self.features())

    @torch.no_grad()
    def start_at(self, tokens: Tensor) -> None:
        """Set the last layer so that the virtual tokens are these [rows, width], or as near to them as it can come.

        Of all weights that do, the least squares take the smallest, which are below the usual start values.
        """
        last: Any = self.mlp_head[-1]
        with evaluating(self):
            x, wanted = self.features().double().cpu(), tokens.double().cpu()
        weight = torch.linalg.pinv(x - x.mean(0)) @ (wanted - wanted.mean(0))  # the bias makes the mean
        last.weight.copy_(weight.T)
        last.bias.copy_(wanted.mean(0) - x.mean(0) @ weight)


class PTuning(SoftPrompt):
    """One P-Tuning adapter in a host."""

    reparameterised = True

    def fill_config(self, host: Site) -> None:
        super().fill_config(host)
        self.config.encoder_hidden_size = self.config.encoder_hidden_size or self.config.token_dim  # type: ignore[attr-defined]

    def build(self, host: Site, for_loading: bool) -> Any:
        config: PromptEncoderConfig = self.config  # type: ignore[assignment]
        encoder = PromptEncoder(*self.table_shape, config, host.adapter_device, host.adapter_dtype())
        if config.init_weights is not None and not for_loading:
            ids = None
            if config.init_weights == "text":
                ids = text_ids(config.init_text, config.tokenizer_name_or_path, "init_text")  # type: ignore[arg-type]
            encoder.start_at(start_embeddings(host, self.table_shape[0], ids))
        return encoder


register(PeftType.P_TUNING, PromptEncoderConfig, PTuning)

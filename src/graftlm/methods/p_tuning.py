"""P-Tuning: virtual tokens that a small network makes out of a trained table (arXiv:2103.10385).

``v = f(E)``, E [P, H]; f is a three-layer MLP ``W3 relu(W2 relu(W1 e))``, or a bidirectional LSTM followed by
``W2 relu(W1 h)``. Only v [P, H] is kept for use; E and f are kept in the training-state file.

HF PEFT stores one draw of the LSTM's dropout when saved in training mode and loses E and f; here neither happens.
"""

from __future__ import annotations

import enum
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .base import PeftType, PromptLearningConfig, Site, as_enum, register
from .fields import Count, Probability, also_takes
from .soft_prompt import SoftPrompt


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
    """

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: Count | None = None
    encoder_num_layers: Count = 2
    encoder_dropout: Probability = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.P_TUNING
        self.encoder_reparameterization_type = as_enum(
            PromptEncoderReparameterizationType, self.encoder_reparameterization_type, "encoder_reparameterization_type"
        )
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

    def forward(self) -> Tensor:
        """Virtual tokens [rows, width]."""
        x = self.embedding.weight[None]
        if self.lstm_head is not None:
            x = self.lstm_head(x)[0]
        return self.mlp_head(x)[0]


class PTuning(SoftPrompt):
    """One P-Tuning adapter in a host."""

    reparameterised = True

    def fill_config(self, host: Site) -> None:
        super().fill_config(host)
        self.config.encoder_hidden_size = self.config.encoder_hidden_size or self.config.token_dim  # type: ignore[attr-defined]

    def build(self, host: Site, for_loading: bool) -> Any:
        return PromptEncoder(*self.table_shape, self.config, host.adapter_device, host.adapter_dtype())  # type: ignore[arg-type]


register(PeftType.P_TUNING, PromptEncoderConfig, PTuning)

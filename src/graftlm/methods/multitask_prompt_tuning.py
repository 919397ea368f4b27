"""Multitask Prompt Tuning: virtual tokens that tasks share, scaled by a low-rank matrix of each task (arXiv:2303.02861).

``P_k = E * (C_k R_k)`` for task k: E [P, H], C_k [P, r], R_k [r, H]. On encoder-decoder models E and C have twice as many
rows: the second half enters the decoder (with `num_transformer_submodules=1` only the encoder's are there). Each row of a
batch has its task: `task_ids` [B]. Rows of different tasks are to the passes what rows of different adapters are.

Field names, defaults, maths and files are HF PEFT's (its `MultitaskPromptTuningConfig`); what differs from it:
* start values are read from safetensors only, and not again when a saved adapter is attached;
* on encoder-decoder models `generate` has the decoder's virtual tokens that were trained (HF PEFT leaves them out there);
* with one task `task_ids` may be left out; in mixed batches each row has its adapter and its task.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..routing import current_task
from .base import PeftType, Site, register
from .fields import Count, also_takes
from .prompt_tuning import PromptTuning, PromptTuningConfig


class MultitaskPromptTuningInit(str, enum.Enum):
    """Start values: as in Prompt Tuning, or out of an adapter that was trained on several tasks."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


FROM_SOURCE = (
    MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS,
    MultitaskPromptTuningInit.EXACT_SOURCE_TASK,
    MultitaskPromptTuningInit.ONLY_SOURCE_SHARED,
)


@also_takes({"peft_version": ...})
@dataclass(kw_only=True)
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Configuration of Multitask Prompt Tuning; `PromptTuningConfig`'s fields, and

    Args:
        prompt_tuning_init: RANDOM, TEXT, or from a trained adapter's file: AVERAGE_SOURCE_TASKS (E, and the mean of its
            tasks' C and R), EXACT_SOURCE_TASK (E, and one task's), ONLY_SOURCE_SHARED (E alone).
        prompt_tuning_init_state_dict_path: that file, `adapter_model.safetensors`.
        prompt_tuning_init_task: which task, for EXACT_SOURCE_TASK.
        num_ranks: rank r of the tasks' matrices.
        num_tasks: how many tasks there are.
    """

    prompt_tuning_init: MultitaskPromptTuningInit | str = MultitaskPromptTuningInit.RANDOM  # type: ignore[assignment]
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int = 0
    num_ranks: Count = 1
    num_tasks: Count = 1

    inits: ClassVar[type[enum.Enum]] = MultitaskPromptTuningInit
    neutral_fields: ClassVar[frozenset[str]] = frozenset({"prompt_tuning_init_state_dict_path", "prompt_tuning_init_task"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.MULTITASK_PROMPT_TUNING
        init: Any = self.prompt_tuning_init
        path = self.prompt_tuning_init_state_dict_path
        if init not in FROM_SOURCE:
            return
        if path is None or not path.endswith(".safetensors"):
            raise ConfigError(
                f"prompt_tuning_init={init.value} needs prompt_tuning_init_state_dict_path, the adapter_model.safetensors "
                f"of an adapter that was trained on the source tasks; got {path!r} (a pickle is not read)."
            )
        if init is not MultitaskPromptTuningInit.ONLY_SOURCE_SHARED and self.num_tasks != 1:
            raise ConfigError(
                f"prompt_tuning_init={init.value} starts one task, and num_tasks={self.num_tasks}: leave num_tasks out, or "
                "start with ONLY_SOURCE_SHARED."
            )


class MultitaskPromptEmbedding(nn.Module):
    """E, C and R of all tasks under HF PEFT's names: `embedding.weight` [P, H], `prefix_task_cols` [tasks, P, r],
    `prefix_task_rows` [tasks, r, H]."""

    def __init__(self, shape: tuple[int, int], tasks: int, rank: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(*shape, **options)
        self.prefix_task_cols = nn.Parameter(torch.empty(tasks, shape[0], rank, **options).normal_(0, 0.02))
        self.prefix_task_rows = nn.Parameter(torch.empty(tasks, rank, shape[1], **options).normal_(0, 0.02))

    def forward(self, task: int) -> Tensor:
        return self.embedding.weight * (self.prefix_task_cols[task] @ self.prefix_task_rows[task])


class MultitaskPromptTuning(PromptTuning):
    """One adapter of several tasks in a host."""

    @property
    def tasks(self) -> int:
        return self.config.num_tasks  # type: ignore[attr-defined]

    def table(self, host: Site) -> Any:
        config: MultitaskPromptTuningConfig = self.config  # type: ignore[assignment]
        size = config.num_tasks, config.num_ranks
        return MultitaskPromptEmbedding(self.table_shape, *size, host.adapter_device, host.adapter_dtype())

    def build(self, host: Site, for_loading: bool) -> Any:
        module = super().build(host, for_loading)
        if self.config.prompt_tuning_init in FROM_SOURCE and not for_loading:  # type: ignore[attr-defined]
            self.fill(module, self.source())
        return module

    def source(self) -> dict[str, Tensor]:
        """The start values that the configuration names, under the file's keys."""
        config: MultitaskPromptTuningConfig = self.config  # type: ignore[assignment]
        path, init = Path(config.prompt_tuning_init_state_dict_path or ""), config.prompt_tuning_init
        try:
            found = load_file(path)
            tables = {"prompt_embeddings": found["prompt_embeddings"]}
            if init is not MultitaskPromptTuningInit.ONLY_SOURCE_SHARED:
                tables |= {key: found[key] for key in ("prefix_task_cols", "prefix_task_rows")}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"prompt_tuning_init_state_dict_path: {path} cannot be read ({error}).") from error
        except KeyError as error:
            raise CheckpointError(f"{path} has no {error}: it is no adapter of Multitask Prompt Tuning.") from error
        for key in [k for k in tables if k != "prompt_embeddings"]:
            if init is MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS:
                tables[key] = tables[key].mean(0, keepdim=True)
                continue
            task, tasks = config.prompt_tuning_init_task, len(tables[key])
            if not 0 <= task < tasks:
                raise ConfigError(f"prompt_tuning_init_task={task}: {path} has tasks 0 to {tasks - 1}.")
            tables[key] = tables[key][task : task + 1]
        return tables

    @staticmethod
    def named(module: MultitaskPromptEmbedding) -> dict[str, Tensor]:
        """Its tables under the file's keys."""
        return {
            "prefix_task_cols": module.prefix_task_cols,
            "prefix_task_rows": module.prefix_task_rows,
            "prompt_embeddings": module.embedding.weight,
        }

    def fill(self, module: MultitaskPromptEmbedding, tables: dict[str, Tensor]) -> None:
        own = self.named(module)
        for key, value in tables.items():
            if value.shape != own[key].shape:
                raise ConfigError(
                    f"{self.config.prompt_tuning_init_state_dict_path}: {key} is {tuple(value.shape)}, expected "  # type: ignore[attr-defined]
                    f"{tuple(own[key].shape)}. Set num_virtual_tokens and num_ranks as in the source, and use its base."
                )
        with torch.no_grad():
            for key, value in tables.items():
                own[key].copy_(value)

    def virtual_tokens(self, host: Site) -> Tensor | None:
        return self.encoder(host)(current_task() or 0)[: self.config.num_virtual_tokens]  # type: ignore[attr-defined]

    @property
    def decoder_count(self) -> int:
        config: MultitaskPromptTuningConfig = self.config  # type: ignore[assignment]
        return config.num_virtual_tokens if config.num_transformer_submodules == 2 else 0

    def decoder_tokens(self, host: Site) -> Tensor | None:
        count = self.decoder_count
        return self.encoder(host)(current_task() or 0)[count:] if count else None

    # -- tensors ---------------------------------------------------------------------------------------------------------
    def tensors(self, host: Site) -> dict[str, Tensor]:
        return {key: value.detach() for key, value in self.named(self.encoder(host)).items()}

    def expected_shapes(self, host: Site) -> dict[str, torch.Size]:
        return {key: value.shape for key, value in self.tensors(host).items()}

    def load(self, host: Site, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for key, value in self.named(self.encoder(host)).items():
                value.copy_(tensors[key])

    def training_tensors(self, host: Site) -> dict[str, Tensor]:
        return {}


register(PeftType.MULTITASK_PROMPT_TUNING, MultitaskPromptTuningConfig, MultitaskPromptTuning)

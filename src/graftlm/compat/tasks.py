"""HF PEFT's classes by task. The wrapper is one class; these answer `isinstance` by the active adapter's task, and their
constructors write the task into a configuration that has none."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from torch import nn

from ..bundled import resolve
from ..errors import CheckpointError, ConfigError, UnsupportedError
from ..methods import PeftConfig, TaskType
from ..model import PeftModel


class ByTask(type):
    """A wrapper is an instance of the class of its task, however it was made."""

    task: TaskType | None

    def __instancecheck__(cls, instance: Any) -> bool:
        if cls.__dict__.get("task") is None:
            return super().__instancecheck__(instance)
        return isinstance(instance, PeftModel) and instance.task_type == cls.task


class PeftModelForTask(PeftModel, metaclass=ByTask):
    """What the classes below share.

    Raises:
        ConfigError: the configuration is of another task.
    """

    task: ClassVar[TaskType | None] = None

    def __new__(cls, model: nn.Module | None = None, peft_config: Any = None, *args: Any, **kwargs: Any) -> PeftModel:
        if isinstance(peft_config, PeftConfig):
            peft_config.task_type = peft_config.task_type or cls.task
            if peft_config.task_type != cls.task:
                raise ConfigError(
                    f"{cls.__name__} is for task_type={cls.task!s}, and the configuration says {peft_config.task_type!s}. "
                    "get_peft_model(model, config) goes by the configuration."
                )
        return super().__new__(cls, model, peft_config, *args, **kwargs)


class PeftModelForCausalLM(PeftModelForTask):
    task = TaskType.CAUSAL_LM


class PeftModelForSeq2SeqLM(PeftModelForTask):
    task = TaskType.SEQ_2_SEQ_LM


class PeftModelForSequenceClassification(PeftModelForTask):
    task = TaskType.SEQ_CLS


class PeftModelForTokenClassification(PeftModelForTask):
    task = TaskType.TOKEN_CLS


class PeftModelForQuestionAnswering(PeftModelForTask):
    task = TaskType.QUESTION_ANS


class PeftModelForFeatureExtraction(PeftModelForTask):
    task = TaskType.FEATURE_EXTRACTION


BY_TASK = {cls.task: cls for cls in PeftModelForTask.__subclasses__()}


class AutoPeftModel:
    """An adapter with the base that its configuration names, in one call. This class is for adapters without a task; their
    configuration then names the base's class, of transformers.

    Its constructor raises; see `from_pretrained`.
    """

    task: ClassVar[TaskType | None] = None
    auto_class: ClassVar[str] = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedError(f"Use {type(self).__name__}.from_pretrained(adapter).")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base, then the adapter.

        Args:
            import_allowlist: HF PEFT's; it may name transformers only: a configuration imports nothing here.
            kwargs: for the base's `from_pretrained`; `subfolder`, `cache_dir`, `token` and `local_files_only` hold for both.

        Raises:
            ConfigError: the adapter is for another task.
            CheckpointError: its configuration names no base.
        """
        if others := [name for name in import_allowlist or () if name.partition(".")[0] != "transformers"]:
            raise UnsupportedError(
                f"import_allowlist={others}: a configuration imports nothing here. Load the base yourself and call "
                "PeftModel.from_pretrained(base, adapter)."
            )
        hub: dict[str, Any] = {k: kwargs[k] for k in ("cache_dir", "token", "local_files_only", "subfolder") if k in kwargs}
        kwargs.pop("subfolder", None)
        found = config or PeftConfig.from_pretrained(pretrained_model_name_or_path, revision=revision, **hub)
        path = found.base_model_name_or_path
        if not path:
            raise CheckpointError(
                f"{os.fspath(pretrained_model_name_or_path)} does not say which base it belongs to "
                "(base_model_name_or_path). Load the base yourself and call PeftModel.from_pretrained(base, adapter)."
            )
        base = cls._base_class(found).from_pretrained(resolve(path), revision=found.revision, **kwargs)
        fit_vocabulary(base, pretrained_model_name_or_path)
        options: dict[str, Any] = {**hub, **({} if revision is None else {"revision": revision})}
        return PeftModel.from_pretrained(
            base, pretrained_model_name_or_path, adapter_name, is_trainable=is_trainable, config=config, **options
        )

    @classmethod
    def _base_class(cls, config: PeftConfig) -> Any:
        import transformers

        if config.task_type != cls.task:
            right = next((c.__name__ for c in AUTO if c.task == config.task_type), "AutoPeftModel")
            raise ConfigError(f"This adapter has task_type={config.task_type!s}; use {right}.")
        if cls.task is not None:
            return getattr(transformers, cls.auto_class)
        named = config.auto_mapping or {}
        name, library = str(named.get("base_model_class", "")), str(named.get("parent_library", ""))
        found = getattr(transformers, name, None) if library.partition(".")[0] == "transformers" else None
        if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
            raise ConfigError(
                f"The adapter has no task_type, and its auto_mapping={config.auto_mapping!r} names no model class of "
                "transformers. Load the base yourself and call PeftModel.from_pretrained(base, adapter)."
            )
        return found


def fit_vocabulary(base: Any, adapter: str | os.PathLike) -> None:
    """Give the base rows for tokens that were added in training, where a tokenizer was saved beside the adapter."""
    folder = os.fspath(adapter)
    if not os.path.isfile(os.path.join(folder, "tokenizer_config.json")) or not hasattr(base, "resize_token_embeddings"):
        return
    from transformers import AutoTokenizer

    count = len(AutoTokenizer.from_pretrained(folder))
    if count > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(count)


class AutoPeftModelForCausalLM(AutoPeftModel):
    task, auto_class = TaskType.CAUSAL_LM, "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    task, auto_class = TaskType.SEQ_2_SEQ_LM, "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    task, auto_class = TaskType.SEQ_CLS, "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    task, auto_class = TaskType.TOKEN_CLS, "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    task, auto_class = TaskType.QUESTION_ANS, "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    task, auto_class = TaskType.FEATURE_EXTRACTION, "AutoModel"


AUTO = AutoPeftModel.__subclasses__()


PeftMixedModel = PeftModel  # HF PEFT has a class of its own for adapters of several methods; here every wrapper takes them

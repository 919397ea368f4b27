"""From a base and settings to a service: the wrapper, the engine, the adapters that are there from the start."""

from __future__ import annotations

import logging
from typing import Any

from ..architectures import is_encoder_decoder
from ..errors import CheckpointError, GraftError, UnsupportedError
from ..inference.batches import BatchEngine
from ..inference.config import EngineConfig
from ..inference.engine import Engine
from ..methods import PromptTuningConfig
from ..model import get_peft_model
from ..passes.served import Served
from .service import Service
from .settings import Settings

logger = logging.getLogger("graftlm.serving")


def service_of(base: Any, tokenizer: Any, settings: Settings, **limits: Any) -> Service:
    """A service over a base, running, its adapters loaded and tried out.

    Args:
        base: a transformers model in evaluation mode.
        limits: fields of `EngineConfig`.

    Raises:
        CheckpointError: an adapter cannot be loaded.
        UnsupportedError: a base that writes no text.
    """
    wanted = max(limits.pop("max_adapters", 8), len(settings.adapters))
    config = EngineConfig(
        max_adapters=wanted, max_n=settings.max_choices, max_waiting=settings.queue_requests,
        max_waiting_tokens=settings.queue_tokens, **limits,
    )  # fmt: skip
    engine = engine_for(without_adapters(base), tokenizer, config)
    service = Service(engine, tokenizer, settings)
    service.start()
    try:
        engine.ready("").result()
        for name, folder in settings.adapters.items():
            try:
                engine.load(name, folder).result()
                engine.ready(name).result()
            except GraftError as error:
                raise CheckpointError(f"--adapter {name}={folder}: {error}") from error
    except BaseException:
        service.stop()
        raise
    return service


def engine_for(model: Any, tokenizer: Any, config: EngineConfig) -> Engine:
    """An engine that goes step by step where the base can, which is tried out; one of whole batches where it cannot."""
    try:
        Served(model).admit(())
    except UnsupportedError as why:
        logger.warning("Served in whole batches: %s", why)
        return BatchEngine(model, tokenizer, config)
    return Engine(model, tokenizer, config)


def without_adapters(base: Any) -> Any:
    """A wrapper over a base that has no adapter yet."""
    task = "SEQ_2_SEQ_LM" if is_encoder_decoder(base) else "CAUSAL_LM"
    made = get_peft_model(base, PromptTuningConfig(num_virtual_tokens=1, task_type=task), "first")
    made.delete_adapter("first")
    return made.eval()

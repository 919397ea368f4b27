"""A set of adapters by itself: what stands below the wrapper that users call."""

from __future__ import annotations

import pytest
import torch
from families import batch
from helpers import attach, close, config, fresh

import graftlm
from graftlm.adapters import AdapterSet
from graftlm.errors import AdapterError


def test_a_set_needs_no_wrapper() -> None:
    """Adapters in the base's layers work in calls of the base; names and parameters are the wrapper's."""
    base, inputs = fresh("llama"), batch("llama")
    alone, wrapper = AdapterSet(base).eval(), attach("llama", "lora")
    alone._attach("default", config("lora", "llama"))
    alone.set_adapter("default")
    with torch.no_grad():
        for (_, own), (_, other) in zip(
            alone.adapter_parameters("default"), wrapper.adapter_parameters("default"), strict=True
        ):
            own.copy_(other)
    assert not isinstance(alone, graftlm.PeftModel) and isinstance(wrapper, AdapterSet)
    assert alone.state_dict().keys() == wrapper.state_dict().keys()
    with torch.no_grad():
        close(base(**inputs).logits, wrapper(**inputs).logits)
        alone.delete_adapter("default")
        close(base(**inputs).logits, fresh("llama")(**inputs).logits)


def test_an_error_leaves_a_set_as_it_was() -> None:
    alone = AdapterSet(fresh("llama"))
    before = alone.state_dict().keys()
    with pytest.raises(AdapterError, match="cannot name an adapter"):
        alone._attach("a.b", config("lora", "llama"))
    with pytest.raises(AdapterError, match="no adapter 'x'; attached: none"):
        alone.set_adapter("x")
    assert alone.state_dict().keys() == before and not alone.methods

"""Data: loading, formats, the tokenise step, collators, and a look at what came out.

data = load_data("tweets")
prepared = prepare(data, tokenizer)                   # input_ids, attention_mask, labels
batch = CausalLMCollator(tokenizer)(list(prepared["train"].select(range(8))))
rich.print(show(prepared["train"], tokenizer))
"""

from graftlm.data._base import Format
from graftlm.data._pair import IGNORE_INDEX, Pair
from graftlm.data.bundled import BUNDLED
from graftlm.data.chat import ChatFormat, chat_ids_and_mask, chat_prompt_ids, render_chat
from graftlm.data.collators import (
    CausalLMCollator,
    FixedLengthCollator,
    LengthSortedCollator,
    Seq2SeqCollator,
)
from graftlm.data.formats import (
    FORMATS,
    AdgenFormat,
    AlpacaFormat,
    CompletionFormat,
    LabelFormat,
    TextFormat,
    get_format,
    guess_format,
)
from graftlm.data.loading import load_data
from graftlm.data.packing import PackedRows, PackingCollator
from graftlm.data.prepare import prepare, prompts_and_targets
from graftlm.data.show import show

__all__ = [
    "BUNDLED",
    "FORMATS",
    "IGNORE_INDEX",
    "AdgenFormat",
    "AlpacaFormat",
    "CausalLMCollator",
    "ChatFormat",
    "CompletionFormat",
    "FixedLengthCollator",
    "Format",
    "LabelFormat",
    "LengthSortedCollator",
    "PackedRows",
    "PackingCollator",
    "Pair",
    "Seq2SeqCollator",
    "TextFormat",
    "chat_ids_and_mask",
    "get_format",
    "guess_format",
    "load_data",
    "prepare",
    "prompts_and_targets",
    "chat_prompt_ids",
    "render_chat",
    "show",
]

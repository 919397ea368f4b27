"""ChatGLM's files in small: a SentencePiece model trained on the bundled data sets, and a folder as the published one."""

from __future__ import annotations

import functools
import io
import itertools
import json
from pathlib import Path
from typing import Any

from graftlm.data import load_data

# The published file's settings: bytes for what has no piece, texts untouched, a space before each.
SETTINGS = {
    "model_type": "bpe", "byte_fallback": True, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1,
    "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": True,
    "character_coverage": 0.98, "minloglevel": 2,
}  # fmt: skip
# The keys of chatglm3-6b's tokenizer_config.json, with a template that renders as that of one of its revisions does.
TEMPLATE = (
    "[gMASK]sop{% for m in messages %}<|{{ m.role }}|> \n {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG = {
    "added_tokens_decoder": {}, "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    "chat_template": TEMPLATE, "clean_up_tokenization_spaces": False, "do_lower_case": False, "eos_token": "</s>",
    "model_max_length": 1000000000000000019884624838656, "pad_token": "<unk>", "padding_side": "left",
    "remove_space": False, "tokenizer_class": "ChatGLMTokenizer", "unk_token": "<unk>",
}  # fmt: skip
REMOTE_CODE = "raise RuntimeError('remote code was run')\n"


@functools.cache
def sentencepiece_model(pieces: int = 1500, **settings: Any) -> bytes:
    """The content of a tokenizer.model with so many pieces."""
    from sentencepiece import SentencePieceTrainer

    texts = [
        value
        for name in ("adgen-zh", "quotes", "prompts", "tweets")
        for row in itertools.islice(load_data(name)["train"], 100)
        for value in row.values()
        if isinstance(value, str)
    ]
    model = io.BytesIO()
    options = SETTINGS | {key: list(value) for key, value in settings.items()}
    SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, vocab_size=pieces, **options)
    return model.getvalue()


def tokenizer_folder(folder: Path, model: bytes | None = None, **config: Any) -> Path:
    """The tokenizer's files, with remote code that must not run; `config` changes tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model() if model is None else model)
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG | config), encoding="utf-8")
    (folder / "tokenization_chatglm.py").write_text(REMOTE_CODE, encoding="utf-8")
    return folder


def model_config(folder: Path, **config: Any) -> Path:
    """A config.json in the published manner, which names remote code for the model."""
    remote = {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    }
    values = {"model_type": "chatglm", "architectures": ["ChatGLMModel"], "auto_map": remote} | config
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    for name in ("configuration_chatglm.py", "modeling_chatglm.py"):
        (folder / name).write_text(REMOTE_CODE, encoding="utf-8")
    return folder

"""Tiny tokenizers, made here, and no network."""

import socket

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "Tweet text : @skyhopair flight delayed again Label : complaint",
    "Tweet text : thank you for the lovely flight Label : no complaint",
    "Human: 给出三个保持健康的建议。\n\nAssistant: 多吃蔬菜。",
    "类型#裙*风格#简约 这条裙子很好看。",
    "I want you to act as a motivational coach.",
]
SPECIAL = ["<pad>", "<s>", "</s>", "[gMASK]", "sop", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("the test tried to open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Arrow files that datasets makes of local files go to the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def bpe_json() -> str:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet)
    bpe.train_from_iterator(LINES * 3, trainer)
    return bpe.to_str()


NAMES = {"pad_token": "<pad>", "eos_token": "</s>"}


@pytest.fixture
def tokenizer(bpe_json):
    """Like BLOOM's: byte-level BPE that adds no special tokens."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe_json), **NAMES)


@pytest.fixture
def bos_tokenizer(bpe_json):
    """Like OPT's: one BOS in front of every text."""
    bpe = Tokenizer.from_str(bpe_json)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", **NAMES)


@pytest.fixture
def t5_tokenizer(bpe_json):
    """Like T5's: EOS behind every text."""
    bpe = Tokenizer.from_str(bpe_json)
    bpe.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **NAMES)


class ChatGLMTokenizer(PreTrainedTokenizerFast):
    """Joins as ChatGLM3's tokenizer does: ``[gMASK] sop question answer eos``."""

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        ids = [self.convert_tokens_to_ids("[gMASK]"), self.convert_tokens_to_ids("sop")] + token_ids_0
        return ids if token_ids_1 is None else ids + token_ids_1 + [self.eos_token_id]


@pytest.fixture
def chatglm_tokenizer(bpe_json):
    bpe = Tokenizer.from_str(bpe_json)
    bpe.post_processor = processors.TemplateProcessing(single="[gMASK] sop $A", special_tokens=[("[gMASK]", 3), ("sop", 4)])
    return ChatGLMTokenizer(tokenizer_object=bpe, **NAMES)

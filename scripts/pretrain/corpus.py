"""From packages to token files: documents, held-out split, tokenizer, packed training stream.

Work folder: `packages/` (unpacked), `corpus.jsonl` (one document a line: package, lang, text, split), `tokenizer/`,
`train.bin` (uint16 tokens, documents shuffled and separated by `</s>`), `heldout-en.bin`, `heldout-zh.bin`,
`stats.json` (documents, characters and tokens by package).
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .extract import READERS, clean_paragraphs
from .sources import SOURCES, Source, fetch

VOCAB_SIZE = 16384
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")  # BLOOM's, at BLOOM's ids 0..3
EOS = 2
# letters with their leading blank, single digits, runs of punctuation, white space
PRE_TOKENS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
HELD_OUT_PERCENT = 1
MIN_CHARACTERS = {"en": 60, "zh": 16}


def documents(source: Source, root: Path, seen: set[int]) -> Iterator[tuple[str, str]]:
    """`(language, text)` of one package: runs of kept paragraphs, none seen before."""
    paths = sorted({path for pattern in source.globs for path in root.glob(pattern) if path.is_file()})
    for path in paths:
        for raw in READERS[source.reader](path):
            runs: dict[str, list[str]] = defaultdict(list)
            for lang, paragraph in clean_paragraphs(raw):
                key = hash(re.sub(r"\W+|\d+", "", paragraph.lower()))
                if key not in seen:
                    seen.add(key)
                    runs[lang].append(paragraph)
            for lang, paragraphs in runs.items():
                text = "\n".join(paragraphs)
                if len(text) >= MIN_CHARACTERS[lang]:
                    yield lang, text


def build_corpus(work: Path) -> None:
    """Fetch and read every package; writes `corpus.jsonl`."""
    seen: set[int] = set()
    with (work / "corpus.jsonl").open("w", encoding="utf-8") as out:
        for source in SOURCES:
            sizes: Counter[str] = Counter()
            for lang, text in documents(source, fetch(source.package, work), seen):
                digest = int(hashlib.sha1(text.encode()).hexdigest(), 16)
                split = "heldout" if digest % 100 < HELD_OUT_PERCENT else "train"
                row = {"package": source.package, "lang": lang, "split": split, "text": text}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                sizes[lang] += len(text)
            print(f"{source.package:28s} {dict(sizes)}", flush=True)


def _rows(work: Path) -> Iterator[dict[str, str]]:
    with (work / "corpus.jsonl").open(encoding="utf-8") as handle:
        yield from map(json.loads, handle)


def _copies(rng: random.Random, weight: float) -> int:
    """How often a document enters one pass: the weight, its fraction by lot."""
    return int(weight) + (rng.random() < weight % 1)


def train_tokenizer(work: Path) -> None:
    """Byte-level BPE over the weighted training text; writes `tokenizer/`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(1)
    weights = {source.package: source.weight for source in SOURCES}
    texts = [
        row["text"] for row in _rows(work) if row["split"] == "train"
        for _ in range(min(1, _copies(rng, weights[row["package"]])))
    ]  # fmt: skip
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=32,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(work / "tokenizer")


def pack(work: Path, passes: int = 3) -> None:
    """Tokenise; writes the training stream (`passes` weighted, newly shuffled passes), held-out files and counts."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    weights = {source.package: source.weight for source in SOURCES}
    rows = list(_rows(work))
    encodings = tokenizer.encode_batch([row["text"] for row in rows], add_special_tokens=False)
    tokens = [np.array([*encoding.ids, EOS], dtype=np.uint16) for encoding in encodings]
    stats: dict[str, dict[str, int]] = defaultdict(lambda: {"documents": 0, "en": 0, "zh": 0})
    for row, ids in zip(rows, tokens, strict=True):
        stats[row["package"]]["documents"] += 1
        stats[row["package"]][row["lang"]] += len(ids)
    for lang in ("en", "zh"):
        held = [ids for row, ids in zip(rows, tokens, strict=True) if (row["split"], row["lang"]) == ("heldout", lang)]
        np.concatenate(held).tofile(work / f"heldout-{lang}.bin")
    rng, stream, mix = random.Random(2), [], Counter()
    for _ in range(passes):
        order = [
            index for index, row in enumerate(rows) if row["split"] == "train"
            for _ in range(_copies(rng, weights[row["package"]]))
        ]  # fmt: skip
        rng.shuffle(order)
        stream += [tokens[index] for index in order]
        for index in order:
            mix[rows[index]["lang"]] += len(tokens[index])
    np.concatenate(stream).tofile(work / "train.bin")
    summary = {"passes": passes, "mix_tokens": dict(mix), "packages": stats}
    (work / "stats.json").write_text(json.dumps(summary, indent=1))
    print(f"training stream: {dict(mix)} tokens in {passes} passes", flush=True)

"""GGUF files as base models: read through transformers, dequantised, and kept in the user's cache.

```text
<cache>/bases/<key>/<name>/     config.json, model.safetensors, tokenizer and chat template, graftlm_base.json
```

The cache is `platformdirs.user_cache_path("graftlm")`, or what GRAFTLM_CACHE names. The key comes from the file's
content, the version of transformers and `FORMAT`, so that neither another file under the same path nor other code finds
an entry that is not its own. An entry is filled in a directory beside it, under a lock, and renamed into place when it
is whole; one that lacks a file, or has one of another size, is filled again.

Weights are kept in bf16; where all matrices of the file are F32 or F16, in fp32, so that nothing is lost.

What transformers' reading leaves out is mended here or refused: the rule by which a tokenizer splits digits
(`tokenizer.ggml.pre`), the context length of the tokenizer, all tokens that end an answer, scaled positions.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import BaseModelError

SUFFIX = ".gguf"
MAGIC = b"GGUF"
FORMAT = 1  # of an entry: raise it when what is written changes
MANIFEST = "graftlm_base.json"
SCRATCH = ".filling-"
CACHE_VARIABLE = "GRAFTLM_CACHE"

# How llama.cpp's tokenizers cut a text before merging, by `tokenizer.ggml.pre` (llama-vocab.cpp), beyond those that
# transformers knows: GPT-2's rule with every digit by itself, and GPT-2's rule, which is transformers' own default.
SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
GPT2_RULE = frozenset({"gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais"})
BLOOM_SPLIT = r" ?[^(\s|.,!?…。，、।۔،)]+"
UNNAMED = (None, "default")  # of older files
END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")

asked_by: dict[str, str] = {}  # name or file by which this process asked last for an entry: copies of a file share theirs


def cache_directory() -> Path:
    """Where unpacked bases are kept."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given).expanduser().absolute()
    import platformdirs

    return platformdirs.user_cache_path("graftlm")


def unpacked(path: str | os.PathLike, name: str | None = None) -> str:
    """Directory of the dequantised model of a GGUF file, with its tokenizer; filled when it is first asked for.

    Args:
        path: the file.
        name: what the base is called; the path itself where there is none.

    Raises:
        BaseModelError: no such file, no GGUF file, one that cannot be read, or a cache that cannot be written.
    """
    file = checked(path)
    folder = cache_directory() / "bases" / key_of(file) / (name or file.stem)
    asked_by[str(folder)] = name or str(file)
    if is_whole(folder):
        return str(folder)
    if find_spec("gguf") is None:
        raise BaseModelError(f"reading {path} needs the package gguf: pip install gguf")
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder.parent}.lock"):
            if not is_whole(folder):
                fill(folder, file, name or str(file))
    except OSError as error:
        raise BaseModelError(
            f"the unpacked base of {path} cannot be kept in {folder} ({error}). Make room or name another place by the "
            f"environment variable {CACHE_VARIABLE}."
        ) from error
    return str(folder)


def checked(path: str | os.PathLike) -> Path:
    """The file, absolute; BaseModelError where it is none, or of another kind."""
    file = Path(path).expanduser().absolute()
    if not file.is_file():
        raise BaseModelError(f"there is no file {str(path)!r} (working directory {os.getcwd()!r})")
    try:
        with open(file, "rb") as opened:
            start = opened.read(len(MAGIC))
    except OSError as error:
        raise BaseModelError(f"{path} cannot be read ({error})") from error
    if start != MAGIC:
        raise BaseModelError(
            f"{path} is no GGUF file: it starts with {start!r}, expected {MAGIC!r}. It may be a link to a file."
        )
    return file


def key_of(file: Path) -> str:
    """What an entry of the cache depends on."""
    import transformers

    status = file.stat()
    content = digest(str(file), status.st_size, status.st_mtime_ns)
    return hashlib.sha256(f"{FORMAT} {transformers.__version__} {content}".encode()).hexdigest()[:20]


@functools.lru_cache(maxsize=16)
def digest(path: str, size: int, changed: int) -> str:
    """SHA-256 of a file; computed again in one process where size or time of change differ."""
    found = hashlib.sha256()
    with open(path, "rb") as opened:
        while block := opened.read(1 << 22):
            found.update(block)
    return found.hexdigest()


def manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """What an entry says about itself; {} for a directory that is none."""
    try:
        found = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_whole(folder: Path) -> bool:
    """Whether an entry has all its files in their sizes; others beside them change nothing."""
    wanted = manifest(folder).get("files")
    return isinstance(wanted, dict) and bool(wanted) and wanted.items() <= sizes(folder).items()


def sizes(folder: Path) -> dict[str, int]:
    """Files of an entry, but for the manifest, with their sizes."""
    return {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file() and p.name != MANIFEST}


def source_of(folder: str | os.PathLike) -> str | None:
    """The name or the GGUF file that an entry of the cache was made of; None for any other directory."""
    found = asked_by.get(os.fspath(folder)) or manifest(folder).get("source")
    return found if isinstance(found, str) else None


def fill(folder: Path, file: Path, source: str) -> None:
    """Write an entry beside its place and rename it; what was there before is thrown away."""
    for left in folder.parent.glob(f"{SCRATCH}*"):  # by a process that was killed: this one has the lock
        shutil.rmtree(left, ignore_errors=True)
    with temporary(folder.parent) as place:
        model, tokenizer = read(file, place)
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        entry = {"format": FORMAT, "source": source, "files": sizes(place)}
        (place / MANIFEST).write_text(json.dumps(entry, indent=1), encoding="utf-8")
        if folder.exists():
            with temporary(folder.parent) as old:
                os.replace(folder, old / folder.name)
        os.replace(place, folder)


@contextmanager
def temporary(parent: Path) -> Iterator[Path]:
    """A directory that is gone afterwards, unless it was renamed."""
    place = Path(tempfile.mkdtemp(dir=parent, prefix=SCRATCH))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def read(file: Path, empty: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file, dequantised.

    `empty` is a directory without files: transformers would take what lies beside a GGUF file for a part of the model.

    Raises:
        BaseModelError: broken, of an architecture that transformers does not read, or read only in part.
    """
    import transformers as t

    try:
        about = describe(file)
        refuse_scaled_positions(about, file)
        given = {"gguf_file": str(file.absolute())}  # a relative one would be looked for in `empty`
        config = t.AutoConfig.from_pretrained(empty, **given)
        if config.model_type == "gpt2" and about["context"]:  # transformers leaves it at 1024
            config.n_positions = about["context"]
        auto = t.AutoModelForSeq2SeqLM if config.is_encoder_decoder else t.AutoModelForCausalLM
        if hasattr(t, "GgufConfig"):
            given = given | {"quantization_config": t.GgufConfig(dequantize=True)}
        options = {"config": config, "dtype": about["dtype"], "output_loading_info": True}
        model, report = auto.from_pretrained(empty, **given, **options)
        tokenizer = t.AutoTokenizer.from_pretrained(empty, gguf_file=str(file.absolute()))
    except BaseModelError:
        raise
    except ImportError as error:
        raise BaseModelError(
            f"{file} cannot be read with the installed transformers {t.__version__} ({error}): pip install -U transformers "
            "gguf"
        ) from error
    except Exception as error:  # a broken file fails anywhere in the readers, with errors of any type
        text = (str(error).strip().splitlines() or [""])[0]
        raise BaseModelError(
            f"{file} cannot be read as a base model ({type(error).__name__}: {text}). The file is broken, or of a kind that "
            "this version of transformers does not read: take another file, or the safetensors form of the model."
        ) from error
    absent = sorted(report["missing_keys"]) + [str(m) for m in report["mismatched_keys"]]
    if absent:
        raise BaseModelError(
            f"{file} lacks {len(absent)} of the model's weights, or has them in other shapes: {', '.join(absent[:3])}, …. "
            "It is a part of a model, or of a kind that this version of transformers does not read in full."
        )
    forget_file(model)
    mend_tokenizer(tokenizer, about, model.config, file)
    ends = [about[k] for k in END_TOKENS if about[k] is not None]
    if len(set(ends)) > 1:
        model.generation_config.eos_token_id = list(dict.fromkeys(ends))
        model.generation_config._from_model_config = False
    return model, tokenizer


def describe(file: Path) -> dict[str, Any]:
    """What is asked of a file's metadata here, and the dtype its weights are kept in."""
    import torch
    from gguf import GGMLQuantizationType as Kind
    from transformers.integrations.gguf import GgufHeader, read_gguf_metadata

    values, _ = read_gguf_metadata(str(file))
    tensors = GgufHeader.from_file(str(file)).tensors
    about = {key: values.get(f"tokenizer.ggml.{key}") for key in ("model", "pre", *END_TOKENS)}
    about["architecture"] = values["general.architecture"]
    about["context"] = values.get(f"{about['architecture']}.context_length")
    about["scaling"] = values.get(f"{about['architecture']}.rope.scaling.type")
    about["scaled"] = [t.name for t in tensors if t.name.startswith(("rope_freqs", "rope_factors"))]
    plain = {t.ggml_type for t in tensors if len(t.shape) > 1} <= {Kind.F32, Kind.F16}
    about["dtype"] = torch.float32 if plain else torch.bfloat16
    return about


def refuse_scaled_positions(about: dict[str, Any], file: Path) -> None:
    """BaseModelError for scaled rotary embeddings, which transformers leaves out of all families but GPT-OSS."""
    scaling = about["scaling"] if about["scaling"] != "none" and about["architecture"] != "gpt-oss" else None
    if scaling or about["scaled"]:
        raise BaseModelError(
            f"{file} scales its positions ({scaling or ', '.join(about['scaled'])}), which this version of transformers "
            "does not read from GGUF files: the model would write other text. Take the safetensors form of the model."
        )


def forget_file(model: Any) -> None:
    """Make a dequantised model a plain one, that can be saved."""
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = False


def mend_tokenizer(tokenizer: Any, about: dict[str, Any], config: Any, file: Path) -> None:
    """Give a tokenizer its context length and its rule for splitting texts. A file that names no rule gets GPT-2's.

    Raises:
        BaseModelError: a rule that neither transformers nor this file knows.
    """
    longest = getattr(config, "max_position_embeddings", None)
    if longest:
        tokenizer.model_max_length = longest
    rule = about["pre"]
    if about["model"] != "gpt2" or rule in GPT2_RULE or knows_rule(rule):
        return
    if rule in UNNAMED:
        if about["architecture"] != "gpt2":
            warnings.warn(f"{file} does not name its rule for splitting texts; GPT-2's is used, which may not be its own.")
        return
    splits = splitting(rule)
    if splits is None:
        raise BaseModelError(
            f"{file} splits texts by the rule {rule!r}, which is not known here: its tokens would not be the model's. Take "
            "the safetensors form of the model, whose tokenizer holds the rule itself."
        )
    tokenizer.backend_tokenizer.pre_tokenizer = splits


def splitting(rule: str) -> Any:
    """llama.cpp's rule for splitting texts as a part of a tokenizer; None for one that is not known here."""
    from tokenizers import Regex, pre_tokenizers

    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if rule in GPT2_RULE:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if rule in SINGLE_DIGITS:
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        return pre_tokenizers.Sequence(parts)
    expression = BLOOM_SPLIT if rule == "bloom" else known_splits().get(rule)
    if expression is None:
        return None
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), behavior="isolated"), by_bytes])


def known_splits() -> dict[str, str]:
    """The rules that transformers applies itself: their names and regular expressions."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return {}
    return GGUF_PRE_TOKENIZER_SPLITS


def knows_rule(rule: str | None) -> bool:
    """Whether transformers applies a rule for splitting texts itself."""
    return rule in known_splits()

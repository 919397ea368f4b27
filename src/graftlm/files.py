"""Reading files: texts and JSON of any kind, an adapter's files (local directory or hub) with the header of its weights
file, and single weights of a base."""

from __future__ import annotations

import codecs
import json
import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import CheckpointError, GraftError, UnsupportedError

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
HEADER_KEY = "graftlm"
# What `huggingface_hub.hf_hub_download` takes, beside the file's name; and its older names of the token.
HUB_KEYS = (
    "cache_dir", "token", "subfolder", "local_files_only", "force_download", "revision", "repo_type", "local_dir",
    "library_name", "library_version", "user_agent", "etag_timeout", "headers", "endpoint",
)  # fmt: skip
OLD_TOKEN = "use_auth_token"


def hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take out of keyword arguments those that select a hub file."""
    hub = {k: kwargs.pop(k) for k in HUB_KEYS if k in kwargs}
    old = kwargs.pop(OLD_TOKEN, None)
    return hub if old is None else {"token": old} | hub


BYTE_ORDER_MARKS = (  # UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip


def read_text(path: str | os.PathLike, error: type[GraftError]) -> str:
    """A text file: UTF-8, or the UTF-16 or UTF-32 that its byte-order mark tells; the mark is no part of the text.

    Raises:
        OSError: no such file.
        error: bytes that are not text in that encoding.
    """
    return decode(Path(path).read_bytes(), str(path), error)


def decode(data: bytes, where: str, error: type[GraftError]) -> str:
    """The text in `data`, as `read_text`; line ends stay as they are."""
    mark, encoding = next(((m, e) for m, e in BYTE_ORDER_MARKS if data.startswith(m)), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as problem:
        place = len(mark) + problem.start
        line = data[len(mark) : place].decode(encoding, "replace").count("\n") + 1
        raise error(
            f"{where}, line {line}: byte {place} (0x{data[place]:02x}) is not {encoding.upper()} text. Save "
            f"the file as UTF-8, in an editor or by `iconv -f LATIN1 -t UTF-8` (LATIN1 stands for the encoding that it has)."
        ) from problem
    if "\0" in text:
        raise error(f"{where} holds zero bytes: UTF-16 without a byte-order mark, or no text. Save the file as UTF-8.")
    return text


def lines_of(text: str) -> list[str]:
    """The lines of a text, whatever system wrote it. Unlike `str.splitlines`, U+2028 and its like do not end a line."""
    return re.split(r"\r\n|\n|\r", text)


def parse_json(text: str, where: str, error: type[GraftError], **hooks: Any) -> Any:
    """A JSON text. `hooks` are those of `json.loads`.

    Raises:
        error: no valid JSON, or a key twice in one object (which of the values is meant is not known).
    """
    try:
        return json.loads(text, object_pairs_hook=once, **hooks)
    except ValueError as problem:
        raise error(f"{where} is not valid JSON: {problem}") from problem
    except RepeatedKey as repeated:
        key = repeated.args[0]
        written = re.compile(re.escape(json.dumps(key, ensure_ascii=False)) + r"\s*:")
        found = [str(i) for i, line in enumerate(lines_of(text), 1) if written.search(line)]
        places = f" (it stands in lines {', '.join(found)})" if len(found) > 1 else ""
        raise error(f"{where}: the key {key!r} is given twice in one object{places}; keep one of them.") from None


class RepeatedKey(Exception):
    """A key twice in one JSON object."""


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. RepeatedKey: a key that it has twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKey(next(key for i, key in enumerate(keys) if key in keys[:i]))
    return made


def find_file(source: str | os.PathLike, name: str, required: bool = True, **hub: Any) -> Any:
    """Path of the file `name` of an adapter.

    `source` is a directory, or the id of a hub repository (`owner/name`), which is downloaded unless a directory of
    that name exists. With `required=False` a missing file gives None.

    Raises:
        CheckpointError: the directory or the file does not exist, or the hub cannot be reached.
    """
    folder = Path(source) / hub.get("subfolder", "") if hub.get("subfolder") else Path(source)
    if folder.is_dir():
        path = folder / name
        if path.is_file():
            return path
        if not required:
            return None
        here = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
        inside = [p.parent.name for p in sorted(folder.glob(f"*/{name}"))]
        if inside:
            raise CheckpointError(
                f"{folder} holds no {name} itself, but its folders {', '.join(inside)} do (adapters saved by their names). "
                f"Pass {folder / inside[0]}, or subfolder={inside[0]!r}."
            )
        raise CheckpointError(f"{folder} holds no {name}. It holds {here}. Pass the folder that `save_pretrained` wrote.")
    text = str(source)
    if folder.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")) or "\\" in text:
        raise CheckpointError(f"{text!r} is not a directory. Pass the folder that `save_pretrained` wrote, or a hub id.")
    return download(text, name, required, {k: v for k, v in hub.items() if v is not None})


def download(repo: str, name: str, required: bool, hub: dict[str, Any]) -> Path | None:
    """One file of a hub repository."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, name, **hub))
    except LocalEntryNotFoundError as error:
        problem: Exception = error
    except EntryNotFoundError as error:
        if not required:
            return None
        problem = error
    except Exception as error:  # whatever the network layer raises; reported whole below
        problem = error
    raise CheckpointError(
        f"{repo!r} is no directory here, and {name} could not be had from the hub ({type(problem).__name__}: {problem}). "
        "Check the path; without a network, pass a local directory."
    ) from problem


def read_header(source: str | os.PathLike, **hub: Any) -> dict[str, Any]:
    """What GraftLM wrote into the header of the weights file: version, base fingerprint, own config fields. {} if none."""
    path = find_file(source, WEIGHTS_NAME, required=False, **hub)
    return header_of(path) if path else {}


def header_of(path: Path) -> dict[str, Any]:
    """The same for a known weights file."""
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER_KEY)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}); it may be cut off. Save or download the adapter again."
        ) from error
    return parse_json(text, f"the header of {path}", CheckpointError) if text else {}


def checkpoint_weight(base: Any, key: str, shape: tuple[int, ...]) -> Any:
    """A tensor of the checkpoint that a base was loaded from, read alone: `key` with or without the model's own prefix.

    Raises:
        UnsupportedError: no such checkpoint or tensor, or one of another shape (a quantised checkpoint).
    """
    source = str(getattr(base, "name_or_path", "") or "")
    prefix = getattr(base, "base_model_prefix", "")
    names = [key, f"{prefix}.{key}", key.removeprefix(f"{prefix}.")]
    for path in weight_files(source):
        with safe_open(path, framework="pt") as file:
            name = next((n for n in names if n in file.keys()), None)  # noqa: SIM118  (no mapping)
            if name is None:
                continue
            found = tuple(file.get_slice(name).get_shape())
            if found != shape:
                raise UnsupportedError(
                    f"LoftQ needs the unquantised weight of {key!r} {list(shape)}, but {path} holds {list(found)}: a "
                    "quantised checkpoint. Load the base from the unquantised one and quantise it while loading."
                )
            return file.get_tensor(name)
    raise UnsupportedError(
        f"LoftQ needs the unquantised weight of {key!r}, which is not in safetensors files of {source or 'the base'!r}. "
        "Load the base from a directory (or cached id) that holds model.safetensors."
    )


def weight_files(source: str) -> list[Path]:
    """The safetensors files of a model's directory, or of a hub id in the cache."""
    folder = Path(source)
    if source and not folder.is_dir():
        from transformers.utils import cached_file

        for name in ("model.safetensors", "model.safetensors.index.json"):
            found = cached_file(source, name, local_files_only=True, _raise_exceptions_for_missing_entries=False,
                                _raise_exceptions_for_connection_errors=False)  # fmt: skip
            folder = Path(found).parent if found else folder
    return sorted(folder.glob("*.safetensors")) if source and folder.is_dir() else []

"""Where data comes from: bundled, local files and folders, folders of ``save_to_disk``, the Hugging Face Hub.

Only a Hub id (``owner/name`` that is no local path) touches the network. Nothing here runs code that comes
with data.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from graftlm.data.bundled import BUNDLED, load_bundled
from graftlm.data.tables import ENDINGS as TEXT_ENDINGS
from graftlm.data.tables import read_tables
from graftlm.errors import DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_ENDINGS = (*TEXT_ENDINGS, ".parquet")
_PACKED = (".gz", ".zip", ".xz", ".bz2", ".zst", ".tar", ".tgz")
_SPLIT_WORDS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_BUNDLED_LIKE = {
    "ought/raft": "tweets",
    "fka/awesome-chatgpt-prompts": "prompts",
    "Abirate/english_quotes": "quotes",
    "HasturOfficial/adgen": "adgen-zh",
}
_SOURCES = (
    "a bundled data set, a file (.json, .jsonl, .csv, .tsv, .parquet), a directory of such files or of "
    "save_to_disk, or a Hub id 'owner/name'"
)


@overload
def load_data(source: str | Path, *, split: None = None, name: str | None = None) -> DatasetDict: ...
@overload
def load_data(source: str | Path, *, split: str, name: str | None = None) -> Dataset: ...
def load_data(source: str | Path, *, split: str | None = None, name: str | None = None) -> DatasetDict | Dataset:
    """Loads a data set: a DatasetDict of all splits, or with ``split`` that one as a Dataset.

    Args:
        source: a bundled name (``tweets``, ``prompts``, ``quotes``, ``alpaca-zh``, ``adgen-zh``); a local
            .json, .jsonl, .csv, .tsv or .parquet file (one split, ``train``; texts stay as the file writes
            them, see `tables`); a directory with such files,
            split by their names (``train…``, ``test…``, ``validation…``); a folder made by
            ``save_to_disk``; or a Hub id.
        split: a split or a part of one, ``test``, ``train[:50]``, ``train[10%:20%]``, ``train+test``.
        name: the configuration of a Hub data set that has several.

    Raises:
        DataError: unknown name, missing file or split, no rows, unreadable file, a data set that is a
            script.
    """
    text, path = str(source), Path(source)
    is_hub = text not in BUNDLED and not path.exists() and _is_hub_id(text)
    if name is not None and not is_hub:
        raise DataError(f"name={name!r} chooses a configuration on the Hub; {text!r} is bundled or local and has none")
    if is_hub:
        data = _load_hub(text, name)
    elif text in BUNDLED:
        data = load_bundled(text)
    elif path.is_dir():
        data = _load_directory(path)
    elif path.is_file():
        data = _load_files({"train": [path]})
    else:
        raise DataError(_unknown(text))
    empty = [name for name, part in data.items() if len(part) == 0]
    if empty or not data:
        raise DataError(f"{text!r} has no rows{' in ' + ', '.join(empty) if empty else ''}; expected at least one")
    return data if split is None else _take(data, split, text)


def _is_hub_id(text: str) -> bool:
    return bool(_HUB_ID.fullmatch(text)) and Path(text).suffix.lower() not in (*_ENDINGS, ".py")


def _unknown(text: str) -> str:
    if Path(text).suffix.lower() in (*_ENDINGS, ".py") or "/" in text:
        return f"no such file or directory: {text!r} (working directory {str(Path.cwd())!r})"
    names = ", ".join(BUNDLED)
    return f"unknown data set {text!r}; expected {_SOURCES}. Bundled: {names}{nearest(text, BUNDLED)}"


def _load_files(splits: dict[str, list[Path]]) -> DatasetDict:
    """Reads the files of each split, which are of one kind, as one data set."""
    for paths in splits.values():
        _check_files(paths)
    texts = {name: paths for name, paths in splits.items() if paths[0].suffix.lower() in TEXT_ENDINGS}
    found = dict(read_tables(texts)) if texts else {}
    return _as_dict({name: found[name] if name in found else _load_parquet(splits[name]) for name in splits})


def _check_files(paths: list[Path]) -> None:
    suffixes = {path.suffix.lower() for path in paths}
    if len(suffixes) > 1:
        raise DataError(f"files of one split must be of one kind, got {', '.join(p.name for p in paths)}")
    suffix = suffixes.pop()
    if suffix == ".py":
        raise DataError(_script(str(paths[0])))
    if suffix in _PACKED:
        raise DataError(f"{str(paths[0])!r} is compressed: unpack it first; expected {', '.join(_ENDINGS)}")
    if suffix not in _ENDINGS:
        raise DataError(f"cannot read {str(paths[0])!r}: the ending {suffix!r} is none of {', '.join(_ENDINGS)}")
    for path in paths:
        if path.stat().st_size == 0:
            raise DataError(f"{str(path)!r} is empty; expected at least one row")


def _load_parquet(paths: list[Path]) -> Dataset:
    from datasets import load_dataset

    files = [str(path.resolve()) for path in paths]
    return _reading(", ".join(files), lambda: load_dataset("parquet", data_files={"train": files}, split="train"))


def _load_directory(path: Path) -> DatasetDict:
    from datasets import load_from_disk

    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        found = _reading(str(path), lambda: load_from_disk(str(path)))
        return _as_dict(found if isinstance(found, dict) else {"train": found})
    files = sorted(f for f in path.iterdir() if f.is_file() and f.suffix.lower() in _ENDINGS)
    if not files:
        if any(path.glob("*.py")):
            raise DataError(_script(str(path)))
        have = ", ".join(sorted(f.name for f in path.iterdir())[:8]) or "nothing"
        raise DataError(f"no data in the directory {str(path)!r}; it holds {have}, expected files of {_SOURCES}")
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file), []).append(file)
    if splits.keys() == {""}:
        splits = {"train": splits[""]}
    if "" in splits:
        names = ", ".join(f.name for f in splits[""])
        raise DataError(
            f"the split of {names} in {str(path)!r} cannot be told; begin each name with train, test "
            "or validation, or load that file alone"
        )
    order = [name for name in ("train", "validation", "test") if name in splits]
    return _load_files({name: splits[name] for name in order})


def _split_of(file: Path) -> str:
    words = re.split(r"[^a-z]+", file.stem.lower())
    found = {_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS}
    return found.pop() if len(found) == 1 else ""


def _load_hub(source: str, name: str | None) -> DatasetDict:
    from datasets import load_dataset

    try:
        return _as_dict(load_dataset(source, name))
    except Exception as error:  # many kinds: not found, no network, bad configuration, scripts
        if "dataset scripts" in str(error).lower():
            raise DataError(_script(source)) from error
        like = _BUNDLED_LIKE.get(source)
        raise DataError(
            f"cannot load {source!r}{f' ({name})' if name else ''} from the Hub: "
            f"{type(error).__name__}: {error}\n"
            "Check the id, the network and HF_TOKEN, or give a local path."
            + (f" The bundled data set {like!r} has the same columns and needs no network." if like else "")
        ) from error


def _script(source: str) -> str:
    like = _BUNDLED_LIKE.get(source) or ("tweets" if "raft" in source.lower() else None)
    return (
        f"{source!r} is a data set made by a Python script; datasets 4 and later run none. Convert it once "
        "to parquet (or json, csv) and load that file"
        + (f", or use the bundled data set {like!r}, which has the same columns" if like else "")
        + "."
    )


def _reading(what: str, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:
        cause = error.__cause__ or error
        raise DataError(f"cannot read {what}: {type(cause).__name__}: {cause}") from error


def _as_dict(parts: Any) -> DatasetDict:
    from datasets import DatasetDict

    return DatasetDict(dict(parts))


def _take(data: DatasetDict, split: str, source: str) -> Dataset:
    """The split or slice ``split``, in the notation of datasets."""
    if split in data:
        return data[split]
    from datasets import ReadInstruction, concatenate_datasets

    lengths = {name: len(part) for name, part in data.items()}
    try:
        parts = ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError, KeyError) as error:
        have = ", ".join(f"{name} ({length} rows)" for name, length in lengths.items())
        raise DataError(
            f"{source!r} has no split {split!r}; it has {have}{nearest(split, lengths)} "
            "Parts are written 'train[:50]' or 'train[10%:20%]'"
        ) from error
    taken = concatenate_datasets([data[p.splitname].select(range(p.from_, p.to)) for p in parts])
    if len(taken) == 0:
        raise DataError(f"split {split!r} of {source!r} has no rows; the splits have {lengths}")
    return taken

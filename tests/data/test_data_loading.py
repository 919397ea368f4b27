"""load_data: every kind of source, and what it says when there is nothing to load."""

import csv
import json

import datasets
import pytest

from graftlm.data import load_data
from graftlm.errors import DataError

ROWS = [{"text": f"row {i}, NA", "label": i % 2} for i in range(10)]


def write(path, rows=ROWS):
    """The rows in the kind of file that the name asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        sep = "\t" if path.suffix == ".tsv" else ","
        lines = ["text" + sep + "label"] + [f'"{row["text"]}"{sep}{row["label"]}' for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_local_files(tmp_path, suffix):
    path = write(tmp_path / f"mine.{suffix}")
    data = load_data(path)
    assert isinstance(data, datasets.DatasetDict) and list(data) == ["train"]
    assert list(data["train"]) == ROWS
    part = load_data(str(path), split="train[2:5]")
    assert isinstance(part, datasets.Dataset) and part["text"][:] == [row["text"] for row in ROWS[2:5]]


def test_the_text_NA_stays_a_text(tmp_path):
    path = write(tmp_path / "a.csv", [{"text": "NA", "label": 0}, {"text": "None", "label": 1}])
    assert load_data(path, split="train")["text"][:] == ["NA", "None"]


def test_a_directory_is_split_by_file_names(tmp_path):
    write(tmp_path / "d/train-00000-of-00002.jsonl", ROWS[:4])
    write(tmp_path / "d/train-00001-of-00002.jsonl", ROWS[4:6])
    write(tmp_path / "d/dev.csv", ROWS[6:8])
    write(tmp_path / "d/my_test.parquet", ROWS[8:])
    data = load_data(tmp_path / "d")
    assert {name: len(part) for name, part in data.items()} == {"train": 6, "validation": 2, "test": 2}
    assert list(data["train"]) == ROWS[:6]


def test_a_directory_of_unnamed_splits_is_all_train(tmp_path):
    write(tmp_path / "d/a.jsonl", ROWS[:5])
    write(tmp_path / "d/b.jsonl", ROWS[5:])
    assert len(load_data(tmp_path / "d", split="train")) == 10
    write(tmp_path / "d/test.jsonl", ROWS[:1])
    with pytest.raises(DataError, match=r"split of a\.jsonl, b\.jsonl .* cannot be told"):
        load_data(tmp_path / "d")


def test_save_to_disk_folders(tmp_path):
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": one.select([0])}).save_to_disk(str(tmp_path / "two"))
    assert list(load_data(tmp_path / "one", split="train")) == ROWS
    assert {k: len(v) for k, v in load_data(tmp_path / "two").items()} == {"train": 10, "test": 1}


def test_splits_and_their_parts():
    assert len(load_data("tweets", split="test")) == 200
    assert len(load_data("tweets", split="train[:10%]+test[:3]")) == 8
    with pytest.raises(DataError, match=r"no split 'tets'; it has train \(50 rows\), test.*did you mean 'test'"):
        load_data("tweets", split="tets")
    with pytest.raises(DataError, match="has no rows"):
        load_data("tweets", split="train[3:3]")


def test_unknown_names_get_the_nearest():
    with pytest.raises(DataError, match=r"unknown data set 'tweet'; expected .* did you mean 'tweets'"):
        load_data("tweet")


@pytest.mark.parametrize("source", ["nothing.jsonl", "data/nothing.csv", "./nothing/here", "/no/such/folder"])
def test_missing_files_do_not_go_to_the_hub(source, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(DataError, match="no such file"):
        load_data(source)


def test_empty_and_unreadable_files(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="is empty; expected at least one row"):
        load_data(tmp_path / "empty.jsonl")
    (tmp_path / "header.csv").write_text("text,label\n")
    with pytest.raises(DataError, match="no rows|cannot read"):
        load_data(tmp_path / "header.csv")
    (tmp_path / "broken.json").write_text('[{"text": ')
    with pytest.raises(DataError, match="cannot read .*broken.json"):
        load_data(tmp_path / "broken.json")
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"ending '\.xlsx' is none of \.json"):
        load_data(tmp_path / "a.xlsx")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(DataError, match="no data in the directory.*it holds nothing"):
        load_data(tmp_path / "hollow")


def test_scripts_are_refused(tmp_path, monkeypatch):
    (tmp_path / "raft").mkdir()
    (tmp_path / "raft" / "raft.py").write_text("raise SystemExit('ran')")
    for source in (tmp_path / "raft", tmp_path / "raft" / "raft.py"):
        with pytest.raises(DataError, match=r"made by a Python script.*parquet.*'tweets'"):
            load_data(source)

    def load_dataset(*args, **kwargs):
        raise RuntimeError("Dataset scripts are no longer supported, but found raft.py")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"'ought/raft' is a data set made by a Python script.*'tweets'"):
        load_data("ought/raft", name="twitter_complaints")


def test_hub_ids_reach_load_dataset_without_remote_code(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_data("someone/something", split="train[:3]", name="config")) == 3
    assert calls == [(("someone/something", "config"), {})]


def test_hub_failures_say_what_to_do(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"(?s)from the Hub.*'quotes' has the same columns"):
        load_data("Abirate/english_quotes")


def test_a_configuration_is_for_the_hub_only():
    with pytest.raises(DataError, match="name='x' chooses a configuration on the Hub"):
        load_data("tweets", name="x")


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_texts_stay_as_the_file_writes_them(tmp_path, suffix):
    texts = [
        "02108",
        "1.50",
        "1e5",
        "True",
        "null",
        "",
        "nan",
        "2024-01-02",
        "-0",
        "1_000",
        " x ",
        'say "hi", all',
        "two\nlines",
    ]
    sep = "\t" if suffix == "tsv" else ","
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    path = tmp_path / f"a.{suffix}"
    for text, value in zip(texts, quoted, strict=True):  # alone: nothing beside it makes the column text
        path.write_text(f"prompt{sep}completion\nq{sep}{value}\n", encoding="utf-8")
        assert [str(x) for x in load_data(path, split="train")["completion"]] == [text]
    path.write_text("\n".join([f"prompt{sep}completion", *(f"q{sep}{value}" for value in quoted)]), encoding="utf-8")
    assert load_data(path, split="train")["completion"][:] == texts


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (["1", "-20"], [1, -20]),
        (["0.5", "2.25"], [0.5, 2.25]),
        (["1", "2.5"], ["1", "2.5"]),
        (["1.50", "2.5"], ["1.50", "2.5"]),
        (["1", "null"], [1, None]),
        (["1", '"x"'], ["1", "x"]),
        (["true", "false"], [True, False]),
        (["true", '"x"'], ["true", "x"]),
        (['"2024-01-02"', '"2024-01-03"'], ["2024-01-02", "2024-01-03"]),
        (["123456789012345678901"], ["123456789012345678901"]),
        (["NaN", "0.5"], [None, 0.5]),
        (['{"a": 1.5}', '{"a": 2.5}'], [{"a": 1.5}, {"a": 2.5}]),
        (['[{"a": "x", "b": 1}]', '[{"a": 2}]'], [[{"a": "x", "b": 1}], [{"a": 2}]]),
        (['"a\u2028b"'], ["a\u2028b"]),
    ],
)
def test_values_of_json(tmp_path, written, expected):
    lines, whole = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text("\r\n".join(f'{{"value": {value}}}' for value in written), encoding="utf-8")
    whole.write_text("[" + ",\n".join(f'{{"value": {value}}}' for value in written) + "]", encoding="utf-8")
    assert load_data(lines, split="train")["value"][:] == load_data(whole, split="train")["value"][:] == expected


def test_a_column_has_one_kind_in_all_splits(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\nBoston,2108\n")
    (tmp_path / "test.csv").write_text("text,label\nAgawam,01001\n")
    assert load_data(tmp_path, split="train+test")["label"][:] == ["2108", "01001"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_integers_beyond_64_bits_are_texts(tmp_path, suffix):
    """Nineteen digits may be more than the largest one, as may those with a minus."""
    for place, numbers in (("fit", ["9223372036854775807", "-9223372036854775807"]), ("not", ["9223372036854775808", "1"])):
        lines = ["id", *numbers] if suffix == "csv" else [f'{{"id": {n}}}' for n in numbers]
        path = tmp_path / f"{place}.{suffix}"
        path.write_text("\n".join(lines) + "\n")
        assert load_data(path, split="train")["id"][:] == ([int(n) for n in numbers] if place == "fit" else numbers)


def test_values_of_a_table_may_be_long(tmp_path):
    """Longer than Python's csv takes by itself, whose limit is as it was afterwards."""
    before, text = csv.field_size_limit(), "word " * 40_000
    (tmp_path / "a.csv").write_text(f"text,label\n{text},1\n")
    assert len(text) > before
    assert list(load_data(tmp_path / "a.csv", split="train")) == [{"text": text, "label": 1}]
    assert csv.field_size_limit() == before


def test_rows_may_lack_columns_and_files_of_a_split_may_not(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"b": "x"}\n')
    assert list(load_data(tmp_path, split="train")) == [{"a": 1, "b": None}, {"a": None, "b": "x"}]
    (tmp_path / "b.jsonl").write_text('{"c": 1}\n')
    with pytest.raises(DataError, match=r"same columns: a\.jsonl has \['a', 'b'\], b\.jsonl has \['c'\]"):
        load_data(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv"])
def test_byte_order_marks(tmp_path, encoding, suffix):
    path = write(tmp_path / f"a.{suffix}")
    path.write_text(path.read_text(encoding="utf-8"), encoding=encoding)
    assert list(load_data(path, split="train")) == ROWS


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv"])
def test_other_encodings_are_refused_with_their_place(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", [{"text": "fine", "label": 0}, {"text": "caf\u00e9", "label": 1}])
    if suffix in ("json", "jsonl"):
        path.write_text(path.read_text().replace("\\u00e9", "\u00e9"), encoding="utf-8")
    path.write_bytes(path.read_text(encoding="utf-8").encode("latin-1"))
    with pytest.raises(DataError, match=rf"a\.{suffix}.*line \d: byte \d+ \(0xe9\) is not UTF-8.*Save the file as UTF-8"):
        load_data(path)
    path.write_text("text,label\nx,1\n", encoding="utf-16-le")
    with pytest.raises(DataError, match="zero bytes: UTF-16 without a byte-order mark"):
        load_data(path)


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_other_delimiters(tmp_path, delimiter):
    path = tmp_path / "a.csv"
    path.write_text(f"prompt {delimiter} completion\na, b{delimiter}c\n")
    assert list(load_data(path, split="train")) == [{"prompt": "a, b", "completion": "c"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3,4,5\n", r"line 3: 3 values for 2 columns \(a, b\)"),
        ("a,b\n1\n", "line 2: 1 values for 2 columns"),
        ('a,b\n1,"open\n2,3\n', "line 2: unexpected end of data"),
        ('a,b\n1,"x" y\n', "line 2: .*expected after"),
        ("a,b,a\n1,2,3\n", "two columns called a"),
    ],
)
def test_crooked_tables(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', "line 2: the key 'a' is given twice"),
        ("a.json", '[{"b": {"a": 1,\n"a": 2}}]', r"the key 'a' is given twice in one object \(it stands in lines 1, 2\)"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2: expected an object of columns, got a list"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "line 2 is not valid JSON"),
    ],
)
def test_crooked_json(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / name)


def test_a_list_within_an_object_is_said(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text('{"version": 1, "data": [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]}')
    with pytest.raises(DataError, match="holds one object, whose entry 'data' is a list of 2 objects"):
        load_data(file)
    file.write_text('{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}')
    assert len(load_data(file, split="train")) == 1


def test_compressed_files_are_told(tmp_path):
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match="is compressed: unpack it first"):
        load_data(file)

"""Formats against the documents' own preprocessing, copied here as the slow reference."""

import warnings

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from graftlm.data import FORMATS, get_format, guess_format, load_data, prepare, prompts_and_targets
from graftlm.errors import DataError


def document_001(examples, classes, tokenizer, max_length=64):
    """preprocess_function of document 001: the label and a pad token after the prompt, padded on the left."""
    rows = []
    for text, label in zip(examples["Tweet text"], examples["Label"], strict=True):
        sample_input_ids = tokenizer([f"Tweet text : {text} Label : "])["input_ids"][0]
        label_input_ids = tokenizer([classes[label]])["input_ids"][0] + [tokenizer.pad_token_id]
        input_ids = sample_input_ids + label_input_ids
        labels = [-100] * len(sample_input_ids) + label_input_ids
        attention_mask = [1] * len(input_ids)
        padding = max_length - len(input_ids)
        rows.append(
            {
                "input_ids": ([tokenizer.pad_token_id] * padding + input_ids)[:max_length],
                "attention_mask": ([0] * padding + attention_mask)[:max_length],
                "labels": ([-100] * padding + labels)[:max_length],
            }
        )
    return rows


def document_003(example, tokenizer, MAX_LENGTH=256):
    instruction = tokenizer("\n".join(["Human: " + example["instruction"], example["input"]]).strip() + "\n\nAssistant: ")
    response = tokenizer(example["output"] + tokenizer.eos_token)
    input_ids = instruction["input_ids"] + response["input_ids"]
    attention_mask = instruction["attention_mask"] + response["attention_mask"]
    labels = [-100] * len(instruction["input_ids"]) + response["input_ids"]
    return {
        "input_ids": input_ids[:MAX_LENGTH],
        "attention_mask": attention_mask[:MAX_LENGTH],
        "labels": labels[:MAX_LENGTH],
    }


def document_004(example, tokenizer, max_input_length=512, max_output_length=1536, prompt_text=""):
    question = prompt_text + example["content"]
    if example.get("input", None) and example["input"].strip():
        question += f"\n{example['input']}"
    q_ids = tokenizer.encode(text=question, add_special_tokens=False)
    a_ids = tokenizer.encode(text=example["summary"], add_special_tokens=False)
    if len(q_ids) > max_input_length - 2:
        q_ids = q_ids[: max_input_length - 2]
    if len(a_ids) > max_output_length - 1:
        a_ids = a_ids[: max_output_length - 1]
    input_ids = tokenizer.build_inputs_with_special_tokens(q_ids, a_ids)
    question_length = len(q_ids) + 2
    return {"input_ids": input_ids, "labels": [-100] * question_length + input_ids[question_length:]}


def test_label_is_document_001(tokenizer):
    data = load_data("tweets")
    classes = [k.replace("_", " ") for k in data["train"].features["Label"].names]
    for max_length in (128, 64):  # nothing cut; the answer of the longer ones cut off
        expected = document_001(data["train"][:], classes, tokenizer, max_length)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = prepare(data, tokenizer, max_length=max_length, padding="max_length")["train"]
        kept = [row for row in expected if any(x != -100 for x in row["labels"])]
        assert list(done) == kept and (len(kept) < 50) == (max_length == 64)
        assert {len(row["input_ids"]) for row in done} == {max_length}


def test_label_text_column_made_as_in_document_001(tokenizer):
    data = load_data("tweets", split="train")
    names = data.features["Label"].names
    with_text = data.map(lambda row: {"text_label": names[row["Label"]]})
    assert get_format("label", available=with_text.column_names).bind(with_text).label_column == "text_label"
    assert list(prepare(with_text, tokenizer, max_length=200)) == list(prepare(data, tokenizer, max_length=200))


def test_alpaca_is_document_003(tokenizer):
    data = load_data("alpaca-zh", split="train")
    expected = [document_003(row, tokenizer) for row in data]
    assert list(prepare(data, tokenizer)) == expected
    short = [document_003(row, tokenizer, 60) for row in data]
    short = [row for row in short if any(x != -100 for x in row["labels"])]
    with pytest.warns(UserWarning, match=rf"{80 - len(short)} of 80 examples .* max_length=60"):
        assert list(prepare(data, tokenizer, max_length=60)) == short


def test_adgen_is_document_004(chatglm_tokenizer):
    data = load_data("adgen-zh", split="train")
    for limits in ({}, {"max_input_length": 40, "max_output_length": 30, "prompt_text": "写广告："}):
        expected = [document_004(row, chatglm_tokenizer, **limits) for row in data]
        done = prepare(data, chatglm_tokenizer, **limits)
        assert [{k: row[k] for k in ("input_ids", "labels")} for row in done] == expected
    first = chatglm_tokenizer.convert_ids_to_tokens(done[0]["input_ids"])
    assert first[:2] == ["[gMASK]", "sop"] and first[-1] == "</s>"


def test_adgen_input_column(chatglm_tokenizer):
    rows = [{"content": "裙", "input": i, "summary": "好看"} for i in ("红色", "  ", None)]
    done = prepare(Dataset.from_list(rows), chatglm_tokenizer)
    assert done["input_ids"][:] == [document_004(row, chatglm_tokenizer)["input_ids"] for row in rows]


def test_adgen_with_any_tokenizer_ends_with_eos(tokenizer):
    row = prepare(load_data("adgen-zh", split="test"), tokenizer)[0]
    content, summary = load_data("adgen-zh", split="test")[0].values()
    prompt, answer = (
        tokenizer(content)["input_ids"],
        tokenizer(summary)["input_ids"] + [tokenizer.eos_token_id],
    )
    assert row["input_ids"] == prompt + answer
    assert row["labels"] == [-100] * len(prompt) + answer


@pytest.mark.parametrize(("name", "column"), [("prompts", "prompt"), ("quotes", "quote")])
def test_text_is_documents_002_and_004(name, column, tokenizer, bos_tokenizer):
    data = load_data(name, split="test")
    for tok in (tokenizer, bos_tokenizer):
        expected = [tok(text)["input_ids"] for text in data[column]]
        done = prepare(data, tok, max_length=2000)
        assert done["input_ids"][:] == expected and done["labels"][:] == expected


def test_text_with_end_token(tokenizer):
    done = prepare(Dataset.from_list([{"text": "a quote"}]), tokenizer, end="eos")
    assert done[0]["labels"][-1] == tokenizer.eos_token_id


def test_one_bos_and_only_in_front(bos_tokenizer):
    for name in ("tweets", "alpaca-zh", "adgen-zh"):
        done = prepare(load_data(name, split="test"), bos_tokenizer, max_length=2000)
        for row in done:
            assert row["input_ids"][0] == 1 and row["input_ids"].count(1) == 1 and row["labels"][0] == -100


def test_completion_with_any_columns(tokenizer):
    data = Dataset.from_list([{"frage": "Why?", "antwort": "Because."}])
    done = prepare(data, tokenizer, "completion", columns={"prompt": "frage", "completion": "antwort"}, separator="\n")
    prompt = tokenizer("Why?\n")["input_ids"]
    answer = tokenizer("Because.")["input_ids"] + [tokenizer.eos_token_id]
    assert done[0]["input_ids"] == prompt + answer
    assert done[0]["labels"] == [-100] * len(prompt) + answer


def test_classes_from_class_label_and_from_distinct_values():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["not_a_joke", "joke"])})
    data = Dataset.from_list([{"text": "a", "label": 1}, {"text": "b", "label": 0}], features=features)
    fmt = guess_format(data.column_names).bind(data)
    assert fmt.classes == ("not a joke", "joke")
    assert [fmt.pair(row).target for row in data] == ["joke", "not a joke"]
    assert fmt.pair(data[0]).prompt == "text : a Label : "

    data = Dataset.from_list([{"text": "a", "label": x} for x in ("up", "down", "up")])
    assert guess_format(data.column_names).bind(data).classes == ("down", "up")

    stars = Dataset.from_list([{"text": "a", "label": 4}, {"text": "b", "label": 5}])
    fmt = guess_format(stars.column_names).bind(stars)
    assert fmt.classes == ("4", "5") and fmt.pair(stars[1]).target == "5"
    given = get_format("label", available=stars.column_names, classes=list("abcde")).bind(stars)
    assert given.pair(stars[0]).target == "e"
    with pytest.raises(DataError, match="label 5 in column 'label' is no index"):
        given.pair(stars[1])


def test_guess_format():
    guesses = {
        "chat": ["messages", "id"],
        "alpaca": ["instruction", "output"],
        "adgen": ["content", "summary"],
        "completion": ["prompt", "completion"],
        "label": ["sentence", "label"],
        "text": ["quote", "author", "tags"],
    }
    assert {name: guess_format(columns).name for name, columns in guesses.items()} == {n: n for n in FORMATS}
    with pytest.raises(DataError, match=r"no format fits the columns \['a', 'b'\].*format='completion'"):
        guess_format(["a", "b"])


def test_mistakes_are_explained(tokenizer):
    data = Dataset.from_list([{"Instruction": "a", "output": "b"}])
    with pytest.raises(DataError, match=r"(?s)'alpaca'.*'instruction' is not there; did you mean 'Instruction'"):
        prepare(data, tokenizer, "alpaca")
    with pytest.raises(DataError, match="unknown format 'alpca'.*did you mean 'alpaca'"):
        prepare(data, tokenizer, "alpca")
    with pytest.raises(DataError, match="no column role 'instructoin'.*did you mean 'instruction'"):
        prepare(data, tokenizer, "alpaca", columns={"instructoin": "Instruction"})
    with pytest.raises(DataError, match="no option 'max_lenght'.*did you mean 'max_length'"):
        prepare(data, tokenizer, "alpaca", columns={"instruction": "Instruction"}, max_lenght=3)
    with pytest.raises(DataError, match="max_length=0"):
        prepare(data, tokenizer, "alpaca", columns={"instruction": "Instruction"}, max_length=0)
    with pytest.raises(DataError, match="row 1: column 'output' is empty"):
        prepare(Dataset.from_list([{"instruction": "a", "output": o} for o in ("b", None)]), tokenizer)
    with pytest.raises(DataError, match="is empty; expected at least one row"):
        prepare(Dataset.from_dict({"text": []}), tokenizer)
    with pytest.raises(DataError, match="got list"):
        prepare([{"text": "a"}], tokenizer)
    with pytest.raises(DataError, match="truncation='left'"):
        prepare(data, tokenizer, truncation="left")


def test_a_tokenizer_without_pad_or_eos(bpe_json):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe_json))
    data = load_data("tweets", split="train[:2]")
    with pytest.raises(DataError, match="the tokenizer has none; set tokenizer.eos_token"):
        prepare(data, bare)
    bare.eos_token = "</s>"
    assert prepare(data, bare, max_length=200)[0]["labels"][-1] == bare.eos_token_id
    assert bare.pad_token is None  # found a way without changing the tokenizer
    with pytest.raises(DataError, match=r"no pad token.*tokenizer\.pad_token = tokenizer\.eos_token"):
        prepare(data, bare, padding="max_length")


def test_dropped_examples_are_counted(tokenizer):
    rows = [{"text": "word " * n, "label": "yes"} for n in (1, 30, 2)]
    data = DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:1])})
    with pytest.warns(UserWarning, match=r"1 of 3 examples of split 'train' have no labelled token") as caught:
        done = prepare(data, tokenizer, max_length=40)
    assert len(caught) == 1 and len(done["train"]) == 2 and len(done["test"]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = prepare(data, tokenizer, max_length=40, truncation="prompt")
    answer = tokenizer("yes")["input_ids"] + [tokenizer.pad_token_id]
    assert [row["labels"][-len(answer) :] for row in kept["train"]] == [answer] * 3
    assert len(kept["train"][1]["input_ids"]) == 40
    with pytest.raises(DataError, match="nothing is left to train on"):
        prepare(data, tokenizer, max_length=2)


def test_cutting_the_prompt_keeps_bos_and_its_end(bos_tokenizer):
    data = Dataset.from_list([{"prompt": "0123456789" * 20, "completion": "ok"}])
    row = prepare(data, bos_tokenizer, max_length=20, truncation="prompt")[0]
    answer = bos_tokenizer("ok", add_special_tokens=False)["input_ids"] + [2]
    assert len(row["input_ids"]) == 20 and row["input_ids"][0] == 1 and row["input_ids"][-len(answer) :] == answer
    whole = bos_tokenizer("0123456789" * 20, add_special_tokens=False)["input_ids"]
    assert row["input_ids"][1 : -len(answer)] == whole[-(19 - len(answer)) :]


def test_generation_prompts(tokenizer, bos_tokenizer):
    data = load_data("tweets", split="test[:20]")
    done = prepare(data, tokenizer, for_generation=True, max_length=64, padding="max_length")
    assert done.column_names == ["input_ids", "attention_mask", "prompt", "target"]
    for row, text in zip(done, data["Tweet text"], strict=True):
        ids = tokenizer(f"Tweet text : {text} Label : ")["input_ids"]
        if len(ids) <= 64:  # test_preprocess_function of document 001
            assert row["input_ids"] == [tokenizer.pad_token_id] * (64 - len(ids)) + ids
            assert row["attention_mask"] == [0] * (64 - len(ids)) + [1] * len(ids)
        else:  # the document would cut off "Label : ", the question itself
            assert row["input_ids"] == ids[-64:]
    assert set(done["target"]) == {"complaint", "no complaint"}
    cut = prepare(data, bos_tokenizer, for_generation=True, max_length=10)
    assert all(len(row["input_ids"]) == 10 and row["input_ids"][0] == 1 for row in cut)


def test_prompts_and_targets(tokenizer):
    prompts, targets = prompts_and_targets(load_data("tweets", split="test"))
    assert len(prompts) == 200 and set(targets) == {"complaint", "no complaint"}
    assert prompts[0].startswith("Tweet text : ") and prompts[0].endswith(" Label : ")
    texts = Dataset.from_list([{"text": t} for t in ("one two three four five", "one two", "one", "春眠不觉晓")])
    prompts, targets = prompts_and_targets(texts)
    assert prompts == ["one two three four", "one", "", "春眠不觉"]
    assert targets == [" five", " two", "one", "晓"]
    with pytest.raises(DataError, match="choose one of its splits"):
        prompts_and_targets(load_data("tweets"))


def test_seq2seq(t5_tokenizer, tokenizer):
    data = load_data("tweets", split="test[:5]")
    for tok in (t5_tokenizer, tokenizer):
        done = prepare(data, tok, seq2seq=True, max_length=100)
        prompts, targets = prompts_and_targets(data)
        for row, prompt, target in zip(done, prompts, targets, strict=True):
            plain = tok(target, add_special_tokens=False)["input_ids"]
            assert row["input_ids"] == tok(prompt)["input_ids"]
            assert row["labels"] == plain + [tok.eos_token_id]
    short = prepare(data, t5_tokenizer, seq2seq=True, max_length=12)
    whole = t5_tokenizer(prompts[0], add_special_tokens=False)["input_ids"]
    assert short[0]["input_ids"] == whole[:11] + [2]
    left = prepare(data, t5_tokenizer, seq2seq=True, max_length=12, truncation="prompt")
    assert left[0]["input_ids"] == whole[-11:] + [2]
    with pytest.raises(DataError, match="needs a prompt and an answer"):
        prepare(load_data("quotes"), t5_tokenizer, seq2seq=True)


def test_prepare_is_deterministic(tokenizer):
    data = load_data("quotes")
    first, second = (prepare(data, tokenizer) for _ in range(2))
    assert {k: list(v) for k, v in first.items()} == {k: list(v) for k, v in second.items()}
    assert isinstance(first, DatasetDict) and first["train"].column_names == [
        "input_ids",
        "attention_mask",
        "labels",
    ]


def test_end_token_for_generation(tokenizer):
    assert get_format("label").end_token_id(tokenizer) == tokenizer.pad_token_id
    assert get_format("label", end="eos").end_token_id(tokenizer) == tokenizer.eos_token_id
    assert get_format("text").end_token_id(tokenizer) is None
    with pytest.raises(DataError, match="end='stop'"):
        get_format("label", end="stop")


def test_importing_the_data_package_is_light():
    import subprocess
    import sys

    heavy = ("torch", "transformers", "datasets")
    code = f"import sys, graftlm.data; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout


def test_works_on_data_of_every_size(tokenizer):
    data = datasets.Dataset.from_list([{"quote": "x y z"}])
    assert len(prepare(data, tokenizer)) == 1


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ("prompt response", ("completion", "prompt", "response")),
        ("Question Answers id", ("completion", "Question", "Answers")),
        ("input output", ("completion", "input", "output")),
        ("query response", ("completion", "query", "response")),
        ("source target", ("completion", "source", "target")),
        ("text summary", ("completion", "text", "summary")),
        ("article highlights id", ("completion", "article", "highlights")),
        ("prompt completion label", ("completion", "prompt", "completion")),
        ("question answer source", ("completion", "question", "answer")),
        ("instruction response", ("alpaca", "instruction", "input", "response")),
        ("instruction context response category", ("alpaca", "instruction", "context", "response")),
        ("instruction input output text", ("alpaca", "instruction", "input", "output")),
        ("act prompt", ("text", "prompt")),
        ("text url", ("text", "text")),
    ],
)
def test_pairs_are_found_by_their_names(columns, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = guess_format(columns.split())
    assert (found.name, *found.columns().values()) == expected


@pytest.mark.parametrize("names", [("prompt", "response"), ("question", "answer"), ("instruction", "response")])
def test_pairs_train_on_the_answer_and_on_nothing_else(names, tokenizer):
    data = Dataset.from_list([dict(zip(names, ("Who?", "Paris"), strict=True))])
    row = prepare(data, tokenizer)[0]
    labelled = [i for i in row["labels"] if i != -100]
    assert labelled == [*tokenizer("Paris")["input_ids"], tokenizer.eos_token_id]
    assert prompts_and_targets(data)[1] == ["Paris"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            "prompt gold_answer",
            "'gold_answer' looks like the answers.*would train on 'prompt' alone.*'completion': 'gold_answer'",
        ),
        ("prompt label", "'label' looks like the answers"),
        ("text sentiment", "'sentiment' looks like the answers"),
        ("question answer response", "'answer' and 'response' all look like the answers"),
        ("question context answer", "(?s)'question' and 'context' all look like what 'answer' answers.*'alpaca'"),
    ],
)
def test_answers_are_not_left_out_by_a_guess(columns, message):
    with pytest.raises(DataError, match=message):
        guess_format(columns.split())


def test_the_format_text_does_not_pass_over_answers_unless_its_column_is_named(tokenizer):
    data = Dataset.from_list([{"prompt": "Who?", "response": "Paris"}])
    with pytest.raises(DataError, match=r"'response' looks like the answers.*columns=\{'text': 'prompt'\}"):
        prepare(data, tokenizer, "text")
    assert prepare(data, tokenizer, "text", columns={"text": "prompt"})[0]["labels"] == tokenizer("Who?")["input_ids"]


def test_columns_that_are_named_end_every_doubt(tokenizer):
    row = {"question": "Who?", "context": "In France.", "answer": "Paris"}
    data = Dataset.from_list([row])
    pair = {"prompt": "question", "completion": "answer"}
    assert prompts_and_targets(data, "completion", columns=pair) == (["Who?"], ["Paris"])
    three = {"instruction": "question", "input": "context", "output": "answer"}
    assert prompts_and_targets(data, "alpaca", columns=three)[0] == ["Human: Who?\nIn France.\n\nAssistant: "]


def test_unread_columns_are_told():
    with pytest.warns(UserWarning, match="training on 'prompt' alone, as running text; 'antwort' is not read"):
        assert guess_format(["prompt", "antwort"]).name == "text"
    with pytest.warns(UserWarning, match="'summary' looks like answers.*format 'label' reads 'label', 'text' only"):
        guess_format(["text", "label", "summary"])


def test_values_that_are_no_text(tokenizer):
    rows = {"a list as input": ("instruction", {"instruction": "a", "input": ["x"], "output": "b"}, "holds a list"),
            "bytes": ("text", {"text": b"abc"}, "holds a bytes"),
            "no number": ("text", {"text": float("nan")}, "is empty")}  # fmt: skip
    for _, row, message in rows.values():
        with pytest.raises(DataError, match=message):
            prepare(Dataset.from_list([row]), tokenizer)
    numbers = [{"content": "a", "input": 7, "summary": "b"}, {"content": "a", "input": None, "summary": "b"}]
    assert prompts_and_targets(Dataset.from_list(numbers))[0] == ["a\n7", "a"]


def test_prompts_that_are_numbers_stay_texts(tokenizer) -> None:
    rows = Dataset.from_dict({"prompt": [1, 2], "target": [2, 4]})
    made = prepare(rows, tokenizer, "completion", columns={"completion": "target"}, for_generation=True)
    assert made["prompt"][:] == ["1", "2"] and made["target"][:] == ["2", "4"]

"""Collators against the documents' and against transformers' own."""

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, T5Config, T5ForConditionalGeneration

from graftlm.data import (
    CausalLMCollator,
    FixedLengthCollator,
    LengthSortedCollator,
    Seq2SeqCollator,
    load_data,
    prepare,
)
from graftlm.errors import DataError

ROWS = [
    {"input_ids": [4, 5], "attention_mask": [1, 1], "labels": [-100, 5]},
    {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": [-100, 2, 3]},
    {"input_ids": [6, 7], "attention_mask": [1, 1], "labels": [-100, 7]},
]


def document_004(batch_data, pad_token_id, max_length=2048, ignore_label_id=-100):
    """DataCollatorForChatGLM.__call__ of document 004."""
    len_list = [len(d["input_ids"]) for d in batch_data]
    batch_max_len = max(len_list)
    input_ids, labels = [], []
    for len_of_d, d in sorted(zip(len_list, batch_data, strict=True), key=lambda x: -x[0]):
        pad_len = batch_max_len - len_of_d
        ids = d["input_ids"] + [pad_token_id] * pad_len
        label = d["labels"] + [ignore_label_id] * pad_len
        if batch_max_len > max_length:
            ids = ids[:max_length]
            label = label[:max_length]
        input_ids.append(torch.LongTensor(ids))
        labels.append(torch.LongTensor(label))
    return {"input_ids": torch.stack(input_ids), "labels": torch.stack(labels)}


@pytest.mark.parametrize("max_length", [2048, 25])
def test_length_sorted_is_document_004(max_length, tokenizer):
    data = prepare(load_data("quotes", split="test"), tokenizer)
    rows = [data[i] for i in range(8)]
    batch = LengthSortedCollator(tokenizer, max_length=max_length)(rows)
    expected = document_004(rows, tokenizer.pad_token_id, max_length)
    assert batch.keys() == {"input_ids", "labels", "attention_mask"}
    for key, value in expected.items():
        assert torch.equal(batch[key], value)
    lengths = sorted((min(len(row["input_ids"]), max_length) for row in rows), reverse=True)
    assert batch["attention_mask"].sum(1).tolist() == lengths


def test_the_documents_example(tokenizer):
    rows = [{"input_ids": [4, 5], "labels": [40, 50]}, {"input_ids": [1, 2, 3], "labels": [10, 20, 30]}]
    batch = LengthSortedCollator(tokenizer)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert batch["labels"].tolist() == [[10, 20, 30], [40, 50, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_causal_pads_like_transformers(side, tokenizer):
    tokenizer.padding_side = side
    expected = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=4)([dict(row) for row in ROWS])
    batch = CausalLMCollator(tokenizer, pad_to_multiple_of=4)(ROWS)
    assert batch.keys() == set(expected)
    for key in batch:
        assert torch.equal(batch[key], expected[key]) and batch[key].dtype == torch.long


def test_causal_side_positions_and_missing_columns(tokenizer):
    rows = [{"input_ids": [4], "position_ids": [3]}, {"input_ids": [5, 6], "position_ids": [0, 1]}]
    batch = CausalLMCollator(tokenizer, side="left")(rows)
    assert batch["position_ids"].tolist() == [[0, 3], [0, 1]]
    assert batch["attention_mask"].tolist() == [[0, 1], [1, 1]]
    assert "labels" not in batch


def test_extra_columns_come_back_as_lists(tokenizer):
    rows = [{**row, "adapter": name} for row, name in zip(ROWS, "abc", strict=True)]
    assert "adapter" not in CausalLMCollator(tokenizer)(rows)
    assert CausalLMCollator(tokenizer, extra=("adapter",))(rows)["adapter"] == ["a", "b", "c"]
    assert LengthSortedCollator(tokenizer, extra=("adapter",))(rows)["adapter"] == ["b", "a", "c"]
    with pytest.raises(DataError, match=r"extra columns \['adapters'\] are not in the rows"):
        CausalLMCollator(tokenizer, extra=("adapters",))(rows)


def test_fixed_length_equals_fixed_length_preparation(tokenizer):
    data = load_data("tweets", split="train")
    padded = prepare(data, tokenizer, max_length=128, padding="max_length")
    batch = FixedLengthCollator(tokenizer, max_length=128)(list(prepare(data, tokenizer, max_length=128)))
    assert batch["input_ids"].shape == (50, 128)
    for key in ("input_ids", "attention_mask", "labels"):
        assert batch[key].tolist() == padded[key][:]


def test_cutting_all_labels_raises(tokenizer):
    row = {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, -100, 4]}
    for collator in (
        FixedLengthCollator(tokenizer, max_length=3),
        LengthSortedCollator(tokenizer, max_length=3),
    ):
        with pytest.raises(DataError, match="a row of 4 tokens has no labelled token in its first 3"):
            collator([row])
    assert FixedLengthCollator(tokenizer, max_length=3)([{"input_ids": [1, 2, 3, 4]}])["input_ids"].tolist() == [[1, 2, 3]]


def test_seq2seq_is_transformers(t5_tokenizer):
    rows = list(prepare(load_data("tweets", split="test[:4]"), t5_tokenizer, seq2seq=True, max_length=99))
    expected = DataCollatorForSeq2Seq(t5_tokenizer)([dict(row) for row in rows])
    batch = Seq2SeqCollator(t5_tokenizer, extra=("name",))([{**row, "name": "x"} for row in rows])
    assert batch.pop("name") == ["x"] * 4 and batch.keys() == set(expected)
    for key in batch:
        assert torch.equal(batch[key], expected[key])
    config = T5Config(vocab_size=420, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with_decoder = Seq2SeqCollator(t5_tokenizer, model=T5ForConditionalGeneration(config))(rows)
    assert with_decoder["decoder_input_ids"].shape == with_decoder["labels"].shape


def test_seq2seq_without_labels(t5_tokenizer):
    assert Seq2SeqCollator(t5_tokenizer)([{"input_ids": [3, 2]}]).keys() == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("kind", [CausalLMCollator, FixedLengthCollator, LengthSortedCollator, Seq2SeqCollator])
def test_no_pad_token(kind, tokenizer):
    tokenizer.pad_token = None
    with pytest.raises(DataError, match=r"no pad token.*tokenizer\.pad_token = tokenizer\.eos_token"):
        kind(tokenizer)


def test_bad_rows(tokenizer):
    collate = CausalLMCollator(tokenizer)
    with pytest.raises(DataError, match="no rows"):
        collate([])
    with pytest.raises(DataError, match=r"row 0 has no 'input_ids', only \['text'\]; tokenise"):
        collate([{"text": "a"}])
    with pytest.raises(DataError, match="row 1 has the columns"):
        collate([ROWS[0], {"input_ids": [1]}])
    with pytest.raises(DataError, match="row 0: 1 labels for 2 input_ids"):
        collate([{"input_ids": [1, 2], "labels": [1]}])
    with pytest.raises(DataError, match="side='middle'"):
        CausalLMCollator(tokenizer, side="middle")


def test_the_plain_trainer_takes_them(tokenizer, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    config = GPT2Config(vocab_size=420, n_embd=8, n_layer=1, n_head=2, n_positions=128)
    args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], save_strategy="no")
    data = prepare(load_data("tweets", split="train[:8]"), tokenizer, max_length=128)
    trainer = Trainer(
        GPT2LMHeadModel(config),
        args,
        train_dataset=data,
        data_collator=FixedLengthCollator(tokenizer, max_length=128),
    )
    assert trainer.train().global_step == 1

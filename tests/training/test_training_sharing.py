"""Which process has which rows."""

from __future__ import annotations

import random

import pytest
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from datasets import Dataset, Features, Sequence, Value
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from graftlm.training import sharing
from graftlm.training.sharing import Dealt, deal_out, left_over, token_lengths


def rows(lengths: list[int]) -> Dataset:
    return Dataset.from_dict({"input_ids": [[1] * n for n in lengths]})


@pytest.mark.parametrize(("size", "count"), [(4, 2), (2, 3), (1, 2)])
def test_an_update_has_the_rows_of_one_process(size: int, count: int) -> None:
    lengths = random.Random(0).choices(range(5, 200), k=41)
    order = random.Random(1).sample(range(41), 41)
    dealt = list(Dealt(order, lengths, size, count))
    for start in range(0, 41, size * count):
        part = slice(start, start + size * count)
        assert sorted(dealt[part]) == sorted(order[part])
    left = 41 % (size * count)
    assert dealt[41 - left :] == order[41 - left :], "accelerate fills up the last one by its own order"


def test_processes_have_about_as_many_tokens() -> None:
    lengths = random.Random(0).choices(range(5, 200), k=800)

    def spread(order: list[int]) -> float:
        """How much longer the longest share of an update is than the mean share."""
        shares = [sum(lengths[r] for r in order[i : i + 4]) for i in range(0, 800, 4)]
        pairs = [(max(p), sum(p) / 2) for p in zip(shares[::2], shares[1::2], strict=True)]
        return sum(a for a, _ in pairs) / sum(b for _, b in pairs)

    assert spread(list(range(800))) > 1.12
    assert spread(list(Dealt(range(800), lengths, 4, 2))) < 1.03  # type: ignore[arg-type]


def loader(data: Dataset, process: int, sampler: type = SequentialSampler) -> DataLoader:
    batches = BatchSampler(sampler(data), batch_size=2, drop_last=False)
    made = DataLoader(data, batch_sampler=BatchSamplerShard(batches, num_processes=2, process_index=process))
    deal_out(made, data)
    return made


def test_a_loader_deals_out() -> None:
    data = rows([50, 50, 10, 10, 5, 60, 20, 20, 7])
    first, second = (list(loader(data, i).batch_sampler) for i in range(2))
    assert first[:2] == [[0, 2], [5, 4]] and second[:2] == [[1, 3], [6, 7]]
    assert first[2][0] == 8, "of the last update one row is left"
    skipped = SkipBatchSampler(loader(data, 0).batch_sampler, skip_batches=1)
    assert list(skipped) == first[1:], "a run that is resumed goes on where it was"
    assert left_over(DataLoader(data, batch_sampler=skipped)) == 1


def test_epochs_are_told_to_the_sampler() -> None:
    class Seeded(RandomSampler):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    made = loader(rows([3, 4, 5, 6]), 0, Seeded)
    inner = made.batch_sampler.batch_sampler.sampler  # type: ignore[union-attr, attr-defined]
    assert isinstance(inner, Dealt) and len(inner) == 4
    inner.set_epoch(3)
    assert inner.sampler.epoch == 3


def test_lengths() -> None:
    data = rows([3, 1, 4, 1, 5])
    assert token_lengths(data) == [3, 1, 4, 1, 5]
    assert token_lengths(data.select([4, 0])) == [5, 3]
    assert token_lengths(data.with_format("torch")) == [3, 1, 4, 1, 5]
    assert token_lengths([{"input_ids": [1]}]) is None
    assert token_lengths(data.rename_column("input_ids", "pixels")) is None


def test_columns_without_lists() -> None:
    assert token_lengths(Dataset.from_dict({"input_ids": [1, 2, 3]})) is None
    assert token_lengths(Dataset.from_dict({"input_ids": [[1, 2], None]})) is None
    fixed = Features({"input_ids": Sequence(Value("int64"), length=2)})
    assert token_lengths(Dataset.from_dict({"input_ids": [[1, 2], [3, 4]]}, features=fixed)) == [2, 2]


def test_lengths_are_read_where_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(dataset: Dataset) -> None:
        raise AssertionError("a column was read for nothing")

    monkeypatch.setattr(sharing, "token_lengths", never)
    data = rows([3, 4, 5, 6])
    single = BatchSampler(SequentialSampler(data), batch_size=1, drop_last=False)
    deal_out(DataLoader(data, batch_sampler=BatchSamplerShard(single, num_processes=2, process_index=0)), data)
    deal_out(DataLoader(data, batch_size=2), data)

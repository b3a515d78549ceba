"""Rows of inputs and labels, against the documents that they are made of."""

from pathlib import Path

import pytest
from support.stores import random_documents, write_store

from tsumugu.data.packing import IGNORE_INDEX, Concatenated, LeftPadded
from tsumugu.data.store import Split, open_store
from tsumugu.errors import UserError

PAD = 3


def _split(path: Path, documents: list[list[int]], masks: list[list[int]] | None = None) -> Split:
    return open_store(write_store(path / "store", documents, masks=masks)).train


@pytest.mark.parametrize("length", [1, 2, 7, 16, 50, 1000])
def test_concatenated_rows_have_every_token_but_the_first_as_a_label_once(tmp_path: Path, length: int):
    documents = random_documents(20, seed=1)
    stream = [token for document in documents for token in document]
    rows = Concatenated(_split(tmp_path, documents), length, PAD)
    made = [rows.row(index) for index in range(len(rows))]
    assert [token for row in made for token in row.labels] == stream[1:]
    assert [token for row in made for token in row.inputs] == stream[:-1]
    assert all(len(row.inputs) == length for row in made[:-1])
    assert 1 <= len(made[-1].inputs) <= length


@pytest.mark.parametrize(
    ("tokens", "length", "expected"), [(1, 4, 0), (2, 4, 1), (5, 4, 1), (6, 4, 2), (9, 4, 2), (2, 1, 1)]
)
def test_number_of_concatenated_rows(tmp_path: Path, tokens: int, length: int, expected: int):
    assert len(Concatenated(_split(tmp_path, [list(range(5, 5 + tokens))]), length, PAD)) == expected


def test_a_split_without_documents_has_no_rows(tmp_path: Path):
    store = open_store(write_store(tmp_path / "store", [[5, 6, 7]]))
    assert [len(packing(store.validation, 1, PAD)) for packing in (Concatenated, LeftPadded)] == [0, 0]


def test_only_supervised_tokens_are_labels(tmp_path: Path):
    split = _split(tmp_path, [[5, 6, 7, 8], [9, 10, 11]], masks=[[0, 0, 1, 1], [1, 0, 1]])
    concatenated = Concatenated(split, 6, PAD).row(0)
    assert concatenated.inputs.tolist() == [5, 6, 7, 8, 9, 10]
    assert concatenated.labels.tolist() == [IGNORE_INDEX, 7, 8, 9, IGNORE_INDEX, 11]
    padded = LeftPadded(split, 6, PAD)
    assert padded.row(0).labels.tolist() == [IGNORE_INDEX, 7, 8]
    assert padded.row(1).labels.tolist() == [IGNORE_INDEX, 11]


def test_a_short_block_and_an_empty_row_are_filled_on_the_right(tmp_path: Path):
    rows = Concatenated(_split(tmp_path, [[5, 6, 7, 8, 9, 10]]), 4, PAD)
    batch = rows.collate([rows.row(0), rows.row(1), None])
    ignored = IGNORE_INDEX
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, PAD, PAD, PAD], [PAD] * 4]
    assert batch.labels.tolist() == [[6, 7, 8, 9], [10, ignored, ignored, ignored], [ignored] * 4]
    assert batch.lengths == [4, 1, 0]
    assert batch.attention_mask is None


def test_left_padding_comes_from_lengths_and_not_from_values(tmp_path: Path):
    # the pad id stands at the start, in the middle and at the end of documents
    rows = LeftPadded(_split(tmp_path, [[PAD, PAD, 6, PAD, 7, PAD], [8, PAD, 9], [PAD, PAD]]), 5, PAD)
    batch = rows.collate([rows.row(0), rows.row(1), rows.row(2), None])
    ignored = IGNORE_INDEX
    assert batch.input_ids.tolist() == [[PAD, PAD, 6, PAD, 7], [PAD, PAD, PAD, 8, PAD], [PAD] * 5, [PAD] * 5]
    assert batch.labels.tolist() == [
        [PAD, 6, PAD, 7, PAD],
        [ignored, ignored, ignored, PAD, 9],
        [ignored, ignored, ignored, ignored, PAD],
        [ignored] * 5,
    ]
    assert batch.attention_mask is not None
    assert batch.position_ids is not None
    assert batch.attention_mask[:3].tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]
    assert batch.position_ids[:3].tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    assert batch.lengths == [5, 2, 1, 0]


def test_every_row_attends_to_something(tmp_path: Path):
    rows = LeftPadded(_split(tmp_path, [[5, 6, 7, 8], [9]]), 5, PAD)
    for batch in (rows.collate([rows.row(0), rows.row(1), None]), rows.collate([rows.row(1)]), rows.collate([None])):
        assert batch.attention_mask is not None
        assert batch.attention_mask.any(axis=1).all()
    assert (batch.labels == IGNORE_INDEX).all()


def test_the_longest_document_that_fits_and_the_shortest_that_does_not(tmp_path: Path):
    split = _split(tmp_path, [[5, 6], list(range(5, 15))])  # ten tokens: nine inputs
    assert LeftPadded(split, 9, PAD).row(1).inputs.tolist() == list(range(5, 14))
    with pytest.raises(UserError, match=r"10 tokens.*data\.sequence_length to 9, .*prepare\.max_length 9"):
        LeftPadded(split, 8, PAD)

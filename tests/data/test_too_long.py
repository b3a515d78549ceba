"""Examples that are too long: dropped, their prompt cut, or split; nothing of an answer is lost unseen."""

import numpy as np

from tsumugu.data.too_long import PROMPT_CUT, SPLIT, fit

IDS = np.arange(10, 20)
MASK = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1])


def lists(examples):
    return [(ids.tolist(), mask.tolist()) for ids, mask in examples]


def test_dropped():
    assert fit(IDS, MASK, 8, "drop") == ([], None)


def test_the_prompt_is_cut_from_its_left_behind_the_head():
    examples, counted = fit(IDS, MASK, 7, "truncate_prompt", head=1)
    assert lists(examples) == [([10, 14, 15, 16, 17, 18, 19], [0, 0, 0, 1, 1, 1, 1])]
    assert counted == PROMPT_CUT


def test_where_no_prompt_would_be_left_the_example_is_dropped():
    assert lists(fit(IDS, MASK, 5, "truncate_prompt")[0]) == [([15, 16, 17, 18, 19], [0, 1, 1, 1, 1])]
    assert fit(IDS, MASK, 4, "truncate_prompt") == ([], None)
    assert fit(IDS, np.ones(10, int), 9, "truncate_prompt") == ([], None)


def test_split_parts_have_every_supervised_token_as_a_label_once():
    for length in range(2, 10):
        examples, counted = fit(IDS, MASK, length, "split")
        labels = [i for ids, mask in examples for i, kept in zip(ids[1:], mask[1:], strict=True) if kept]
        assert labels == [16, 17, 18, 19]
        assert max(len(ids) for ids, _ in examples) <= length
        assert all(mask[0] == 0 for _, mask in examples)
        assert counted == SPLIT

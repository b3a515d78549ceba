"""Letters and digits are compared, and equal windows, and only they, have equal hashes."""

import itertools
import unicodedata

import numpy as np
import pytest

from tsumugu.data.comparison.shingles import letters, windows

TEXTS = [
    "",
    "ＡＢＣ、abc。１２３",
    "あ",
    "  \n\t\x00\ud800",
    "ｶﾀｶﾅとカタカナ",
    "吾輩は猫である。吾輩は猫である",
    "①②½㍿𠮟る",
    "輩は猫でも",
]


def compared(text: str) -> str:
    result = ""
    for character in text:
        if unicodedata.category(character)[0] not in "ZCP":
            folded = unicodedata.normalize("NFKC", character).casefold()
            result += folded if len(folded) == 1 else character
    return result


def test_width_case_layout_and_punctuation_are_left_out():
    codes, ends = letters(TEXTS)
    found = ["".join(map(chr, part)) for part in np.split(codes.tolist(), ends)[:-1]]
    assert found == [compared(text) for text in TEXTS]
    assert found[1] == "abcabc123"


@pytest.mark.parametrize("length", [2, 3, 5, 16])
def test_equal_windows_have_equal_hashes(length: int):
    expected = [[text[i : i + length] for i in range(len(text) - length + 1)] for text in map(compared, TEXTS)]
    hashes, ends = windows(*letters(TEXTS), length)
    parts = np.split(hashes, ends)
    assert [len(part) for part in parts] == [*map(len, expected), 0]
    hash_of = dict(zip(itertools.chain(*expected), hashes.tolist(), strict=True))
    assert [hash_of[window] for part in expected for window in part] == hashes.tolist()
    assert len(set(hash_of.values())) == len(hash_of)

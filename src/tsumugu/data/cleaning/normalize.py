"""Normalisation: characters that stand for others become those, and control characters go.

Selective, unlike Unicode's NFKC, which turns 10² into 102 and ㍿ into 株式会社. Each mapping is a key of `CleanConfig`.

What stays, because it means something or because nothing tells what was meant: Japanese punctuation （）！？：；［］,
U+3000, waves and dashes (〜 ～ − ‐ – — ―), ￥, circled and squared characters, superscripts, variation selectors,
joiners (emoji and many scripts need them), private-use characters.
"""

import functools
import unicodedata
from typing import Literal

import numpy as np

from tsumugu.config import CleanConfig
from tsumugu.data.cleaning.code_points import CODE_POINTS, codes_of, joined
from tsumugu.data.cleaning.mojibake import WINDOWS_CONTROLS, mend, suspects

Language = Literal["ja", "en", "code"]

# What the normaliser does with a character.
_STAY, _REMOVE, _RETURN, _REPLACE, _VOICE, _CONTEXT = range(6)
_SUSPECT = 8  # also: may be a sign of mojibake

# Half-width forms are spacing characters, hence ゛゜ where a mark has nothing to voice.
_VOICING_MARKS = {
    0xFF9E: (0x3099, 0x309B),
    0xFF9F: (0x309A, 0x309C),
    0x3099: (0x3099, 0x3099),
    0x309A: (0x309A, 0x309A),
}  # mark: which of the two it is, and what it becomes alone
# JLREQ (W3C, Requirements for Japanese Text Layout) counts these full-width forms as Japanese punctuation.
_JAPANESE_PUNCTUATION = "！（），．：；？［］｛｝～"
# Japanese or ASCII, depending on what stands around them: 甲＝乙 ＜注＞ いろ／＼ but x=1 a<b km/h.
_AMBIGUOUS = "，．：＜＞－＝／＼"
# Radicals that PDF files give in place of whole kanji and that Unicode's normal forms leave alone. What they are equal
# to is in the Unicode character database, EquivalentUnifiedIdeograph.txt.
_RADICALS = dict(zip("⺠⻁⻄⻆⻑⻘⻝⻣⻤⻨⻩⻫⻭⻯⻲", "民虎西角長青食骨鬼麦黄斉歯竜亀", strict=True))


class Normalizer:
    """Mends characters of blocks of documents; see CleanConfig for what and why."""

    def __init__(self, rules: CleanConfig, language: Language):
        self._actions = np.zeros(CODE_POINTS, np.uint8)
        self._targets = np.arange(CODE_POINTS, dtype=np.uint32)
        self._rules = rules
        self._japanese = language == "ja"
        if rules.control_characters:
            self._remove_control_characters(language)
        if self._japanese:
            if rules.compatibility_ideographs:
                for code in (*range(0x2E80, 0x2FE0), *range(0xF900, 0xFB00), *range(0x2F800, 0x2FA20)):
                    self._replace(chr(code), _RADICALS.get(chr(code), unicodedata.normalize("NFKC", chr(code))))
            if rules.halfwidth_kana:
                for code in range(0xFF61, 0xFF9E):
                    self._replace(chr(code), unicodedata.normalize("NFKC", chr(code)))
                self._actions[list(_VOICING_MARKS)] = _VOICE
            if rules.fullwidth_ascii:
                for code in range(0xFF01, 0xFF5F):
                    if chr(code) not in _JAPANESE_PUNCTUATION + _AMBIGUOUS:
                        self._replace(chr(code), chr(code - 0xFEE0))
                self._actions[[ord(character) for character in _AMBIGUOUS]] = _CONTEXT
            if rules.punctuation:
                self._actions[[ord("，"), ord("．")]] = _CONTEXT
        self._mend = None
        if rules.mojibake == "repair" and language != "code":
            for character, target in WINDOWS_CONTROLS.items():
                self._replace(character, target)
        if rules.mojibake != "keep" and language != "code":
            self._actions[[ord(character) for character in suspects(self._japanese)]] |= _SUSPECT
            self._mend = functools.partial(mend, japanese=self._japanese)

    def _replace(self, character: str, target: str) -> None:
        if target != character:
            self._actions[ord(character)] = _REPLACE
            self._targets[ord(character)] = ord(target)

    def _remove_control_characters(self, language: Language) -> None:
        never = [*range(0x09), *range(0x0E, 0x1B), *range(0x1C, 0x20), 0x7F]
        never += [*range(0xD800, 0xE000), *range(0xFDD0, 0xFDF0), 0xFEFF]  # surrogates, noncharacters, byte order mark
        never += [plane + code for plane in range(0, CODE_POINTS, 0x10000) for code in (0xFFFE, 0xFFFF)]
        if language != "code":
            never += [0x1B, *range(0x80, 0xA0), 0xAD, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F)]
            never += [*range(0x2060, 0x2065), *range(0x2066, 0x2070), 0xFFF9, 0xFFFA, 0xFFFB]
        self._actions[never] = _REMOVE
        self._actions[0x0D] = _RETURN
        if language != "code":
            for line_end in "\v\f\x85\u2028\u2029":
                self._replace(line_end, "\n")

    def __call__(self, texts: list[str]) -> tuple[list[str], list[bool]]:
        """The texts of a block, mended, and which of them are mojibake that cannot be mended."""
        codes, ends = joined(texts)
        actions = self._actions[codes]
        broken = [False] * len(texts)
        if not actions.any():
            return texts, broken
        suspect = np.unique(np.searchsorted(ends, np.flatnonzero(actions & _SUSPECT))).tolist()
        if suspect and self._mend:
            texts = list(texts)
            for index in suspect:
                mended = self._mend(texts[index])
                broken[index] = mended is None or (self._rules.mojibake == "drop" and mended != texts[index])
                texts[index] = mended if mended and not broken[index] else texts[index]
        normal = self._normal_forms(texts)
        for index in suspect:  # what was removed may have stood between two halves of one misread character
            if normal[index] != texts[index] and not broken[index]:
                again, broken_again = self([normal[index]])
                normal[index], broken[index] = again[0], broken_again[0]
        return normal, broken

    def _normal_forms(self, texts: list[str]) -> list[str]:
        codes, ends = joined(texts)
        actions = self._actions[codes] & (_SUSPECT - 1)
        if not actions.any():
            return list(texts)
        codes, ends = self._changed(codes.copy(), ends, actions)
        text = codes.tobytes().decode("utf-32-le", "surrogatepass")
        starts = [0, *(ends[:-1] + 1).tolist()]
        return [text[start:end] for start, end in zip(starts, ends.tolist(), strict=True)]

    def _changed(self, codes: np.ndarray, ends: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = np.flatnonzero(actions)
        what = actions[at]
        replaced = at[what == _REPLACE]
        codes[replaced] = self._targets[codes[replaced]]
        removed = at[what == _REMOVE]
        if (what == _RETURN).any():
            returns = at[what == _RETURN]
            before_newline = (codes[returns + 1] == 0x0A) & ~np.isin(returns + 1, ends)
            codes[returns[~before_newline]] = 0x0A
            removed = np.union1d(removed, returns[before_newline])
        codes, ends = _without(codes, ends, removed)
        if (what == _VOICE).any():
            codes, ends = _voiced(codes, ends)
        if (what == _CONTEXT).any():
            self._resolve(codes, ends)
        return codes, ends

    def _resolve(self, codes: np.ndarray, ends: np.ndarray) -> None:
        """Makes full-width signs what they are where they stand."""
        at = np.flatnonzero(self._actions[codes] == _CONTEXT)
        signs, before, after = codes[at], _as_ascii(codes[at - 1]), _as_ascii(codes[at + 1])
        is_comma, is_stop = signs == ord("，"), signs == ord("．")
        between_digits = _is_digit(before) & _is_digit(after)
        behind, ahead = _is_alphanumeric(before), _is_alphanumeric(after)
        becomes_ascii = (is_comma | (signs == ord("："))) & between_digits
        becomes_ascii |= np.isin(signs, codes_of("．＜＞")) & behind & ahead
        dots = is_stop & ((codes[at - 1] == ord("．")) | (codes[at + 1] == ord("．")))  # an ellipsis
        japanese = np.zeros(len(at), np.bool_)
        if self._rules.punctuation:
            documents = np.searchsorted(ends, at)
            for is_sign, usual in ((is_comma, "、"), (is_stop, "。")):
                undecided = is_sign & ~becomes_ascii & ~dots
                for document in np.unique(documents[undecided]).tolist():
                    start = ends[document - 1] + 1 if document else 0
                    here = undecided & (documents == document)
                    if np.count_nonzero(codes[start : ends[document]] == ord(usual)) < np.count_nonzero(here):
                        japanese |= here
        if self._rules.fullwidth_ascii:
            becomes_ascii |= np.isin(signs, codes_of("－＝／＼")) & (behind | ahead)
            becomes_ascii |= is_stop & behind & ~japanese & ~dots
            codes[at[becomes_ascii]] -= 0xFEE0
        codes[at[japanese & is_comma]] = ord("、")
        codes[at[japanese & is_stop]] = ord("。")


def _without(codes: np.ndarray, ends: np.ndarray, removed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if not len(removed):
        return codes, ends
    return np.delete(codes, removed), ends - np.searchsorted(removed, ends)


@functools.cache
def _voiced_kana() -> dict[int, np.ndarray]:
    """For either mark: the voiced form of every kana, by code point from U+3040; 0 where there is none."""
    tables = {mark: np.zeros(0xC1, np.uint32) for mark in (0x3099, 0x309A)}  # the last for everything else
    for mark, table in tables.items():
        for code in range(0x3041, 0x3100):
            composed = unicodedata.normalize("NFC", chr(code) + chr(mark))
            if len(composed) == 1:
                table[code - 0x3040] = ord(composed)
    return tables


def _voiced(codes: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Composes kana with the voicing mark behind them."""
    removed = []
    for mark, (combining, alone) in _VOICING_MARKS.items():
        at = np.flatnonzero(codes == mark)
        offsets = codes[at - 1] - np.uint32(0x3040)  # wraps below, hence the minimum
        composed = _voiced_kana()[combining][np.minimum(offsets, 0xC0)]
        done = composed > 0
        codes[at[done] - 1] = composed[done]
        codes[at[~done]] = alone
        removed.append(at[done])
    return _without(codes, ends, np.sort(np.concatenate(removed)))


def _as_ascii(codes: np.ndarray) -> np.ndarray:
    """Full-width forms as ASCII; they are still there where fullwidth_ascii is off."""
    return np.where((codes >= 0xFF01) & (codes <= 0xFF5E), codes - 0xFEE0, codes)


def _is_digit(codes: np.ndarray) -> np.ndarray:
    return (codes >= 0x30) & (codes <= 0x39)


def _is_alphanumeric(codes: np.ndarray) -> np.ndarray:
    return _is_digit(codes) | (((codes | 0x20) >= 0x61) & ((codes | 0x20) <= 0x7A))

"""Text that was decoded with the wrong encoding: mended where nothing was lost, else told apart from real text."""

import re
from collections.abc import Callable
from typing import NamedTuple

# Bytes 0x80 to 0x9F are read as control characters (Latin-1) or as Windows-1252's own characters: both are that byte.
_WINDOWS = {chr(code): bytes([code]).decode("cp1252", "ignore") for code in range(0x80, 0xA0)}
_TO_LATIN1 = str.maketrans({shown: control for control, shown in _WINDOWS.items() if shown})
_HIGH = "\x80-\xff" + "".join(_WINDOWS.values())
_TAIL = "\x80-\xbf" + "".join(_WINDOWS.values())  # what a byte 0x80 to 0xBF becomes

# Control characters that were Windows-1252, such as U+0092 for ’; U+0085 is a line end as often.
WINDOWS_CONTROLS = {control: shown for control, shown in _WINDOWS.items() if shown and control != "\x85"}

_UTF8_AS_LATIN = re.compile(f"(?:[\xc2-\xdf][{_TAIL}]|[\xe0-\xef][{_TAIL}]{{2}}|[\xf0-\xf4][{_TAIL}]{{3}})+")
_QUOTES = "‘’“”…–—"  # these stand behind an accented letter in real text, so that one alone proves nothing
_UTF8_BROKEN = re.compile(f"[\xc2-\xf4](?![{_QUOTES}«»‹›\xa0•™])[{_TAIL}]")
_LOST = re.compile("\ufffd|ï¿½|鐃緒申|锟斤拷")  # U+FFFD, and what becomes of it when it is decoded wrongly once more
_PLAUSIBLE = re.compile(
    f"[{_HIGH}‐-⁏€™℃№←-⯿　-ヿ㇀-㏿㐀-鿿豈-\ufaff\ufe0f！-\uffef\U0001f000-\U0001faff\U00020000-\U0003ffff]+"
)
_JAPANESE_CHARACTERS = re.compile("[　-〿ぁ-ヿ㐀-鿿豈-\ufaff！-･ｦ-ﾟ￥…—‥※→←↑↓■□●○◎◆◇★☆▲△▼▽×÷±°′″℃−]")
_KANA = re.compile("[ぁ-ヿ]")
# Windows-1252 lacks some bytes. Where they were left out, Shift_JIS loses the first byte of 。、ー and of many kanji,
# and the second stands as a capital letter or as half-width kana.
_UNDEFINED = re.compile("[\x81\x8d\x8f\x90\x9d]")
_CUT = re.compile("[ぁ-ヿ一-鿿][@-Z]|[ｦ-ﾟ]")


class _Misreading(NamedTuple):
    """One way in which Japanese text is decoded wrongly.

    Attributes:
        sign: Characters that such text is full of, because they hold the first byte of kana.
        run: What was decoded together.
        encode: Back to bytes; raises UnicodeError.
        encoding: What these bytes are in truth.
        least: Share of characters of a run that are the sign, at least.
        lost: What a text is full of that is beyond repair.
    """

    sign: re.Pattern
    run: re.Pattern
    encode: Callable[[str], bytes]
    encoding: str
    least: float
    lost: re.Pattern | None


def _latin_bytes(text: str) -> bytes:
    return text.translate(_TO_LATIN1).encode("latin-1")


_LINE = re.compile("[^\n]+")
_LATIN_RUN = re.compile(f"[\t -~{_HIGH}]+")
_SHIFT_JIS = re.compile("[\x82\x83‚ƒ]")
_EUC = re.compile("¤")
_JIS = re.compile(r"\x1b\$[@B]")
_GBK = re.compile("[銆銇銈銉]")
_MISREADINGS = (
    # 縺 and 繧繝 are also words, but no half-width kana follow them there.
    _Misreading(
        re.compile("[縺繧繝縲]"), _LINE, lambda text: text.encode("cp932"), "utf-8", 0.05, re.compile("[縺繧繝縲][｡-ﾟ]")
    ),
    _Misreading(_GBK, _LINE, lambda text: text.encode("gbk"), "utf-8", 0.05, _GBK),
    # ､ and ･ are at home in half-width text, though never as many.
    _Misreading(re.compile("[､･]"), _LINE, lambda text: text.encode("cp932"), "euc_jp", 0.2, None),
    _Misreading(_SHIFT_JIS, _LATIN_RUN, _latin_bytes, "cp932", 0.05, _SHIFT_JIS),
    _Misreading(_EUC, _LATIN_RUN, _latin_bytes, "euc_jp", 0.05, _EUC),
    _Misreading(_JIS, _LINE, lambda text: text.encode("ascii"), "iso2022_jp", 0, _JIS),
)
_LOST_SHARE = 0.02  # of the characters of a text: with more of these signs it is no text


def suspects(japanese: bool) -> str:
    """Characters without which a text is not mojibake of the kinds known here."""
    high = "".join(chr(code) for code in (*range(0x80, 0x85), *range(0x86, 0xA0), *range(0xC2, 0xF5)) if code != 0xD7)
    return high + "\ufffd鐃锟" + ("縺繧繝縲銆銇銈銉､･‚ƒ¤\x1b" if japanese else "")


def mend(text: str, japanese: bool) -> str | None:
    """The text as it was before it was decoded wrongly, itself where nothing is wrong, None where it is lost."""
    for _ in range(3):  # some text has gone through it twice
        mended = text
        for misreading in _MISREADINGS if japanese else ():
            mended = _read_again(mended, misreading)
        if sum(map(len, _UTF8_AS_LATIN.findall(mended))) > 2:  # one letter may be quoted: text about encodings
            mended = _UTF8_AS_LATIN.sub(_utf8_again, mended)
        if mended == text:
            break
        text = mended
    signs = [_LOST, _UTF8_BROKEN, *(misreading.lost for misreading in _MISREADINGS if japanese and misreading.lost)]
    counts = [len(sign.findall(text)) for sign in signs]
    return None if max(counts) >= 3 and max(counts) > _LOST_SHARE * len(text) else text


def _utf8_again(match: re.Match) -> str:
    """What a run of characters is as UTF-8, if that is text at all."""
    run = match[0]
    try:
        decoded = _latin_bytes(run).decode()
    except UnicodeDecodeError:
        return run
    natural = _QUOTES if decoded < "\u0800" else _QUOTES + "«»‹›\xa0"
    if not _PLAUSIBLE.fullmatch(decoded) or (len(decoded) == 1 and all(tail in natural for tail in run[1:])):
        return run
    return decoded


def _read_again(text: str, misreading: _Misreading) -> str:
    """The text with what was misread in this way mended: nothing, unless one run shows the sign and has kana in it."""
    if not misreading.sign.search(text):
        return text

    def decoded(match: re.Match) -> str:
        run = match[0]
        if run.isascii() and "\x1b" not in run:
            return run
        try:
            again = misreading.encode(run).decode(misreading.encoding)
        except UnicodeError:
            return run
        if misreading.encoding == "cp932" and _CUT.search(again) and not _UNDEFINED.search(run):
            return run
        foreign = sum(not character.isascii() for character in again)
        return again if foreign and len(_JAPANESE_CHARACTERS.findall(again)) >= 0.9 * foreign else run

    for match in misreading.run.finditer(text):
        signs = len(misreading.sign.findall(match[0]))
        if (signs >= 2 or (signs and "\x1b" in match[0])) and signs >= misreading.least * len(match[0]):
            again = decoded(match)
            if again != match[0] and len(_KANA.findall(again)) >= 0.2 * len(again):
                return misreading.run.sub(decoded, text)
    return text

"""Normalisation changes what it says, leaves everything else, and has nothing left to do the second time."""

import random
import string
import unicodedata

import pytest

from tsumugu.config import CleanConfig
from tsumugu.data.cleaning.normalize import Language, Normalizer

# CJK compatibility ideographs that are unified ideographs in truth (Unicode standard, chapter 18, U+FA0E and so on).
TWELVE = "﨎﨏﨑﨓﨔﨟﨡﨣﨤﨧﨨﨩"
RADICALS = {"⺠": "民", "⻁": "虎", "⻄": "西", "⻆": "角", "⻑": "長", "⻘": "青", "⻝": "食", "⻣": "骨", "⻤": "鬼"}
RADICALS |= {"⻨": "麦", "⻩": "黄", "⻫": "斉", "⻭": "歯", "⻯": "竜", "⻲": "亀"}


def normalize(*texts: str, language: Language = "ja", **settings) -> list[str]:
    return Normalizer(CleanConfig(rules="normalize", **settings), language)(list(texts))[0]


def normal_form(character: str) -> str:
    """What a Japanese character becomes where it stands alone."""
    code = ord(character)
    if character in "\v\f\r\x85\u2028\u2029":
        return "\n"
    if unicodedata.category(character) == "Cc" and character not in "\t\n":
        return ""
    if 0xD800 <= code <= 0xDFFF or 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE:
        return ""  # surrogates and noncharacters
    if character in "\xad\u200b\u200e\u200f\ufeff\ufff9\ufffa\ufffb" or 0x202A <= code <= 0x202E:
        return ""
    if 0x2060 <= code <= 0x206F and code != 0x2065:
        return ""
    if character in "！（），．：；？［］｛｝～＜＞－＝／＼":
        return character
    if "！" <= character <= "～" or "｡" <= character <= "ﾝ":
        return unicodedata.normalize("NFKC", character)
    if character in "ﾞﾟ":
        return {"ﾞ": "゛", "ﾟ": "゜"}[character]
    if 0xF900 <= code <= 0xFAFF or 0x2F800 <= code <= 0x2FA1F or 0x2F00 <= code <= 0x2FD5:
        return unicodedata.normalize("NFKC", character)
    if character in "⺟⻳":
        return {"⺟": "母", "⻳": "龟"}[character]
    return RADICALS.get(character, character)


def test_the_normal_form_of_every_character():
    characters = list(map(chr, range(0x110000)))
    normal = normalize(" ".join(characters), mojibake="keep")[0]
    assert normal == " ".join(map(normal_form, characters)), "run with -vv to see where"
    assert normalize(TWELVE) == [TWELVE]


@pytest.mark.parametrize(
    "text",
    [
        "10² ㍿ ½ ① ㌔ Ⅷ ㈱ ㎡ ℃ ｟｠ ￥ ￠",
        "（はい）：「え！？」；［注］～",
        "〜～−‐–—―ー",
        "葛\U000e0100城",
        "👨‍👩‍👧 🏴\U000e0067\U000e007f ❤️",
        "　全角の空白\tとタブ\n",
        "厳粛＝阿呆感",
        "いろ／＼",
        "＜特集＞",
        "東京／大阪",
        "第一章－序論",
        "ジャン＝ポール",
        "\ue000\uf8ff",
        "…．．．。",
    ],
)
def test_what_stays(text: str):
    assert normalize(text) == [text]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Ｐｙｔｈｏｎ　３．１１で１，０００円（５０％）、１０：３０から", "Python　3.11で1,000円（50%）、10:30から"),
        ("ｘ＝－１、Ａ／Ｂ、ａ＜ｂ、Ｃ：＼Ｗｉｎ", "x=-1、A/B、a<b、C：\\Win"),
        ("Ｊ．Ｄ．サリンジャー。Ｎｏ．１。", "J.D.サリンジャー。No.1。"),
        ("これは，そうだ．だが，３．１４と１，２は違う．", "これは、そうだ。だが、3.14と1,2は違う。"),
        ("図はＡ．次に，Ｂ．", "図はA。次に、B。"),
        ("これは、そうだ。Hi，あれも、そうだ。", "これは、そうだ。Hi，あれも、そうだ。"),
        ("ﾊﾟﾋﾟﾌﾞﾍﾞｰ｡｢ｳﾞｧｲｵﾘﾝ､ﾜ･ｦ｣", "パピブベー。「ヴァイオリン、ワ・ヲ」"),
        ("か\u3099は\u309aウ\u3099ん\u3099 ﾞﾟ ｶﾞﾞ ハﾟ", "がぱヴん\u3099 ゛゜ ガ゛ パ"),
        ("ｶ\u200bﾞ", "ガ"),
        ("⽇本⻑野⻘⺠ 神福朗 \U0002f80f", "日本長野青民 神福朗 兔"),
        ("一\r\n二\r三\u2028四\x85五\f六\r", "一\n二\n三\n四\n五\n六\n"),
        ("\ufeff見\u00adえ\x00な\u200bい\x7f文\u2060字\ufffe", "見えない文字"),
        ("It\x92s 5\x80", "It’s 5€"),
    ],
)
def test_what_changes(text: str, normal: str):
    assert normalize(text) == [normal]


def test_each_switch_is_its_own():
    text = "Ａ１，ｶﾞ神\x00３．１４，２，"
    assert normalize(text) == ["A1、ガ神3.14,2、"]
    assert normalize(text, fullwidth_ascii=False) == ["Ａ１、ガ神３．１４，２、"]
    assert normalize(text, halfwidth_kana=False) == ["A1、ｶﾞ神3.14,2、"]
    assert normalize(text, compatibility_ideographs=False) == ["A1、ガ神3.14,2、"]
    assert normalize(text, punctuation=False) == ["A1，ガ神3.14,2，"]
    assert normalize(text, control_characters=False) == ["A1、ガ神\x003.14,2、"]


def test_english_keeps_what_only_japanese_changes():
    text = "Ａ ｶﾞ 神，\u200bnaïve\r\n\f“quotes”"
    assert normalize(text, language="en") == ["Ａ ｶﾞ 神，naïve\n\n“quotes”"]


def test_code_keeps_all_but_what_is_never_code():
    text = "\ufeffint x;\t// Ａ ｶﾞ\f\v\x1b[0m \u200b\u202e\xad\x92 donâ€™t\r\n\0\x01\r"
    assert normalize(text, language="code") == ["int x;\t// Ａ ｶﾞ\f\v\x1b[0m \u200b\u202e\xad\x92 donâ€™t\n\n"]


def test_ascii_is_unchanged():
    for language in ("ja", "en", "code"):
        assert normalize(string.printable[:-3] + "\n", language=language) == [string.printable[:-3] + "\n"]


ALPHABET = (
    "aＡ1１，．：－＝／＼＜＞、。ｶﾊｳﾞﾟカハう\u3099\u309a゛ー神⽇漢\r\n\x00\u200b\x85\x92é â€™Ã©\ufffd縺､｡😀\u200d\ud800"
)


def random_texts(seed: int, count: int) -> list[str]:
    choice = random.Random(seed)
    return ["".join(choice.choices(ALPHABET, k=choice.randrange(30))) for _ in range(count)]


@pytest.mark.parametrize("language", ["ja", "en", "code"])
@pytest.mark.parametrize("settings", [{}, {"fullwidth_ascii": False}, {"punctuation": False, "mojibake": "keep"}])
def test_the_second_time_nothing_changes(language: Language, settings: dict):
    once = normalize(*random_texts(1, 5000), language=language, **settings)
    assert normalize(*once, language=language, **settings) == once


def test_a_document_does_not_depend_on_its_neighbours():
    texts = random_texts(2, 1000)
    normalizer = Normalizer(CleanConfig(rules="normalize"), "ja")
    assert normalizer(texts)[0] == [normalizer([text])[0][0] for text in texts]

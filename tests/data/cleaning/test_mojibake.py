"""Text that was decoded wrongly comes back where nothing was lost and is dropped otherwise; real text stays."""

import gzip
import json
from pathlib import Path

import pytest
from support.data import SHARED

import tsumugu
from tsumugu.data.cleaning.mojibake import mend

SAMPLE = Path(tsumugu.__file__).parent / "sample"
TEXT = (
    "吾輩は猫である。名前はまだ無い。\nどこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所で"
    "ニャーニャー泣いていた事だけは記憶している。\n\nABC 123（第一章）\n"
)


def windows_1252(data: bytes) -> str:
    """As a browser reads it: bytes that Windows-1252 lacks become control characters."""
    return "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in data)


@pytest.mark.parametrize(
    "misread",
    [
        TEXT.encode().decode("latin-1"),
        windows_1252(TEXT.encode()),
        windows_1252(windows_1252(TEXT.encode()).encode()),  # twice
        TEXT.encode("cp932").decode("latin-1"),
        windows_1252(TEXT.encode("cp932")),
        TEXT.encode("euc_jp").decode("latin-1"),
        TEXT.encode("euc_jp").decode("cp1252"),
        TEXT.encode("iso2022_jp").decode("ascii"),
        "前置き。\n" + TEXT.encode().decode("latin-1") + "後書き。",
    ],
)
def test_what_is_reversible_is_repaired(misread: str):
    assert TEXT in (mend(misread, japanese=True) or "")


@pytest.mark.parametrize(
    ("written", "encoding", "misread"),
    [("すべて", "cp932", "縺吶∋縺ｦ"), ("ありがとう", "gbk", "銇傘倞銇屻仺銇�")],
)
def test_utf8_read_as_an_asian_encoding(written: str, encoding: str, misread: str):
    assert written.encode().decode(encoding, "replace") == misread
    assert mend(misread, japanese=True) == (None if "\ufffd" in misread else written)


@pytest.mark.parametrize("errors", ["replace", "ignore"])
@pytest.mark.parametrize(
    ("written", "read"), [("utf-8", "cp1252"), ("utf-8", "cp932"), ("cp932", "cp1252"), ("utf-8", "gbk")]
)
def test_what_lost_characters_is_dropped(written: str, read: str, errors: str):
    assert mend(TEXT.encode(written).decode(read, errors), japanese=True) is None


@pytest.mark.parametrize("written", ["cp932", "euc_jp"])
def test_replacement_characters_are_dropped(written: str):
    broken = TEXT.encode(written).decode("utf-8", "replace")
    assert mend(broken, japanese=True) is None
    assert mend(broken.encode().decode("latin-1"), japanese=True) is None  # and decoded wrongly once more
    assert mend(TEXT + "\ufffd", japanese=True) == TEXT + "\ufffd"  # one is no proof


@pytest.mark.parametrize(
    ("text", "mended"),
    [
        ("donâ€™t â€œsayâ€\x9d", "don’t “say”"),
        ("cafÃ© NoÃ«l 20Â°C", "café Noël 20°C"),
        ("ðŸ˜€", "😀"),
    ],
)
def test_english(text: str, mended: str):
    assert mend(text, japanese=False) == mended


@pytest.mark.parametrize(
    "text",
    [
        "“I love the café…”",
        "« été », «café»…",
        "He said ‘the café’”",
        "SÃO PAULO, AÇÃO”, “MANHÔ",
        "naïve façade – voilà…",
        "an é may come out as Ã©",
        "繧繝縁の畳がもつれて縺れる。縺れ縺れ。",
        "ﾄｳｷｮｳ､ｵｵｻｶ､ﾅｺﾞﾔ",
        "ﾄｯﾌﾟ･ﾆｭｰｽ･ﾃﾝｷ･ｽﾎﾟｰﾂ",
        "¥1,000 ± 5° § 3 × 2 ¤",
        "Çağrı Ñandú Ærø þú",
    ],
)
def test_real_text_stays(text: str):
    assert mend(text, japanese=True) == text
    assert mend(text, japanese=False) == text


def test_no_false_alarm_in_the_built_in_corpora():
    for name in ("japanese", "english", "instructions"):
        text = (SAMPLE / f"{name}.jsonl").read_text(encoding="utf-8")
        assert all(mend(line, japanese=True) == line for line in text.splitlines())


@pytest.mark.parametrize("name", ["aozora-public-domain", "jaquad-instructions"])
def test_no_false_alarm_in_real_text(name: str):
    path = SHARED / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip("the corpus is not here")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            text = "\n".join(record.values()) if "output" in record else record["text"]
            assert mend(text, japanese=True) == text

"""Personal data becomes a placeholder of its kind; other numbers stay."""

import gzip
import json

import pytest
from support.data import AOZORA

from tsumugu.data.cleaning.personal_data import MASKS


def mask_all(text: str) -> str:
    for mask in MASKS.values():
        text = mask(text)
    return text


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("メールはtaro.yamada+x@mail.example.co.jpまで", "メールは<email>まで"),
        ("foo＠example.com", "<email>"),
        ("電話03-1234-5678。", "電話<phone>。"),
        ("TEL：０３（１２３４）５６７８", "TEL：<phone>"),
        ("(03)1234-5678", "<phone>"),
        ("045-123-4567、0467-12-3456、04992-1-2345", "<phone>、<phone>、<phone>"),
        ("090-1234-5678と09012345678", "<phone>と<phone>"),
        ("+81-90-1234-5678 / +81 3 1234 5678 / +81(0)3-1234-5678", "<phone> / <phone> / <phone>"),
        ("0120-123-456、0570-012-345、0800-123-4567", "<phone>、<phone>、<phone>"),
        ("03ー1234ー5678", "<phone>"),
        ("接続元:133.242.1.1から8.8.8.8:80へ", "接続元:<ip_address>から<ip_address>:80へ"),
        ("2001:4860:4860::8888", "<ip_address>"),
        ("マイナンバー：1234 5678 9012", "マイナンバー：<my_number>"),
        ("個人番号は１２３４５６７８９０１２です", "個人番号は<my_number>です"),
    ],
)
def test_personal_data_is_masked(text: str, masked: str):
    assert mask_all(text) == masked


@pytest.mark.parametrize(
    "text",
    [
        "2019-01-01 12:00:00、01-02-2020、1990-1995、0時30分",
        "10,000円、¥1,980-、3.14159265、0.0.0.0",
        "ISBN978-4-00-310101-8、4-00-310101-8、0-306-40615-2",
        "pp. 03-05、123-135頁、第12-34号",
        "〒100-0001、123-4567",
        "1234-5678-9012-3456、123456789012、103-1234-5678、03-1234-56789、090-1234-5678-9",
        "192.168.0.1、127.0.0.1、v1.2.3.4、バージョン 10.4.5.6、1.2.3.4.5、999.1.1.1",
        "10:30:00、00:1a:2b:3c:4d:5e、std::vector、2001:db8::1",
        "a@b、@user、円@100",
    ],
)
def test_other_numbers_stay(text: str):
    assert mask_all(text) == text


def test_long_runs_take_no_time():
    assert mask_all("a" * 300_000 + " @ " + "0" * 300_000 + "1." * 100_000).startswith("aaa")


def test_nothing_is_masked_in_old_prose():
    if not AOZORA.exists():
        pytest.skip("the Aozora corpus is not here")
    with gzip.open(AOZORA, "rt", encoding="utf-8") as file:
        for line, _ in zip(file, range(300), strict=False):
            text = json.loads(line)["text"]
            assert mask_all(text) == text

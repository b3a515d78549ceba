"""What tests in several folders share: a small tokenizer, and exports without a process for each."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tsumugu import certificate, reload
from tsumugu.tokenizer.train import train_tokenizer

_PARAGRAPHS = [
    "朝早く起きて、川沿いの道を三キロほど歩いた。霧が晴れると、向こう岸の山が青く見えた。",
    "味噌汁を作るには、まず鍋に水と昆布を入れて火にかける。沸く前に昆布を取り出し、豆腐とわかめを加える。",
    "図書館は午前九時に開き、午後七時に閉まります。月曜日はお休みです。\n返却だけなら、いつでもできます。",
    "「今日は寒いね。」「うん、手袋を持ってくればよかった。」二人は笑いながら駅へ急いだ。",
    "地球は太陽のまわりを一年かけて回る。その軸は二十三度あまり傾いていて、それが季節を生む。",
    "祖父の時計は、止まったままでも一日に二度は正しい時刻を示す、と父がよく言っていた。",
    'Python 3.11 では、print("こんにちは") と書けば画面に文字が出ます。',
    "The river was calm that morning, and nobody on the bridge said a word.",
    "雨が降り始めたので、洗濯物を急いで取り込んだ。空を見上げると、遠くで雷が光った。",
    "会議の資料は二十部必要です。印刷が終わったら、机の上に置いておいてください。",
]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 530 ids with byte fallback, as `tsumugu tokenizer train` makes it."""
    output = tmp_path_factory.mktemp("shared-tokenizer") / "tokenizer"
    train_tokenizer(lambda: _PARAGRAPHS, output, vocab_size=530, reserved=4)
    return output


@pytest.fixture(scope="session", autouse=True)
def reloaded_here() -> Iterator[Callable]:
    """Exports are reloaded in this process, which saves seconds; the tests of the certificate use the real way."""
    real = certificate._run
    certificate._run = lambda python, asked, answer: reload.main(asked, answer)
    yield real
    certificate._run = real

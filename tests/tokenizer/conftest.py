"""A small corpus, a tokenizer trained on it, and texts of every kind to try tokenizers on."""

import gzip
import io
import itertools
import json
import random
import re
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from tsumugu.tokenizer.train import train_tokenizer

PARAGRAPHS = [
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所でニャーニャー泣いていた事だけは記憶している。",
    "春はあけぼの。やうやう白くなりゆく山ぎは、すこしあかりて、紫だちたる雲のほそくたなびきたる。",
    "国境の長いトンネルを抜けると雪国であった。夜の底が白くなった。信号所に汽車が止まった。",
    "東京都の人口は約1,400万人で、日本の都道府県の中で最も多い。面積は2,194平方キロメートルである。",
    "まず、お湯を沸かします。次に、野菜を切って鍋に入れます。最後に味噌を溶き、火を止めれば、味噌汁のできあがりです。",
    "「明日の会議は何時からですか。」「午後3時からです。資料はメールで送ります。」",
    "山路を登りながら、こう考えた。智に働けば角が立つ。情に棹させば流される。意地を通せば窮屈だ。兎角に人の世は住みにくい。",
    'コンピューターのプログラムは、print("Hello, world!") のように書く。\n変数 x に値を入れるには x = 1 とする。',
    "ﾊﾝｶｸｶﾅと全角カナ、ＡＢＣとABC、１２３と123は、どれも別の文字です。",
    "朝は晴れていたが、午後から雨が降り出した。　傘を持っていなかったので、駅まで走った。😀",
    "水は零度で凍り、百度で沸騰する。温度が上がると、分子の動きは速くなる。",
    "拝啓　秋も深まってまいりましたが、いかがお過ごしでしょうか。こちらは皆、元気に暮らしております。",
    "メロスは激怒した。必ず、かの邪智暴虐の王を除かなければならぬと決意した。メロスには政治がわからぬ。",
    "The quick brown fox jumps over the lazy dog. It is a short English sentence, and so is this one.",
    "本を読むことは、遠い国の人と話をすることに似ている。声は聞こえないが、考えは伝わる。",
    "電車が来るまで、あと五分ある。ホームには、学生と、買い物帰りの人が並んでいた。",
]

# Strings that engines have been seen to disagree about.
PITFALLS = [
    "<0x41>", "<0x0a>", "<0x+1>", "<s>", "</s>", "<unk>", "<pad>", "<reserved_3>", "▁", "▁▁", "▅", "\0", "\n", "\n\n",
    "\r\n", "\t", " ", "  ", "　", "か\u3099", "が", "👨‍👩‍👧‍👦", "㍿", "𠮷", "\ue000", "\ufeff", "\u2028", "\U0010ffff",
]  # fmt: skip


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """The paragraphs, and documents of their words in other orders, so that there is something to learn."""
    draw = random.Random(7)
    words = re.findall("[一-龠]+[ぁ-ん]{0,2}|[ァ-ー]+|[ぁ-ん]{1,3}|[、。]| ?[A-Za-z]+|\n", "".join(PARAGRAPHS))
    return [*PARAGRAPHS, *("".join(draw.choices(words, k=60)) for _ in range(184))]


@pytest.fixture(scope="session")
def folder(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tokenizer") / "small"
    train_tokenizer(lambda: corpus, output, vocab_size=800)
    return output


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Real sentences, pitfalls and random characters of every plane in random order, and each pitfall alone."""
    draw = random.Random(20240601)

    def character() -> str:
        top = draw.choice([0x80, 0x3100, 0xA000, 0x10000, 0x110000])
        code = draw.randrange(top)
        return chr(code) if not 0xD800 <= code < 0xE000 else "\ufffd"

    def part() -> str:
        kind = draw.randrange(3)
        if kind == 0:
            paragraph = draw.choice(PARAGRAPHS)
            start = draw.randrange(len(paragraph))
            return paragraph[start : start + draw.randrange(40)]
        return draw.choice(PITFALLS) if kind == 1 else "".join(character() for _ in range(draw.randrange(6)))

    return ["", *PITFALLS, *("".join(part() for _ in range(draw.randrange(1, 12))) for _ in range(3000))]


@pytest.fixture(scope="session")
def byte_level(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as GPT-2's: byte-level BPE, made by `tokenizers` and saved by transformers."""
    output = tmp_path_factory.mktemp("byte_level")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(corpus, vocab_size=500, special_tokens=["<|endoftext|>"], show_progress=False)
    end = "<|endoftext|>"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, bos_token=end, eos_token=end, unk_token=end)
    fast.save_pretrained(output)
    return output


@pytest.fixture(scope="session")
def train_plainly(corpus: list[str]):
    """Trains a model as SentencePiece itself makes it, without our finish."""
    lines = [line for document in corpus for line in document.split("\n")]

    def train(**options) -> ModelProto:
        writer = io.BytesIO()
        settings = {
            "vocab_size": 800,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "required_chars": "".join(map(chr, range(0x21, 0x7F))),
            "minloglevel": 2,
        } | options
        SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=writer, **settings)
        return ModelProto.FromString(writer.getvalue())

    return train


@pytest.fixture(scope="session")
def real_models() -> list[Path]:
    """Real SentencePiece models, where they are."""
    found = sorted((Path(__file__).parents[3] / "shared" / "data" / "tokenizers").glob("*.model"))
    return found or pytest.skip("no shared/data/tokenizers")


@pytest.fixture(scope="session")
def sample() -> list[str]:
    """Some 400 kB of real prose, in lines, where it is."""
    path = Path(__file__).parents[3] / "shared" / "data" / "aozora-public-domain.jsonl.gz"
    if not path.exists():
        pytest.skip("no shared/data")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        works = [json.loads(line)["text"] for line in itertools.islice(file, 0, 800, 40)]
    return [line for work in works for line in work[:8000].splitlines(keepends=True)]

"""Documents that hold a stretch of a benchmark are found, and no others."""

import json
import random
import unicodedata
from pathlib import Path

import pytest

from tsumugu.data.comparison.contamination import Contamination
from tsumugu.errors import UserError

QUESTIONS = [
    "手塚治虫が医学博士の学位を受けた大学のある都市のうち、日本で二番目に古い市電が走っていたのはどこですか。",
    "川沿いの道を三キロ歩いたところで霧が晴れ、向こう岸に青い山が見えたとき、二人は何を話していましたか。",
    "味噌汁を作るために鍋に水と昆布を入れて火にかけたあと、沸く前に取り出すものは、次の四つのうちどれですか。",
    "図書館が午前九時に開き午後七時に閉まるとき、月曜日を休みとする週の開館時間は合わせて何時間になりますか。",
    "祖父の止まった時計が一日に二度だけ正しい時刻を示すのは、朝と夕方のそれぞれ何時何分のことだと考えられますか。",
]
FILLER = "雨が降り始めたので、洗濯物を急いで取り込んだ。空を見上げると、遠くで雷が光った。"


def benchmark(folder: Path, records: list[dict], name: str = "benchmark.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def plain(text: str) -> str:
    """Letters and digits, as the module says that it compares them."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(character for character in folded if unicodedata.category(character)[0] not in "ZCP")


def test_a_file_without_records_is_refused(tmp_path: Path):
    paths = [benchmark(tmp_path, [{"question": QUESTIONS[0]}]), benchmark(tmp_path, [], "empty.jsonl")]
    with pytest.raises(UserError, match=r"empty\.jsonl: holds no record to look for \(remove it from prepare"):
        Contamination(paths)


def test_a_stretch_of_32_letters_is_found_and_one_of_31_is_not(tmp_path: Path):
    path = benchmark(tmp_path, [{"question": question} for question in QUESTIONS])
    contamination = Contamination([path])
    for question in map(plain, QUESTIONS):
        for start in range(len(question) - 31):
            # 無 and 有 do not occur in the questions, so that the stretch ends there
            found = contamination.check([f"無{question[start : start + 32]}有", f"無{question[start : start + 31]}有"])
            assert found == [path, None]


def test_layout_width_and_punctuation_do_not_hide_a_question(tmp_path: Path):
    path = benchmark(
        tmp_path, [{"question": "ＧＰＵを3台使うとき、１台あたりの負荷は、何パーセントになると考えられるでしょうか"}]
    )
    text = FILLER + "gpuを３台使うとき\n　1台あたりの負荷は\n　何パーセントになると考えられるでしょうか" + FILLER
    assert Contamination([path]).check([FILLER, text]) == [None, path]


def test_the_result_is_that_of_comparing_all_windows(tmp_path: Path):
    rng = random.Random(0)
    strings = ["".join(rng.choice("あいうえ") for _ in range(rng.randrange(8, 90))) for _ in range(60)]
    texts = ["".join(rng.choice("あいうえ") for _ in range(rng.randrange(0, 400))) for _ in range(200)]
    for number in range(0, 200, 2):  # half of them get a piece of a string, of any length
        piece = rng.choice(strings)
        begin = rng.randrange(len(piece))
        cut = rng.randrange(len(texts[number]) + 1)
        texts[number] = texts[number][:cut] + piece[begin : begin + rng.randrange(1, 50)] + texts[number][cut:]

    def contaminated(text: str) -> bool:
        return any(
            string[start : start + 32] in text
            for string in strings
            if len(string) >= 16
            for start in range(max(len(string) - 31, 1))
        )

    expected = [contaminated(text) for text in texts]
    contamination = Contamination([benchmark(tmp_path, [{"text": string} for string in strings])])
    assert [found is not None for found in contamination.check(texts)] == expected
    assert [contamination.check([text])[0] is not None for text in texts] == expected
    assert 10 < sum(expected) < 190


def test_short_strings_are_looked_for_whole_and_shorter_ones_reported(tmp_path: Path):
    short = "本を借りて読むことができる静かな場所はどこ"  # 21
    path = benchmark(tmp_path, [{"q": short}, {"q": "日本の首都は？", "answer": ["東京", "大阪"]}, {"q": ""}])
    contamination = Contamination([path])
    assert contamination.check([f"問い、{short}。", short[:-1], "日本の首都は？"]) == [path, None, None]
    [coverage] = contamination.coverage
    assert (coverage.file, coverage.records, coverage.unchecked) == (path, 3, 2)
    assert coverage.example == f"{path}, line 2"


def test_english_needs_twice_the_length(tmp_path: Path):
    question = (
        "Which of the following statements is true of the river that flows through the northern part of the city?"
    )
    path = benchmark(tmp_path, [{"question": question}])
    assert Contamination([path]).check([question[:50], question[:85]]) == [None, path]


def test_strings_in_lists_and_objects_count(tmp_path: Path):
    path = benchmark(tmp_path, [{"turns": [{"role": "user", "content": QUESTIONS[0]}], "number": 3, "none": None}])
    assert Contamination([path]).check([QUESTIONS[0]]) == [path]


def test_what_all_records_share_is_form(tmp_path: Path):
    licence = "このデータはクリエイティブ・コモンズ表示継承四・〇国際ライセンスの条件のもとで提供されています"
    path = benchmark(tmp_path, [{"question": question, "licence": licence} for question in QUESTIONS])
    assert Contamination([path]).check([licence, QUESTIONS[3]]) == [None, path]


def test_each_document_is_told_its_file(tmp_path: Path):
    paths = [benchmark(tmp_path, [{"q": question}], f"{n}.jsonl") for n, question in enumerate(QUESTIONS)]
    assert Contamination([str(tmp_path)]).check([FILLER, *reversed(QUESTIONS), ""]) == [None, *reversed(paths), None]


def test_a_benchmark_without_anything_to_look_for(tmp_path: Path):
    assert Contamination([benchmark(tmp_path, [{"q": "短い"}])]).check([FILLER, ""]) == [None, None]

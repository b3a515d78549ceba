"""Speed of cleaning on one core, against the same rules in plain Python, and what the rules drop.

    python benchmarks/clean.py CORPUS.jsonl[.gz] [--megabytes 20]

The corpus is JSON lines with a `text` column of long documents. Short documents are cut from the same text at line
ends, as soon as 600 characters are reached. Seconds are processor time of this one process.

The plain implementation stands below: it follows the published description of Swallow Corpus v1 (Okazaki et al. 2024)
with `collections.Counter`, `str.translate` and `re`, stops at the first rule that a document fails, and has no mojibake
gate; it is not Swallow's script. It is measured on a tenth of the documents, for it is slow, and must agree with
tsumugu on every one.
"""

import argparse
import gzip
import itertools
import json
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from tsumugu.config import CleanConfig
from tsumugu.data.cleaning.clean import Cleaned, Cleaner

_BATCH = 256
_CUT = 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("corpus", type=Path, help="JSON lines with a text column")
    parser.add_argument("--megabytes", type=float, default=20, help="UTF-8 of the corpus that is used (default: 20)")
    options = parser.parse_args()
    long_documents = read(options.corpus, options.megabytes * 1e6)
    short_documents = [piece for text in long_documents for piece in cut(text)]
    corpora = {"long": long_documents, "short": short_documents}
    ways = {
        "normalize": (Cleaner(CleanConfig(rules="normalize"), "ja"), plain_normalize),
        "swallow (all rules)": (Cleaner(CleanConfig(rules="swallow"), "ja"), plain_swallow),
    }
    print("| documents | kB each | rules | tsumugu MB/s | plain Python MB/s | times |\n|---|---|---|---|---|---|")
    dropped = {}
    for name, texts in corpora.items():
        kilobytes = size_of(texts) / len(texts) / 1e3
        for rules, (cleaner, plain) in ways.items():
            speed, dropped[name] = measure(lambda batch, cleaner=cleaner: cleaner(batch), texts)
            part = texts[::10]
            plain_speed, expected = measure(lambda batch, plain=plain: [plain(text) for text in batch], part)
            if expected != dropped[name][::10]:
                raise SystemExit(f"{name}, {rules}: the plain implementation disagrees")
            ratio = speed / plain_speed
            print(f"| {name} | {kilobytes:.1f} | {rules} | {speed:.1f} | {plain_speed:.2f} | {ratio:.0f} |")
    print("\n| dropped for | long | short |\n|---|---|---|")
    reasons = {name: Counter(document.dropped for document in documents) for name, documents in dropped.items()}
    for reason, _ in sum(reasons.values(), Counter()).most_common():
        shares = (f"{100 * reasons[name][reason] / len(corpora[name]):.2f} %" for name in corpora)
        print(f"| {reason or '(kept)'} | {' | '.join(shares)} |")


def read(path: Path, limit: float) -> list[str]:
    """Documents of the corpus, spread over all of it, of `limit` bytes in all."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    return texts[:: max(1, round(size_of(texts) / limit))]


def cut(text: str) -> Iterable[str]:
    piece = ""
    for line in text.split("\n"):
        piece += line + "\n"
        if len(piece) >= _CUT:
            yield piece
            piece = ""
    if piece:
        yield piece


def size_of(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def measure(clean: Callable[[list[str]], list[Cleaned]], texts: list[str]) -> tuple[float, list[Cleaned]]:
    """MB/s and the results."""
    clean(texts[:_BATCH])
    start = time.process_time()
    cleaned = [item for first in range(0, len(texts), _BATCH) for item in clean(texts[first : first + _BATCH])]
    return size_of(texts) / (time.process_time() - start) / 1e6, cleaned


# The rules in plain Python.

_KEPT_WIDE = "！（），．：；？［］｛｝～＜＞－＝／＼"
_TABLE = {code: None for code in (*range(9), *range(0x0E, 0x20), *range(0x7F, 0xA0), 0xAD, 0xFEFF, 0xFFFE, 0xFFFF)}
_TABLE |= dict.fromkeys(
    (0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2060, 0x2065), *range(0x2066, 0x2070))
)
_TABLE |= dict.fromkeys((0x0B, 0x0C, 0x85, 0x2028, 0x2029), "\n")
for _code in itertools.chain(
    range(0xFF01, 0xFF5F), range(0xFF61, 0xFF9E), range(0x2F00, 0x2FD6), range(0xF900, 0xFB00), range(0x2F800, 0x2FA20)
):
    if chr(_code) not in _KEPT_WIDE:
        _TABLE[_code] = unicodedata.normalize("NFKC", chr(_code))
_MARKED = re.compile("[か-ほカ-ホうゝウワ-ヲヽ][\u3099\u309aﾞﾟ]")
_SENTENCE = re.compile("[^。．！？!?\n]+[。．！？!?]?")


def plain_normalize(text: str) -> Cleaned:
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(_TABLE)
    text = _MARKED.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text).replace("ﾞ", "゛").replace("ﾟ", "゜")
    text = re.sub("(?<=[0-9])[，：](?=[0-9])|(?<=[0-9A-Za-z])[．＜＞](?=[0-9A-Za-z])", narrow, text)
    commas, stops = len(re.findall("，", text)), len(re.findall("(?<!．)．(?!．)", text))
    if commas > text.count("、"):
        text = text.replace("，", "、")
    if stops > text.count("。"):
        text = re.sub("(?<!．)．(?!．)", "。", text)
    text = re.sub("(?<=[0-9A-Za-z])(?:．(?!．)|[－＝／＼])|[－＝／＼](?=[0-9A-Za-z])", narrow, text)
    return Cleaned(text, None)


def narrow(match: re.Match) -> str:
    return chr(ord(match[0]) - 0xFEE0)


def plain_swallow(text: str) -> Cleaned:
    text = plain_normalize(text).text
    return Cleaned(text, next(plain_reasons(text), None))


def plain_reasons(text: str) -> Iterable[str]:
    kinds = Counter(map(kind, text))
    japanese = len(text) - kinds["other"]
    yield from failed("min_letters", len(text) < 400)
    yield from failed("min_japanese_letters", japanese < 400)
    yield from failed("min_hiragana", kinds["hiragana"] < 0.2 * japanese)
    yield from failed("max_katakana", kinds["katakana"] > 0.5 * japanese)
    yield from failed("min_japanese", japanese < 0.5 * len(text))
    lines = [[sentence for sentence in _SENTENCE.findall(line) if sentence.strip()] for line in text.split("\n")]
    sentences = [sentence for line in lines for sentence in line]
    lengths = [len(sentence) for sentence in sentences]
    yield from failed("min_mean_sentence", sum(lengths) / len(lengths) < 20)
    yield from failed("max_mean_sentence", sum(lengths) / len(lengths) > 90)
    yield from failed("max_longest_sentence", max(lengths) > 200)
    ellipses = sum(sentence.strip().endswith(("…", "・")) for sentence in sentences)
    yield from failed("max_ellipsis", ellipses / len(sentences) > 0.2)
    for name, items in (("paragraph", ["".join(line) for line in lines if line]), ("sentence", sentences)):
        copies = {item: count - 1 for item, count in Counter(items).items()}
        yield from failed(f"max_duplicate_{name}s", sum(copies.values()) / len(items) > 0.3)
        characters = sum(len(item) * count for item, count in copies.items())
        yield from failed(f"max_duplicate_{name}_characters", characters / sum(map(len, items)) > 0.2)
    for size, limit in ((2, 0.20), (3, 0.18), (4, 0.16)):
        counts = Counter(text[start : start + size] for start in range(len(text) - size + 1))
        yield from failed(f"max_top_{size}gram", max(counts.values()) / counts.total() > limit)
    for size, limit in zip(range(5, 11), (0.15, 0.14, 0.13, 0.12, 0.11, 0.10), strict=True):
        counts = Counter(text[start : start + size] for start in range(len(text) - size + 1))
        duplicates = sum(count > 1 for count in counts.values())
        yield from failed(f"max_duplicate_{size}gram", duplicates / len(counts) > limit)


def failed(reason: str, fails: bool) -> Iterable[str]:
    if fails:
        yield reason


def kind(character: str) -> str:
    if "ぁ" <= character <= "ゖ":
        return "hiragana"
    if "ァ" <= character <= "ヺ":
        return "katakana"
    if "\u3400" <= character <= "\u9fff" or "\uf900" <= character <= "\ufaff" or character in "々〇〻、，。．！？":
        return "kanji or mark"
    return "other"


if __name__ == "__main__":
    main()

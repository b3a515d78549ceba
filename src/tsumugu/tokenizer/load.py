"""A tokenizer's folder: writing it for any transformers, reading it, and encoding documents in bulk.

Bulk encoding takes the fastest engine that gives the same ids: SentencePiece for folders with a tokenizer.model,
tiktoken for byte-level BPE, `tokenizers` for everything else. How a folder comes to be is the affair of train.py,
importer.py and extend.py.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]
from tokenizers import Tokenizer, normalizers

from tsumugu.errors import UserError
from tsumugu.tokenizer import convert
from tsumugu.tokenizer.convert import NORMAL, SCORE_GRID, SPACE, UNKNOWN_PENALTY, read_model

SEAL = "sentencepiece_exact"  # the key of `seal` in tokenizer_config.json

Encode = Callable[[list[str]], Sequence[Any]]  # the ids of each text, a list or an array
_NONE = np.empty(0, np.int32)

# SentencePiece adds scores in float32. Parts of more characters than this go to `tokenizers`, which adds in float64.
_LONGEST_PART = 10_000

# Ways to cut words in byte-level BPE that tiktoken knows too: GPT-2's, Llama 3's and Qwen's. The classes in them are
# the same in both regular-expression engines for every code point (tests/tokenizer/test_bulk.py).
_GPT2_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_KNOWN_WORDS = tuple(
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"""
    + digits
    + r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
    for digits in ("{1,3}", "")
)
_LONG_BLANK = re.compile(r"\s{1000}")  # where tiktoken's regular expressions run out of stack


def save_tokenizer(tokenizer: Tokenizer, output: Path, special_tokens: Mapping[str, str], sealed: bool = False) -> None:
    """Write tokenizer.json and tokenizer_config.json into an existing folder, for any transformers from 4 on.

    Args:
        tokenizer: What to write.
        output: The folder.
        special_tokens: transformers' names and the tokens: {"bos_token": "<s>", ...}.
        sealed: Whether it is the exact conversion (`convert.to_fast`) of the tokenizer.model in that folder.
    """
    # Not tokenizer.save, whose error on a full disk is no OSError.
    (output / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    # Written by hand: transformers 5 would name the class TokenizersBackend, which 4.x does not know.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special_tokens,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": int(1e30),  # transformers' own value for "no limit"
        **({SEAL: seal(output)} if sealed else {}),
    }
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (output / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def check_new(output: Path) -> None:
    """Raises UserError where something lies in the output folder already."""
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} exists and is not empty", "choose another --output or remove it")


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder that becomes `output` when what is done in it succeeds, and is gone when it does not.

    Raises:
        UserError: Something lies in `output` already.
    """
    check_new(output)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed run
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer.json as documents are encoded: special tokens spelt in a text are text, nothing is cut off
    or padded. Raises UserError where there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no tokenizer.json", "make one with `tsumugu tokenizer train` or `import`")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{path} cannot be read: {error}") from None
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def without_specials(tokenizer: Tokenizer) -> Encode:
    """A tokenizer's ids of texts alone, special tokens spelt in them taken for text."""
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    return _by_tokenizers(plain)


class BulkEncoder:
    """Documents to ids, in bulk: what tokenizer.json gives for the text alone, from the fastest engine that is exact.

    No bos or eos is added, and special tokens spelt in a document are text, so that a document cannot inject an eos.
    Making one takes up to some seconds: make one a process.

    What is exact, by engine:

    - SentencePiece, for tokenizers that `tsumugu tokenizer train` made: the ids are those of tokenizer.json.
    - SentencePiece, for imported ones: the ids are those of the original engine, given text that is not too long. They
      are those of tokenizer.json too, but for segmentations that score the same within float32's rounding. So that ids
      do not depend on what else a document holds, it is encoded line by line, or word by word, where the engine would
      cut in any case: no piece of the vocabulary reaches across that place. Parts over 10,000 characters go to
      `tokenizers`, since float32 sums would drift on them. BPE adds up nothing, and is not cut.
    - tiktoken, for byte-level BPE whose merges give every token in one way: the ids are those of tokenizer.json.
    - `tokenizers` otherwise.

    Args:
        folder: A folder with a tokenizer.json, ours or any other.

    Raises:
        UserError: No readable tokenizer.json; when called, a text with a lone surrogate.
    """

    def __init__(self, folder: Path):
        fast = load_tokenizer(folder)
        self.engine, self._encode = "tokenizers", _by_tokenizers(fast)
        added = list(fast.get_added_tokens_decoder().values())
        ordinary = [token for token in added if not token.special]
        if any(token.normalized or token.lstrip or token.rstrip or token.single_word for token in ordinary):
            return
        found = _by_sentencepiece(fast, folder / "tokenizer.model") or _by_tiktoken(fast)
        if found is None:
            return
        self.engine, self._encode = found
        if ordinary:
            vocabulary = fast.get_vocab()
            ids = {token.content: vocabulary[token.content] for token in ordinary}
            self._encode = _around_tokens(self._encode, ids, [token.content for token in added])

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, (tokens,) int32."""
        for number, text in enumerate(texts):
            check_unicode(text, f"text {number} of this batch")
        return [np.asarray(ids, np.int32) for ids in self._encode(texts)]


def check_unicode(text: str, what: str) -> None:
    """Raises UserError, naming `what`, where a text holds a lone surrogate (`\\ud83d` without its other half)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}",
            "repair or drop it",
        ) from None


def _by_tokenizers(fast: Tokenizer) -> Encode:
    return lambda texts: [encoding.ids for encoding in fast.encode_batch_fast(texts, add_special_tokens=False)]


def _around_tokens(encode: Encode, ids: dict[str, int], added: list[str]) -> Encode:
    """Encodes what stands between the added tokens that are no special ones, and those to their ids.

    As in `tokenizers`, the longest of the added tokens that begins first is found, special ones included, which then
    stay text.
    """
    pattern = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))))

    def cut(text: str) -> list[str]:
        """Text and token in turn."""
        parts, end = [], 0
        for match in pattern.finditer(text):
            if match[0] in ids:
                parts += [text[end : match.start()], match[0]]
                end = match.end()
        return [*parts, text[end:]]

    def encode_around(texts: list[str]) -> list[list[int]]:
        parts = [cut(text) for text in texts]
        between = iter(encode([part for own in parts for part in own[::2]]))
        return [
            [id for place, part in enumerate(own) for id in ([ids[part]] if place % 2 else next(between))]
            for own in parts
        ]

    return encode_around


# SentencePiece


def _by_sentencepiece(fast: Tokenizer, path: Path) -> tuple[str, Encode] | None:
    if not path.is_file():
        return None
    model = read_model(path)
    if convert.lossless_refusal(model) is None and not convert.differing_part(fast, convert.to_lossless(model)):
        longest = _exact_length(model)
        return ("sentencepiece", _by_exact_lines(fast, model, longest)) if longest else None
    config = json.loads((path.parent / "tokenizer_config.json").read_text(encoding="utf-8"))
    if config.get(SEAL) != seal(path.parent):
        return None
    return "sentencepiece", _by_parts(fast, model)


def seal(folder: Path) -> str:
    """What tokenizer_config.json keeps of a conversion that was found exact: a hash of the SentencePiece model and of
    what cuts documents in the tokenizer made of it. Converting again, to compare, would take seconds."""
    layout = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    parts = [layout[part] for part in ("normalizer", "pre_tokenizer", "model")]
    model = (folder / "tokenizer.model").read_bytes()
    return hashlib.sha256(model + json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _exact_length(model: ModelProto) -> int:
    """The number of characters up to which SentencePiece's float32 sums are exact on this model; 0 where they never
    are, or where a line cannot be encoded without its neighbours."""
    scores = [piece.score for piece in model.pieces if piece.type == NORMAL]
    on_grid = all((score * SCORE_GRID).is_integer() for score in scores)
    with_newline = [piece.piece for piece in model.pieces if "\n" in piece.piece]
    if not on_grid or with_newline != ["\n"]:
        return 0
    return int(2**24 / SCORE_GRID / (max(map(abs, scores)) + UNKNOWN_PENALTY))


def _by_exact_lines(fast: Tokenizer, model: ModelProto, longest: int) -> Encode:
    """For models of `tsumugu tokenizer train`: as many whole lines as are exact together."""
    engine, by_tokenizers = convert.processor(model), _by_tokenizers(fast)
    lines = re.compile(rf"(?s:.{{0,{longest - 1}}})\n|[^\n]+\n?").findall  # else one line, however long
    return _joined(
        lambda text: lines(text) if len(text) > longest or not text else [text],
        lambda parts: engine.encode(parts, num_threads=1, return_type="numpy"),  # callers run a process per core
        by_tokenizers,
        lambda part: len(part) <= longest and SPACE not in part,
    )


def _by_parts(fast: Tokenizer, model: ModelProto) -> Encode:
    """For imported models: normalised by SentencePiece, cut where no piece reaches across, each part alone."""
    engine, ahead = convert.processor(model), convert.ahead_of(fast)
    if model.trainer_spec.model_type == model.trainer_spec.BPE:
        return lambda texts: engine.encode([ahead(text) for text in texts], num_threads=1, return_type="numpy")
    plain = convert.plain(model)
    unnormalised = Tokenizer.from_str(fast.to_str())
    unnormalised.normalizer = normalizers.Sequence([])  # type: ignore[assignment]
    cut = _cutter(model, ahead.newline)

    spec = model.normalizer_spec
    simple = not (spec.precompiled_charsmap or spec.remove_extra_whitespaces)
    prefix = SPACE if spec.add_dummy_prefix else ""

    def parts(text: str) -> list[str]:
        text = ahead(text)
        if simple:  # faster than asking
            return cut(prefix + text.replace(" ", SPACE)) if text else []
        return cut(engine.normalize(text))

    return _joined(
        parts,
        lambda parts: plain.encode(parts, num_threads=1, return_type="numpy"),
        without_specials(unnormalised),
        lambda part: len(part) <= _LONGEST_PART,
    )


def _cutter(model: ModelProto, newline: str | None) -> Callable[[str], list[str]]:
    """Cuts normalised text where SentencePiece cuts in any case: before a run of spaces, and around newlines.

    There are no such places where a piece reaches across them; then the text stays whole.
    """
    pieces = [piece.piece for piece in model.pieces if piece.type in (NORMAL, convert.USER_DEFINED)]
    known = set(pieces) if not model.trainer_spec.byte_fallback else None  # None: unknown characters are bytes, alone
    ends = newline or "\n"
    after = {piece[at + 1] for piece in pieces for at, char in enumerate(piece[:-1]) if char == ends[-1]}
    at_newline = not after and (known is None or ends[-1] in known)
    at_space = not any(re.search(f"[^{SPACE}]{SPACE}", piece) for piece in pieces) and (known is None or SPACE in known)
    if at_newline and len(ends) == 1:
        return re.compile(r"[^\n]*\n|[^\n]+").findall
    if at_space:
        return re.compile(f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+").findall
    return lambda text: [text] if text else []


def _joined(cut: Callable[[str], list[str]], quick: Encode, slow: Encode, is_quick: Callable[[str], bool]) -> Encode:
    """Encodes texts part by part: those that are fit for the quick engine there, the others by the slow one."""

    def encode(texts: list[str]) -> list[np.ndarray]:
        parts = [cut(text) for text in texts]
        flat = list(chain.from_iterable(parts))
        fit = [is_quick(part) for part in flat]
        if all(fit):
            ids: Iterator = iter(quick(flat))
        else:
            by_quick = iter(quick([part for part, is_fit in zip(flat, fit, strict=True) if is_fit]))
            by_slow = iter(slow([part for part, is_fit in zip(flat, fit, strict=True) if not is_fit]))
            ids = (next(by_quick if is_fit else by_slow) for is_fit in fit)
        return [np.concatenate([_NONE, *islice(ids, len(own))]) if len(own) != 1 else next(ids) for own in parts]

    return encode


# tiktoken


def _by_tiktoken(fast: Tokenizer) -> tuple[str, Encode] | None:
    layout = json.loads(fast.to_str())
    words, ranked = _words(layout["pre_tokenizer"]), _byte_ranks(layout["model"])
    normalizer = layout["normalizer"]
    if words is None or ranked is None or not (normalizer is None or normalizer == {"type": "NFC"}):
        return None
    ranks, ids = ranked
    engine = tiktoken.Encoding("bulk", pat_str=words, mergeable_ranks=ranks, special_tokens={})
    slow = _by_tokenizers(fast)
    normalise = normalizers.NFC().normalize_str if normalizer else None

    def encode(texts: list[str]) -> list:
        results = []
        for text in texts:
            if _LONG_BLANK.search(text):
                results += slow([text])
                continue
            if normalise and not text.isascii():
                text = normalise(text)
            results.append(ids[engine.encode_to_numpy(text, disallowed_special=())])
        return results

    return "tiktoken", encode


def _words(pre_tokenizer: dict | None) -> str | None:
    """The pattern of the words within which byte-level BPE merges, where tiktoken understands it alike."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    if not steps or not steps[-1] or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    if len(steps) == 1:
        return _GPT2_WORDS if steps[0]["use_regex"] else None
    if len(steps) > 2 or steps[1]["use_regex"] or steps[0]["type"] != "Split":
        return None
    pattern = steps[0]["pattern"].get("Regex")
    isolated = steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]
    return pattern if isolated and pattern in (_GPT2_WORDS, *_KNOWN_WORDS) else None


def byte_characters() -> dict[str, int]:
    """GPT-2's alphabet: the character that stands for each byte in byte-level vocabularies."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


def _byte_ranks(model: dict) -> tuple[dict[bytes, int], np.ndarray] | None:
    """tiktoken's ranks of a byte-level BPE, and the id of each rank; None where the two would not merge alike.

    tiktoken merges the neighbours whose joint has the lowest rank; `tokenizers` looks for pairs. The two agree when
    each token is made by one pair, and merging the token's own bytes by ranks below its own ends in that pair: at
    the moment tiktoken makes the token, nothing has been merged across its ends, so its inside has come about as it
    does in the token alone.
    """
    plain = model["type"] == "BPE" and not any(
        model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    )
    alphabet = byte_characters()
    if not plain or any(char not in model["vocab"] for char in alphabet):
        return None
    tokens = [bytes([byte]) for byte in range(256)]
    by_byte = {byte: char for char, byte in alphabet.items()}
    ids = [model["vocab"][by_byte[byte]] for byte in range(256)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for merge in model["merges"]:
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        pair = [bytes(alphabet[char] for char in half) for half in (left, right)]
        token = b"".join(pair)
        if token in ranks or pair != _merged(token, ranks):
            return None
        ranks[token] = len(ids)
        ids.append(model["vocab"][left + right])
    # A word that is a token of its own, without a merge, is found by ignore_merges and by nothing else.
    if model.get("ignore_merges") and len(ids) != len(
        [token for token in model["vocab"] if set(token) <= set(alphabet)]
    ):
        return None
    return ranks, np.array(ids)


def _merged(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 1:
        joints = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        lowest = min(joints)
        if lowest == len(ranks):
            break
        at = joints.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts

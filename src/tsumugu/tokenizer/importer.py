"""Importing a tokenizer exactly: a SentencePiece model, a Hugging Face folder, or one on the hub.

What is written is a folder that stock transformers reads, proven to give the ids of the original engine: SentencePiece
where there is a model of its kind, `tokenizers` on the folder's own tokenizer.json otherwise (transformers 5 would
build some tokenizers anew, with other ids). No code of the source is ever run.
"""

import json
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]
from tokenizers import AddedToken, Tokenizer, processors

from tsumugu.errors import UserError
from tsumugu.tokenizer import convert, load
from tsumugu.tokenizer.contract import CHAT_TEMPLATE, EXTENSION_FILE, GOLDEN, Contract, write_contract

_MODELS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model")
_HUB_FILES = ["tokenizer*.json", "*.model", "special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATE]
_NAMES = ("unk_token", "bos_token", "eos_token", "pad_token")

# What slow tokenizers of transformers put around a text when nothing says otherwise: (bos, eos).
_ADDED_BY_CLASS = {
    "LlamaTokenizer": (True, False),
    "CodeLlamaTokenizer": (True, False),
    "GemmaTokenizer": (True, False),
    "T5Tokenizer": (False, True),
}

# What a user may want to know whether it survives, by name.
_PROBES = {
    "newline": "あ\nい",
    "tab": "あ\tい",
    "U+3000": "あ\u3000い",
    "two spaces": "a  b",
    "full-width letters": "ＡＢＣ",
    "half-width kana": "ｶﾅ",
    "capital letters": "ABC",
    "compatibility characters": "㍿①½",
}


@dataclass(frozen=True)
class ImportReport:
    """What an import proved, and what the tokenizer does to text.

    Attributes:
        ids: Ids in all.
        engine: The original engine: sentencepiece or tokenizers.
        golden: Golden strings compared.
        strings, characters: Distinct parts of the sample compared, and their characters.
        ties: Strings cut otherwise, which score the same within float32's rounding.
        changed: What does not come back as it was: the names of the probes, with what they become.
        unknown: Characters of the sample without a piece, and how often each occurs; the most frequent first.
        byte_fallback: Whether such characters are spelt by bytes.
        newline: The contract's word on newlines.
    """

    ids: int
    engine: str
    golden: int
    strings: int
    characters: int
    ties: int
    changed: dict[str, tuple[str, str]]
    unknown: dict[str, int]
    byte_fallback: bool
    newline: str

    def lines(self) -> list[str]:
        """The report for people."""
        told = [
            f"{self.ids:,} ids; {self.golden} golden strings and {self.strings:,} parts of the sample "
            f"({self.characters:,} characters) give the ids of {self.engine}; {self.ties} segmentation ties",
            f"newline: {self.newline}",
        ]
        told += [f"{name}: {before!r} comes back as {after!r}" for name, (before, after) in self.changed.items()]
        if self.unknown:
            most = ", ".join(f"{char} (U+{ord(char):04X}) {count:,}" for char, count in list(self.unknown.items())[:20])
            what = "become bytes" if self.byte_fallback else "are unknown"
            told.append(f"{len(self.unknown)} different characters of the sample {what}, most often {most}")
        return told


@dataclass
class _Source:
    """What a source holds of a tokenizer."""

    name: str
    model: ModelProto | None
    model_file: Path | None
    tokenizer_file: Path | None = None
    named: dict[str, Any] = field(default_factory=dict)  # tokenizer_config.json over special_tokens_map.json
    added: dict[str, dict] = field(default_factory=dict)  # further tokens with id and whether special
    chat_template: str | None = None


def import_tokenizer(source: str, output: Path, sample: Iterable[str] = (), newline: str = "keep") -> ImportReport:
    """Writes the folder of an imported tokenizer, whole or not at all.

    Args:
        source: A SentencePiece `.model` file, a Hugging Face folder, or a name on the hub.
        output: The folder to make; must be absent or empty.
        sample: Documents to compare on, besides the golden strings; all of them are read.
        newline: `keep` what the tokenizer does with newlines, `refuse` one that cannot express them, or a token, such
            as `<NL>`, that stands for them in both directions.

    Raises:
        UserError: The tokenizer cannot be converted exactly, or cannot express a newline that was asked for.
    """
    token = None if newline in ("keep", "refuse") else newline
    with load.new_folder(output) as partial:
        found = _read_source(source)
        contract = _write(found, partial, token)
        if newline == "refuse" and contract.newline == "lost":
            raise UserError(
                f"{found.name} cannot express a newline", "map it to a token with --newline, or take --newline keep"
            )
        return _prove(found, partial, contract, list(sample), token)


def _read_source(source: str) -> _Source:
    if not source.strip():
        raise UserError("SOURCE is empty", "name a SentencePiece .model file, a Hugging Face folder, or a hub name")
    path = Path(source)
    if path.is_file():
        return _Source(source, convert.read_model(path), path)
    folder = path if path.is_dir() else _download(source)
    model_file = next((folder / name for name in _MODELS if (folder / name).is_file()), None)
    tokenizer_file = folder / "tokenizer.json" if (folder / "tokenizer.json").is_file() else None
    if model_file is None and tokenizer_file is None:
        raise UserError(
            f"{source} holds no tokenizer.json and no {_MODELS[0]}", "name a folder that transformers' tokenizers read"
        )
    found = _Source(source, convert.read_model(model_file) if model_file else None, model_file, tokenizer_file)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found.named |= _read_json(folder / name)
    found.named = {name: value for name, value in found.named.items() if value is not None}
    if load.SEAL in found.named or (folder / EXTENSION_FILE).is_file():
        raise UserError(
            f"{source} is imported or extended already", "use it as it is, or import its source with other options"
        )
    if (folder / "added_tokens.json").is_file():
        added = _read_json(folder / "added_tokens.json")
        found.added |= {token: {"id": id, "special": False} for token, id in added.items()}
    for id, token in found.named.get("added_tokens_decoder", {}).items():
        found.added[token["content"]] = {**token, "id": int(id)}
    if tokenizer_file:
        layout = _read_json(tokenizer_file)
        try:
            Tokenizer.from_file(str(tokenizer_file))
        except Exception as error:  # tokenizers raises bare Exception
            reason = " ".join(str(error).split())
            raise UserError(f"{source}: its tokenizer.json cannot be read: {reason}", "copy it anew") from None
        found.added |= {token["content"]: token for token in layout.get("added_tokens", [])}
    if (folder / CHAT_TEMPLATE).is_file():
        found.chat_template = (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
    elif isinstance(template := found.named.get("chat_template"), str):
        found.chat_template = template
    return found


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}", "copy it anew") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object", "copy it anew")
    return content


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    nowhere = f"{name}: no such file or folder"
    if name.startswith((".", "/", "~")) or name.endswith((".model", ".json")):
        raise UserError(nowhere, "check the path")
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except HFValidationError:
        raise UserError(f"{nowhere}, and no name on the hub can be so", "check it") from None
    except LocalEntryNotFoundError:
        raise UserError(
            f"{nowhere}, and the hub cannot be reached (no network, or HF_HUB_OFFLINE is set)",
            "go online, or copy the tokenizer's files here and name their folder",
        ) from None
    except Exception as error:  # of many kinds, by what is wrong
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{nowhere}, nor on the hub: {reason}", "check the name") from None


def _write(found: _Source, folder: Path, newline: str | None) -> Contract:
    names = {name: _content(found.named[name]) for name in _NAMES if name in found.named}
    sealed = False
    if found.model is None:
        assert found.tokenizer_file is not None
        if newline is not None:
            raise UserError(
                f"{found.name} is no SentencePiece model: its newlines are not mapped",
                "import its .model file, or use --newline keep",
            )
        shutil.copyfile(found.tokenizer_file, folder / "tokenizer.json")
        tokenizer = Tokenizer.from_str(load.load_tokenizer(folder).to_str())
    elif _is_ours(found):
        assert found.tokenizer_file is not None
        assert found.model_file is not None
        tokenizer = Tokenizer.from_file(str(found.tokenizer_file))
        shutil.copyfile(found.model_file, folder / "tokenizer.model")
        if newline is not None:
            raise UserError(f"{found.name} expresses newlines by itself", "use --newline keep")
    else:
        assert found.model_file is not None
        tokenizer = convert.to_fast(found.model, found.name, _ahead(found, newline))
        shutil.copyfile(found.model_file, folder / "tokenizer.model")
        _add_tokens(tokenizer, found)
        names = {name: token for name, token in names.items() if tokenizer.token_to_id(token) is not None}
        names = convert.special_tokens(found.model) | names
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in names.values()])
        _add_around(tokenizer, found, names)
        sealed = True
        if newline is not None:
            _check_newline(tokenizer, found.name, newline)
    load.save_tokenizer(tokenizer, folder, names, sealed)
    if found.model is None:  # exactly as it was, padding and truncation too
        assert found.tokenizer_file is not None
        shutil.copyfile(found.tokenizer_file, folder / "tokenizer.json")
    if found.chat_template:
        (folder / CHAT_TEMPLATE).write_text(found.chat_template, encoding="utf-8")
    return write_contract(folder)


def _ahead(found: _Source, newline: str | None) -> convert.Ahead:
    return convert.Ahead(bool(found.named.get("do_lower_case")), newline)


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


def _is_ours(found: _Source) -> bool:
    """Whether `tsumugu tokenizer train` made it, which holds more than SentencePiece does."""
    if found.tokenizer_file is None or found.model is None or convert.lossless_refusal(found.model):
        return False
    made = Tokenizer.from_file(str(found.tokenizer_file))
    return convert.differing_part(made, convert.to_lossless(found.model)) is None


def _add_tokens(tokenizer: Tokenizer, found: _Source) -> None:
    """The source's further tokens, at their ids."""
    for content, token in sorted(found.added.items(), key=lambda item: item[1]["id"]):
        made = AddedToken(
            content,
            special=bool(token.get("special")),
            normalized=False,
            lstrip=bool(token.get("lstrip")),
            rstrip=bool(token.get("rstrip")),
        )
        (tokenizer.add_special_tokens if made.special else tokenizer.add_tokens)([made])
        if (id := tokenizer.token_to_id(content)) != token["id"]:
            raise UserError(
                f"{found.name}: the added token {content!r} has id {token['id']}, which here would be {id}",
                "its tokenizer.json and its model do not belong together",
            )


def _add_around(tokenizer: Tokenizer, found: _Source, names: dict[str, str]) -> None:
    """What is put around a text by default: as tokenizer.json says, else the configuration, else its class."""
    by_class = _ADDED_BY_CLASS.get(found.named.get("tokenizer_class", "").removesuffix("Fast"), (False, False))
    adds_bos = found.named.get("add_bos_token", by_class[0])
    adds_eos = found.named.get("add_eos_token", by_class[1])
    if found.tokenizer_file:
        original = Tokenizer.from_file(str(found.tokenizer_file))
        plain, around = (original.encode("あ", add_special_tokens=add).tokens for add in (False, True))
        adds_bos, adds_eos = around[:1] == [names.get("bos_token")], around[-1:] == [names.get("eos_token")]
        if len(around) != len(plain) + adds_bos + adds_eos:
            raise UserError(f"{found.name} puts more around a text than bos and eos: {around}", "import its model file")
    before = [names["bos_token"]] if adds_bos and "bos_token" in names else []
    after = [names["eos_token"]] if adds_eos and "eos_token" in names else []
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=[*before, "$A", *after],
            pair=[
                *before,
                "$A",
                *after,
                *(f"{token}:1" for token in before),
                "$B:1",
                *(f"{token}:1" for token in after),
            ],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*before, *after}],
        )


def _check_newline(tokenizer: Tokenizer, name: str, token: str) -> None:
    text = "あ\nい\n\nう"
    encoding = tokenizer.encode(text, add_special_tokens=False)
    back = tokenizer.decode(encoding.ids, skip_special_tokens=True)
    spelt = tokenizer.encode(token, add_special_tokens=False).tokens
    if back.replace("あ", "").replace("い", "").replace("う", "") != "\n\n\n":
        raise UserError(
            f"{name} cannot spell {token!r}, which newlines were to become: it makes {spelt} of it",
            "name a token of its vocabulary, or one that its pieces can spell, such as '<nl>'",
        )


def _prove(found: _Source, folder: Path, contract: Contract, sample: list[str], newline: str | None) -> ImportReport:
    from transformers import AutoTokenizer

    served = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    parts = [part for text in sample for part in _parts(text)]
    by_sentencepiece = found.model is not None and not _is_ours(found)
    compare = _compare_with_sentencepiece if by_sentencepiece else _compare_with_tokenizers
    golden = compare(found, folder, served, list(GOLDEN), newline)
    proven = compare(found, folder, served, parts, newline)
    _check_around(served, contract)
    document = load.load_tokenizer(folder)
    back = {
        name: document.decode(document.encode(text, add_special_tokens=False).ids) for name, text in _PROBES.items()
    }
    return ImportReport(
        ids=contract.vocab_size,
        engine="sentencepiece" if by_sentencepiece else "tokenizers",
        golden=golden.strings,
        strings=proven.strings,
        characters=proven.characters,
        ties=golden.ties + proven.ties,
        changed={name: (text, back[name]) for name, text in _PROBES.items() if back[name] != text},
        unknown=_unknown(document, contract, sample),
        byte_fallback=document.token_to_id("<0x41>") is not None,
        newline=contract.newline,
    )


def _compare_with_sentencepiece(
    found: _Source, folder: Path, served: Any, texts: list[str], newline: str | None
) -> convert.Comparison:
    """As a server encodes them, but for texts that spell an added token: a special one, which is text to the original
    engine, is taken for text here too, and what spells one of the source's ordinary ones is left out."""
    assert found.model is not None
    document, ahead = load.load_tokenizer(folder), _ahead(found, newline)
    special = [token.content for token in document.get_added_tokens_decoder().values()]
    ordinary = [token for token, entry in found.added.items() if not entry.get("special")]
    # The original engine is given what is done ahead of it.
    given = {ahead(text): text for text in texts if not any(token in text for token in ordinary)}

    def encode(made: list[str]) -> list[list[int]]:
        ids = served([given[text] for text in made], add_special_tokens=False).input_ids
        for place, text in enumerate(made):
            if any(token in given[text] for token in special):
                ids[place] = document.encode(given[text], add_special_tokens=False).ids
        return ids

    return convert.compare(found.model, encode, list(given), found.name)


def _compare_with_tokenizers(
    found: _Source, _folder: Path, served: Any, texts: list[str], _newline: str | None
) -> convert.Comparison:
    """As a server encodes them, with and without what is put around a text."""
    original = Tokenizer.from_file(str(found.tokenizer_file))
    original.no_truncation()
    original.no_padding()
    for add in (False, True):
        for start in range(0, len(texts), 1000):
            batch = texts[start : start + 1000]
            theirs = [encoding.ids for encoding in original.encode_batch(batch, add_special_tokens=add)]
            ours = served(batch, add_special_tokens=add).input_ids
            for text, own, made in zip(batch, theirs, ours, strict=True):
                if own != made:
                    raise UserError(
                        f"{found.name}: transformers gives {made[:40]} for {text[:200]!r}, its own tokenizer.json "
                        f"{own[:40]}",
                        "it is not a tokenizer that transformers loads as it is",
                    )
    return convert.Comparison(len(texts), sum(map(len, texts)), 0)


def _check_around(served: Any, contract: Contract) -> None:
    """By default a server puts the contract's bos and eos around a text, and nothing else."""
    for text in ("日本語", "a"):
        ids = served(text, add_special_tokens=False).input_ids
        before = [contract.bos_id] if contract.adds_bos else []
        after = [contract.eos_id] if contract.adds_eos else []
        if served(text).input_ids != [*before, *ids, *after]:
            raise UserError(
                f"the tokenizer makes {served(text).input_ids} of {text!r}: more than bos, {ids} and eos",
                "a causal language model's tokenizer is needed",
            )


def _parts(text: str) -> Iterator[str]:
    """A document in runs of lines of some 2,000 characters: short enough for float32 sums to be exact but for ties."""
    part = ""
    for line in text.splitlines(keepends=True):
        if part and len(part) + len(line) > 2000:
            yield part
            part = ""
        part += line
    if part:
        yield part


def _unknown(tokenizer: Tokenizer, contract: Contract, sample: list[str]) -> dict[str, int]:
    """The characters of the sample that have no piece: those that alone are unknown, or fall to bytes."""
    counts = Counter(char for text in sample for char in text)
    found: Counter[str] = Counter()
    for char, count in counts.items():
        if unicodedata.category(char) in ("Cc", "Zs"):
            continue
        tokens = tokenizer.encode(f"あ{char}", add_special_tokens=False)
        if contract.unk_id in tokens.ids or any(convert.BYTE_PIECE.fullmatch(token) for token in tokens.tokens):
            found[char] = count
    return dict(found.most_common())

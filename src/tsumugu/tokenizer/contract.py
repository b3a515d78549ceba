"""The contract: what every later stage may rely on about a tokenizer, as one JSON file beside it.

A fingerprint says whether two folders give the same ids; golden strings prove it on the machine at hand; the UTF-8
length of each token turns losses into bits per byte. Reading a contract needs no tokenizer library.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tsumugu.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VERSION = 1
_FILE = "contract.json"
_SEAL = "tokenizer_json_sha256"
EXTENSION_FILE = "extension.json"  # of extend.py
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *(CHAT_TEMPLATE, EXTENSION_FILE, _FILE),
)

# What tokenizers of Japanese get wrong: width, compatibility and old forms, combining marks, spaces, unknowns.
GOLDEN: tuple[str, ...] = (
    "",
    "日本語の文章を、そのまま元に戻せること。",
    "ＡＢＣ　ａｂｃ　１２３！？（全角）",
    "ﾊﾝｶｸｶﾅ ｶﾞｷﾞｸﾞ",
    "舊字體の學校と國語、龍と竜、髙橋と高橋、葛\U000e0100城",
    "👨‍👩‍👧‍👦と👩🏽‍🚀、🇯🇵、❤️",
    "　全角空白で始まる",
    "\tタブ\tと  二つの空白   三つ ",
    " ",
    "一行目\n二行目\n\n四行目\r\n",
    "㍿ ½ ① ㌔ ㈱ ﬁ Ⅳ",
    "\U00020b9fる\U0002000b 𠮷野家 \u0b85\u1200\u16a0\ue000",
    "ラーメンーーー〜～ーと長ーい",
    "2024年12月31日 3.14159 1,234,567円",
    "Hello, world! The naïve café in Tōkyō.",
    "か\u3099 が ハ\u309a パ",
    "空白の記号\u2581そのもの",
    "<0x41><reserved_0>&lt;s&gt;",
    "def f(x):\n    return x  # 注釈\n",
    "\0\x01\x7f\u200b\ufeff\u2028\ufffd",
)


@dataclass(frozen=True)
class Contract:
    """A tokenizer as later stages see it.

    Attributes:
        version: Of the file's layout.
        fingerprint: sha256 over what defines ids: the vocabulary, the special ids and the golden ids.
        vocab_size: One more than the highest id.
        unk_id, bos_id, eos_id, pad_id: None where the tokenizer has no such token.
        adds_bos, adds_eos: Whether the tokenizer itself adds them when called as transformers does by default.
        newline: Whether a newline survives encoding and decoding; "mapped" where the tokenizer itself spells it by a
            token such as `<NL>` (then CR LF comes back as LF, and a literal `<NL>` as a newline).
        golden: Texts with their ids, special tokens not added.
        token_bytes: UTF-8 bytes of text that each id stands for; 0 for special and reserved ones, 1 for byte pieces.
            Over a text they add up to its length, for byte-level BPE and for what `tsumugu tokenizer train` makes.
            Imported tokenizers count what they make of the text: the space they put in front (one byte a text), and
            characters after normalisation; unknown characters count 0, a mapped newline as its token, unless that is
            one piece.
    """

    version: int
    fingerprint: str
    vocab_size: int
    unk_id: int | None
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    adds_bos: bool
    adds_eos: bool
    newline: Literal["expressible", "mapped", "lost"]
    golden: tuple[tuple[str, tuple[int, ...]], ...]
    token_bytes: tuple[int, ...]


def write_contract(folder: Path) -> Contract:
    """Describe the tokenizer.json of a folder, and its special tokens, in contract.json.

    Raises:
        UserError: No readable tokenizer.json.
    """
    contract = _describe(folder, GOLDEN)
    content = asdict(contract)
    content["golden"] = [{"text": text, "ids": ids} for text, ids in contract.golden]
    content[_SEAL] = _tokenizer_hash(folder)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in content.items())
    (folder / _FILE).write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    return contract


def read_contract(folder: Path) -> Contract:
    """The contract of a tokenizer's folder, from its JSON alone, unless tokenizer.json is not the file that it was
    written for: then that is proven to keep it, as by `check_contract`.

    Raises:
        UserError: There is none, it is not of this version, or the tokenizer does not keep it.
    """
    contract, seal = _read(folder)
    if seal is not None and (folder / "tokenizer.json").is_file() and _tokenizer_hash(folder) != seal:
        return check_contract(folder)
    return contract


def _tokenizer_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def _read(folder: Path) -> tuple[Contract, str | None]:
    """The contract as it is written, and the sha256 of the tokenizer.json that it was written for."""
    path = folder / _FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} holds no {_FILE}", "make the tokenizer with `tsumugu tokenizer`") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}", "make the tokenizer again") from None
    if isinstance(content, dict) and content.get("version") != VERSION:
        raise UserError(f"{path} is of version {content.get('version')}, not {VERSION}", "make the tokenizer again")
    try:
        seal = content.pop(_SEAL, None)
        content["golden"] = tuple((pair["text"], tuple(pair["ids"])) for pair in content["golden"])
        content["token_bytes"] = tuple(content["token_bytes"])
        return Contract(**content), seal
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: it lacks parts of a contract", "make the tokenizer again") from None


def check_contract(folder: Path) -> Contract:
    """The contract of a folder, after proving that the tokenizer beside it keeps it.

    Raises:
        UserError: The first difference: a golden string that encodes differently, or a field.
    """
    contract, _ = _read(folder)
    found = _describe(folder, [text for text, _ in contract.golden])
    broken, hint = f"{folder}: the tokenizer does not keep its contract", "the files were changed; make it again"
    for (text, ids), (_, ids_found) in zip(contract.golden, found.golden, strict=True):
        if ids != ids_found:
            raise UserError(f"{broken}: {text!r} gives {list(ids_found)}, not {list(ids)}", hint)
    for field in fields(Contract):
        if getattr(contract, field.name) != getattr(found, field.name):
            raise UserError(f"{broken}: {field.name} differs", hint)
    return contract


def new_rows(folder: Path, base: Contract) -> list[tuple[int, list[int]]] | None:
    """The ids that `tsumugu tokenizer extend` has appended to a tokenizer, and the earlier ids that each stands for.

    Args:
        folder: Of the extended tokenizer.
        base: The contract of the tokenizer that it may be an extension of, at one remove or several.

    Returns:
        In the order of ids, each with ids below its own; [] for the mean of all ids of the base. None where `folder` is
        no extension of `base`.
    """
    path = folder / EXTENSION_FILE
    if not path.is_file():
        return None
    extension = read_extension(path)
    if base.fingerprint not in [earlier["fingerprint"] for earlier in extension["bases"]]:
        return None
    return [(row["id"], row["pieces"]) for row in extension["rows"] if row["id"] >= base.vocab_size]


def read_extension(path: Path) -> dict:
    """An extension.json: `bases` (tokenizers that were extended) and `rows` (new ids with the earlier ids of each)."""
    try:
        extension = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(extension[key], list) for key in ("bases", "rows")):
            return extension
    except (ValueError, TypeError, KeyError):
        pass
    raise UserError(f"{path} is damaged", "extend the tokenizer again")


def copy_tokenizer(source: Path, output: Path) -> None:
    """Copies a tokenizer, its chat template and its contract, and nothing else, such as the weights of a model.

    The template is no part of the fingerprint: it changes no id."""
    output.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, output / name)


def _describe(folder: Path, golden_texts: Iterable[str]) -> Contract:
    # here, so that reading a contract needs no tokenizer library
    from tsumugu.tokenizer.convert import ahead_of
    from tsumugu.tokenizer.load import load_tokenizer

    tokenizer = load_tokenizer(folder)
    special = {name: tokenizer.token_to_id(token) for name, token in special_tokens(folder).items()}
    unk, bos, eos, pad = (special.get(f"{name}_token") for name in ("unk", "bos", "eos", "pad"))
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    tokens = [""] * (max(vocabulary.values()) + 1)
    for token, id in vocabulary.items():
        tokens[id] = token
    golden = tuple((text, tuple(tokenizer.encode(text, add_special_tokens=False).ids)) for text in golden_texts)
    defining = {"vocabulary": tokens, "special": [unk, bos, eos, pad], "golden": golden}
    plain, default = tokenizer.encode("あ", add_special_tokens=False).ids, tokenizer.encode("あ").ids
    mapped = ahead_of(tokenizer).newline is not None
    newline = "\n" in tokenizer.decode(tokenizer.encode("あ\nい", add_special_tokens=False).ids)
    return Contract(
        version=VERSION,
        fingerprint=hashlib.sha256(json.dumps(defining).encode()).hexdigest(),
        vocab_size=len(tokens),
        unk_id=unk,
        bos_id=bos,
        eos_id=eos,
        pad_id=pad,
        adds_bos=bos is not None and default[:1] == [bos] != plain[:1],
        adds_eos=eos is not None and default[-1:] == [eos] != plain[-1:],
        newline="lost" if not newline else "mapped" if mapped else "expressible",
        golden=golden,
        token_bytes=tuple(_token_bytes(tokenizer, tokens)),
    )


def special_tokens(folder: Path) -> dict[str, str]:
    """{"bos_token": "<s>", ...} as transformers reads them: tokenizer_config.json over special_tokens_map.json."""
    named: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            named |= json.loads((folder / file).read_text(encoding="utf-8"))
    tokens = {name: named.get(name) for name in ("unk_token", "bos_token", "eos_token", "pad_token")}
    contents = {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items()}
    return {name: token for name, token in contents.items() if token is not None}


def read_chat_template(folder: Path) -> str | None:
    """The chat template of a tokenizer, as transformers reads it: of a file of its own, or of tokenizer_config.json."""
    file, config = folder / CHAT_TEMPLATE, folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    jinja = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    return jinja if isinstance(jinja, str) else None


def marks_replies(chat_template: str) -> bool:
    """Whether a chat template has generation markers."""
    return bool(re.search(r"\{%-?\s*generation\s*-?%\}", chat_template))


def _token_bytes(tokenizer: "Tokenizer", tokens: list[str]) -> list[int]:
    from tsumugu.tokenizer.convert import BYTE_PIECE, NEVER, SPACE, ahead_of

    layout = json.loads(tokenizer.to_str())
    added = {token["id"]: token for token in layout["added_tokens"]}
    decoder = json.dumps(layout["decoder"], ensure_ascii=False)
    byte_level, byte_fallback = '"ByteLevel"' in decoder, '"ByteFallback"' in decoder
    newline = ahead_of(tokenizer).newline
    scores = [score for _, score in layout["model"]["vocab"]] if layout["model"]["type"] == "Unigram" else []

    def length(id: int, token: str) -> int:
        if id in added:
            return 0 if added[id]["special"] else len(token.encode())
        if byte_fallback and BYTE_PIECE.fullmatch(token):
            return 1
        if scores and scores[id] == NEVER:
            return 0
        if token == newline:
            return 1
        if byte_level:  # one character of its alphabet a byte
            return len(token)
        return len(token.replace(SPACE, " ").encode() if SPACE in decoder else token.encode())

    return [length(id, token) for id, token in enumerate(tokens)]

"""SentencePiece's normalisation as a chain of `tokenizers` normalisers that gives the same text, or a refusal.

SentencePiece replaces, from left to right, the longest entry of its character map (`precompiled_charsmap`), and looks
at nothing else. `tokenizers` has a normaliser for such a map, `Precompiled`, which is not equal to it: it works on
grapheme clusters, takes the first entry that fits instead of the longest, and then forgets the rest of the cluster
(か + U+3099 stays in two, ª + U+0301 loses its accent). The chain built here uses `Precompiled` for single characters
only, and NFC to compose where an entry of several characters would have:

1. two characters that the map turns into spaces become spaces at once, and so are free to serve as marks; the few
   entries whose value composing does not give are replaced one by one;
2. the first mark is set in front of every combining character that no entry composes with what precedes it;
3. the second mark is set behind every mapped character that could form a cluster with what follows;
4. `Precompiled` maps each character alone; the second mark goes;
5. NFC composes, but not across the first mark; the first mark goes. A combining character that alone becomes something
   else (case folding turns the Greek iota subscript into an iota) composes as it is: step 4 leaves it, and here those
   that belong to no entry, which stand behind a first mark or begin the text, become what they become alone;
6. spaces are trimmed and collapsed, one is put in front, and all become U+2581, as the model says.

This is right when composing changes no single character and no value, and entries do not overlap: this is checked for
every entry and every code point, and a map for which it does not hold is refused. It holds for all of SentencePiece's
own rules.
"""

import functools
import re
import struct
import sys
import unicodedata
from collections.abc import Iterable

import numpy as np
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]
from tokenizers import Regex, normalizers

SPACE = "\u2581"

_HAS_LEAF = 1 << 8
# Printable ASCII, kana, common kanji and full-width letters: none of them joins a cluster.
_PLAIN = r" -~\x{3041}-\x{3096}\x{30a1}-\x{30ff}\x{4e00}-\x{9fff}\x{ff01}-\x{ff9d}"


@functools.cache
def read_charsmap(blob: bytes) -> dict[str, str]:
    """The entries of a `precompiled_charsmap`: four bytes of length, a Darts-clone double array, and its values."""
    if not blob:
        return {}
    units, values = _units(blob)
    labels = np.array(units, np.int64) & 0x800000FF
    children: dict[int, list[int]] = {}
    for child in np.flatnonzero((labels > 0) & (labels < 256)).tolist():
        children.setdefault(child ^ (units[child] & 0xFF), []).append(child)
    entries: dict[str, str] = {}
    waiting = [(0, b"")]
    while waiting:
        position, key = waiting.pop()
        base = position ^ _offset(units[position])
        if units[position] & _HAS_LEAF:
            start = units[base] & 0x7FFFFFFF
            entries[key.decode()] = values[start : values.index(b"\0", start)].decode()
        waiting += [(child, key + bytes([units[child] & 0xFF])) for child in children.get(base, ())]
    return entries


def _units(blob: bytes) -> tuple[list[int], bytes]:
    size = struct.unpack_from("<I", blob)[0]
    return list(struct.unpack_from(f"<{size // 4}I", blob, 4)), blob[4 + size :]


def _offset(unit: int) -> int:
    return (unit >> 10) << ((unit & 1 << 9) >> 6)


def _without(blob: bytes, keys: Iterable[str]) -> bytes:
    """The map without some of its entries."""
    units, values = _units(blob)
    for key in keys:
        position = 0
        for byte in key.encode():
            position ^= _offset(units[position]) ^ byte
        units[position] &= ~_HAS_LEAF
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + values


def user_defined(model: ModelProto) -> list[str]:
    """The user-defined pieces, which SentencePiece never normalises; longest first, as it looks for them."""
    pieces = [piece.piece for piece in model.pieces if piece.type == 4]
    return sorted(pieces, key=len, reverse=True)


def refusal(model: ModelProto) -> str | None:
    """Why no chain is equal to this model's normalisation; None where one is."""
    spec, trainer = model.normalizer_spec, model.trainer_spec
    if model.denormalizer_spec.precompiled_charsmap:
        return "it changes text when decoding (denormalizer_spec)"
    if not spec.escape_whitespaces:
        return "it keeps spaces as they are (escape_whitespaces is off)"
    if trainer.treat_whitespace_as_suffix:
        return "it takes a space as the end of a word (treat_whitespace_as_suffix)"
    own = user_defined(model)
    if spec.remove_extra_whitespaces and (spaced := [piece for piece in own if SPACE in piece or " " in piece]):
        return f"the user-defined piece {spaced[0]!r} holds a space, and the model removes spaces"
    entries = read_charsmap(spec.precompiled_charsmap)
    if not entries:
        return None
    single, multiple = _by_length(entries, own)
    composed, spelt = _by_composition(spec.precompiled_charsmap, tuple(own))
    firsts, rest = _first_and_rest(multiple)
    rule = f"its normalisation {spec.name!r}"
    if overlap := set.intersection(*_first_and_rest(composed)):
        return f"{rule} has entries that overlap at {min(overlap)!r}"
    if cut := _cut(composed, spelt):
        return f"{rule} has entries that overlap at {cut!r}"
    for key, value in spelt.items():
        if any(char in single or char in firsts | rest for char in value) or len({*spelt.values()}) > 30:
            return f"{rule} turns {key!r} into {value!r}, which composing does not"
    changed = _changed_by_composing()
    for char in {*single, *changed} if multiple else single:
        value = single.get(char, char)
        if multiple and (value in changed or (len(value) > 1 and normalizers.NFC().normalize_str(value) != value)):
            return f"{rule} turns {char!r} into {value!r}, which composing would change"
        if "  " in value:
            return f"{rule} turns {char!r} into {value!r}, which holds two spaces"
    for piece in own:
        # One character can be taken out of the map; several must be free of it.
        if len(piece) > 1 and (char := next((char for char in piece if char in single or char in rest), None)):
            return f"the user-defined piece {piece!r} holds {char!r}, which {rule} changes"
        if len(piece) == 1 and piece in rest:
            return f"the user-defined piece {piece!r} is part of what {rule} composes"
    if _marks(single, firsts | rest) is None:
        return f"{rule} leaves no two characters to serve as marks"
    return None


def _by_length(entries: dict[str, str], own: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Entries of one character, without the user-defined ones, and entries of several."""
    single = {key: value for key, value in entries.items() if len(key) == 1 and key not in own}
    return single, {key: value for key, value in entries.items() if len(key) > 1}


@functools.cache
def _by_composition(blob: bytes, own: tuple[str, ...]) -> tuple[dict[str, str], dict[str, str]]:
    """Of the entries of several characters, those that mapping each and composing gives, and the others.

    The others are scripts that Unicode has gained since the `tokenizers` at hand was made, and rules of one's own.
    """
    single, multiple = _by_length(read_charsmap(blob), own)
    alone = _alone(single, multiple)
    single = {char: value for char, value in single.items() if char not in alone}
    compose = normalizers.NFC().normalize_str
    # all at once, each on a line of its own
    made = compose("\n".join("".join(single.get(char, char) for char in key) for key in multiple)).split("\n")
    if len(made) != len(multiple):  # a value with a newline in it
        made = [compose("".join(single.get(char, char) for char in key)) for key in multiple]
    by_alike: dict[bool, dict[str, str]] = {True: {}, False: {}}
    for (key, value), composed in zip(multiple.items(), made, strict=True):
        by_alike[composed == value][key] = value
    return by_alike[True], by_alike[False]


def _alone(single: dict[str, str], multiple: dict[str, str]) -> dict[str, str]:
    """The combining characters of entries that become something other than a combining character where alone."""
    _, rest = _first_and_rest(multiple)
    made = set("".join(single.values()))
    return {
        char: single[char]
        for char in sorted(rest & single.keys() - made)
        if unicodedata.combining(char) and not any(map(unicodedata.combining, single[char][:1]))
    }


def _cut(composed: Iterable[str], spelt: dict[str, str]) -> str | None:
    """An entry in which one that is replaced before it would be found."""
    family, begins = set("".join(spelt)), {key[0] for key in spelt}
    longer = (key for key in composed if not family.issuperset(key))
    return next((key for key in longer if not begins.isdisjoint(key[1:]) or key.startswith(tuple(spelt))), None)


def _first_and_rest(keys: Iterable[str]) -> tuple[set[str], set[str]]:
    """What begins a key, and what stands elsewhere in one."""
    return {key[0] for key in keys}, {char for key in keys for char in key[1:]}


@functools.cache
def _changed_by_composing() -> set[str]:
    """The characters that NFC changes."""
    characters = [chr(code) for code in (*range(0xD800), *range(0xE000, sys.maxunicode + 1)) if chr(code) != "\n"]
    composed = normalizers.NFC().normalize_str("\n".join(characters)).split("\n")
    return {char for char, made in zip(characters, composed, strict=True) if char != made}


def _marks(single: dict[str, str], composing: set[str]) -> list[str] | None:
    """Two characters that become a space and nothing else: rare ones first."""
    preferred = "\u205f\u202f\u1680\u2028\u2029\u2008\u2006\u2005\u2004\u00a0\u3000"
    free = [char for char in preferred if single.get(char) == " " and char not in composing and " " not in single]
    return free[:2] if len(free) > 1 else None


def chain(model: ModelProto, before: list[normalizers.Normalizer]) -> normalizers.Normalizer | None:
    """The normaliser equal to SentencePiece's, for a model that is not refused.

    Args:
        model: Parsed SentencePiece model.
        before: Normalisers to run ahead of it.
    """
    spec = model.normalizer_spec
    steps = [*before]
    if spec.add_dummy_prefix and not spec.remove_extra_whitespaces:
        steps.append(normalizers.Prepend(SPACE))  # here, since a text of characters that go altogether keeps it
    steps += _mapping(spec.precompiled_charsmap, tuple(user_defined(model)))
    if spec.remove_extra_whitespaces:
        # Before the end SentencePiece also trims a U+2581 that was in the text. Not Strip, which takes every kind.
        steps.append(normalizers.Replace(Regex(r"\A +|[ \x{2581}]+\z|(?<= ) +"), ""))
        if spec.add_dummy_prefix:
            steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


@functools.cache
def _mapping(blob: bytes, own: tuple[str, ...]) -> list[normalizers.Normalizer]:
    entries = read_charsmap(blob)
    if not entries:
        return []
    single, multiple = _by_length(entries, own)
    composed, spelt = _by_composition(blob, own)
    firsts, rest = _first_and_rest(multiple)
    marks = _marks(single, firsts | rest)
    assert marks is not None
    first, second = marks
    alone = _alone(single, multiple)
    kept = [piece for piece in own if len(piece) == 1 and piece in entries]
    mapped = (set(single) | firsts) - set(marks)
    steps = [
        normalizers.Replace(Regex(f"[{first}{second}]"), " "),
        normalizers.Replace(Regex(f"(?<=[{_set(mapped)}])(?=[^{_PLAIN}])"), second),
        normalizers.Precompiled(_without(blob, [*kept, *marks, *alone])),
        normalizers.Replace(second, ""),
    ]
    if multiple:
        family = set("".join(spelt))
        within = [key for key in multiple if family.issuperset(key)]
        by_value = sorted({value: [key for key in spelt if spelt[key] == value] for value in spelt.values()}.items())
        steps[1:1] = [
            *(normalizers.Replace(Regex(_exactly(keys, within, family)), value) for value, keys in by_value),
            normalizers.Replace(Regex(_uncomposed(composed, own)), first),
        ]
        becoming = (normalizers.Replace(Regex(f"(?:\\A|{first}){char}"), value) for char, value in alone.items())
        steps += [normalizers.NFC(), *becoming, normalizers.Replace(first, "")]
    return steps


def _uncomposed(multiple: dict[str, str], own: Iterable[str]) -> str:
    """A pattern of the places between an entry, or a character, and a combining character that does not belong to it.

    Entries are matched as SentencePiece does, user-defined pieces before them. Since what begins an entry stands
    within none, every character that does is the start of a match; of the others, those that may stand within an entry
    are looked at where a match has ended (\\G) only.
    """
    firsts, rest = _first_and_rest(multiple)
    combining = f"[{_set(rest)}\\p{{M}}]"
    starts = _set(firsts | {piece[0] for piece in own})
    matched = "|".join([*map(re.escape, own), _prefix_tree(multiple), f"[{starts}]"])
    return (
        f"(?>{matched})\\K(?={combining})"
        f"|[^{starts}{_set(rest)}\\p{{M}}]\\K(?={combining})"
        f"|\\G(?![{starts}]){combining}\\K(?={combining})"
    )


def _exactly(keys: list[str], within: list[str], family: set[str]) -> str:
    """A pattern of these entries, where SentencePiece's matches, from left to right, come upon them.

    A run of characters of the family, those of the entries that composing does not give, is read entry by entry (of
    those within the family) from its start, or from where the last match has ended (\\G).
    """
    longer = {
        key: "".join(other[len(key)] for other in within if other.startswith(key) and other != key) for key in keys
    }
    found = "|".join(f"{key}(?![{_set(after)}])" if after else key for key, after in longer.items())
    return f"(?:(?<![{_set(family)}])|\\G)(?>{_prefix_tree(within)}|[{_set(family)}])*?\\K(?:{found})"


def _prefix_tree(keys: Iterable[str]) -> str:
    """A pattern of the longest key that begins here, or of the first character of one alone."""
    tree: dict = {}
    for key in keys:
        node = tree
        for char in key:
            node = node.setdefault(char, {})
        node[""] = {}
    for node in tree.values():
        node[""] = {}

    def pattern(node: dict) -> str:
        by_rest: dict[str, list[str]] = {}
        for char, child in node.items():
            if char:
                by_rest.setdefault(pattern(child), []).append(char)
        branches = "|".join(f"[{_set(chars)}]{rest}" for rest, chars in by_rest.items())
        return f"(?:{branches}){'?' if '' in node else ''}" if branches else ""

    return pattern(tree)


def _set(characters: Iterable[str]) -> str:
    """The inside of a character class."""
    ranges: list[list[int]] = []
    for code in sorted(map(ord, characters)):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"\\x{{{low:x}}}-\\x{{{high:x}}}" for low, high in ranges)

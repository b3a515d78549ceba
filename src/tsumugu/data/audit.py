"""What a store would teach: supervised shares, stop tokens, masks, unknown characters, copies, and what is wrong.

The store is read once, in blocks of some million tokens, and never rendered again: what a template puts in front of a
reply, and which token it stops at, is found by rendering a few questions; every supervised stretch of the store must
then begin and end so. Nothing here changes a store.
"""

import dataclasses
import functools
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tsumugu.data.store import Split, Store, open_store
from tsumugu.errors import UserError
from tsumugu.tokenizer.contract import (
    Contract,
    check_contract,
    marks_replies,
    new_rows,
    read_chat_template,
    read_contract,
)

# A defect of a program touches nearly every row; one of a few records touches a few. Above this share of the rows a
# finding blocks, below it warns.
BLOCKING_SHARE = 0.01

# Shares of unknown tokens. Edited Japanese (Wikipedia, novels) has 0.01 % to 0.2 % with vocabularies of 32,000 without
# byte fallback; from a few percent on, every sentence has holes.
_UNKNOWN_WARNING, _UNKNOWN_ERROR = 0.005, 0.02

# Shares of rows that are copies. Sets that people write repeat some short exchanges; a set that is read twice has half.
_COPIES_WARNING, _COPIES_ERROR = 0.01, 0.3

# Share of the tokens of a text that come back when it is decoded and encoded again. Measured on JaQuAD with rinna's and
# two of llm-jp's tokenizers: 100 % with a store's own tokenizer, 63 % to 92 % with another. (Of short texts in a small
# vocabulary up to 99 % come back with another: there only the fingerprints and the template tell.)
_LEAST_RETURNING = 0.9

_BLOCK_TOKENS = 2**20
_QUICK_ROWS = 512
_QUICK_TOKENS = 2**20
_LONGEST_LEAD = 16  # tokens in front of a reply that are compared
_EXAMPLES = 3  # of each finding
_SHOWN = 400  # characters of each stretch of an example
_RECORDS_READ = 2000  # of every source, for its unknown characters

_HINT_MASK = "prepare the store again with `tsumugu prepare`, which builds masks from the pieces of a template"

Kind = Literal["ignored", "supervised", "stop", "ignored stop"]


@dataclass(frozen=True)
class Example:
    """A row as it is trained on: stretches of text, each with what becomes of it."""

    split: str
    row: int
    parts: list[tuple[Kind, str]]


@dataclass(frozen=True)
class Finding:
    """Something wrong.

    Attributes:
        name: Stable, for programs.
        level: error: training would teach the wrong thing. warning: it is worth a look.
        message: What is wrong, in one sentence.
        mend: What to do about it.
        count: How many rows (or, as `unit` says, tokens), of the `of` that were looked at; 0 of 0 where it is the store
            as a whole.
    """

    name: str
    level: Literal["error", "warning"]
    message: str
    mend: str
    count: int = 0
    of: int = 0
    unit: str = "rows"
    examples: list[Example] = field(default_factory=list)

    @property
    def share(self) -> float:
        return self.count / self.of if self.of else 1.0


@dataclass
class SplitFigures:
    """Of one split; `lengths` are quantiles of the rows' lengths in tokens, `histogram` has (from, to, rows)."""

    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    unknown_tokens: int = 0
    replies: int = 0
    rows_without_supervision: int = 0
    lengths: dict[str, int] = field(default_factory=dict)
    histogram: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def supervised_share(self) -> float:
        return self.supervised_tokens / self.tokens if self.tokens else 0.0

    @property
    def unknown_share(self) -> float:
        return self.unknown_tokens / self.tokens if self.tokens else 0.0


@dataclass
class Report:
    """What an audit found.

    Attributes:
        unknown_characters: The most frequent characters without a token in a sample of the sources, with counts.
        not_checked: What could not be checked, and why.
    """

    store: str
    kind: str
    template: str | None
    train_on: str | None
    stop: str | None
    splits: dict[str, SplitFigures]
    findings: list[Finding]
    examples: list[Example]
    unknown_characters: list[tuple[str, int]]
    not_checked: list[str]

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]

    def to_json(self) -> dict:
        """All of it, shares included, as JSON has it."""
        content = dataclasses.asdict(self)
        for finding, written in zip(self.findings, content["findings"], strict=True):
            written["share"] = finding.share
        for name, figures in self.splits.items():
            content["splits"][name] |= {
                "supervised_share": figures.supervised_share,
                "unknown_share": figures.unknown_share,
            }
        return content


def audit(path: Path, rows: int = 3, model: Path | None = None) -> Report:
    """Reads all of a store. 10^8 tokens take about a minute and some hundred MB.

    Args:
        path: The store.
        rows: How many rows to show.
        model: A folder with the tokenizer (and its contract) that the store must have been made with.

    Raises:
        UserError: No store there, or files that do not belong together.
    """
    store = open_store(path)
    audited = _Audit(store, _tokenizer_findings(store, model, thorough=True), model)
    for name, split in (("train", store.train), ("validation", store.validation)):
        for block in _blocks(name, split, range(split.documents), audited.supervised):
            audited.take(block)
    return audited.report(rows, thorough=True)


def quick_audit(store: Store, rows: int = 0) -> Report:
    """The same over some hundred rows from all over the training split, within about a second, showing `rows` of them.

    What takes a look at all rows (copies, rows of both splits), or at the sources, is left out.
    """
    audited = _Audit(store, _tokenizer_findings(store, None, thorough=False))
    split = store.train
    number = min(split.documents, _QUICK_ROWS, max(1, _QUICK_TOKENS * split.documents // max(split.tokens, 1)))
    indices = np.unique(np.linspace(0, split.documents - 1, number).astype(np.int64)).tolist() if number else []
    for block in _blocks("train", split, indices, audited.supervised):
        audited.take(block)
    return audited.report(rows, thorough=False)


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def _tokenizer_findings(store: Store, model: Path | None, thorough: bool) -> list[Finding]:
    folder = store.path / "tokenizer"
    mend = "prepare the store again with the model's tokenizer"
    try:
        contract = check_contract(folder) if thorough and (folder / "tokenizer.json").is_file() else None
    except UserError as error:
        return [Finding("wrong-tokenizer", "error", error.message, mend)]
    contract = contract or read_contract(folder)
    if contract.fingerprint != store.fingerprint:
        message = "the tokenizer in the store's folder is not the one that made its ids"
        return [Finding("wrong-tokenizer", "error", message, mend)]
    if model is not None:
        own = read_contract(model)
        if own.fingerprint != contract.fingerprint and new_rows(folder, own) is None:
            message = f"the store was made with another tokenizer than {model} has"
            return [Finding("wrong-tokenizer", "error", message, f"prepare it with {model}")]
    return []


# --- what the template says ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """How replies stand in a conversation: what is in front of each, the token at which it stops, what follows that.

    Attributes:
        lead, after: Ids; as many at the end of a prompt of generation as are the same whatever the question is.
        lead_text: The last line that the template writes in front of a reply.
        misplaced: Why replies, as the chat template has them, do not begin where a generated one would.
        begins_with_bos: Whether the template itself writes a bos token; own_chat: whether it is the tokenizer's own.
        learns_earlier: Whether replies before the last one are replies.
        newlines: Whether the template writes newlines; spells_newlines: whether it has a token for those in texts.
        unknown: Whether the tokenizer has no token for a part of what the template writes.
        split_markers: Markers such as <|im_end|> that are not one token.
    """

    lead: tuple[int, ...]
    stop: int
    after: tuple[int, ...]
    lead_text: str
    misplaced: UserError | None
    begins_with_bos: bool
    own_chat: bool
    learns_earlier: bool
    newlines: bool
    spells_newlines: bool
    unknown: bool
    split_markers: tuple[str, ...]


# Questions that end in different characters, so that what their renderings end in alike is the template's.
_QUESTIONS = ("日本の首都はどこですか？", "Is it large", "一覧にして。\n- 一つ\n", "1+1=2", "「はい」", "猫 ")


def _form_of(template: Any, folder: Path, tokenizer: Any, contract: Contract) -> _Form:
    """All that an audit knows of templates: from rendering and encoding some questions, as `tsumugu prepare` does."""
    from tsumugu.data.instructions import (
        Message,
        encode_conversations,
        find_template,
        learns_earlier_replies,
        prompt_ids,
        writes_bos,
    )
    from tsumugu.data.instructions.chat import ChatTemplate
    from tsumugu.data.instructions.encode import special_ids
    from tsumugu.data.instructions.templates import EOS

    found = find_template(template, folder)
    probes = [[Message("user", text), Message("assistant", "東京です。")] for text in _QUESTIONS]
    specials, encode = special_ids(folder), _encoder(tokenizer)
    absent = [token for token in found.special_tokens if token not in specials]  # then cut into pieces, as text is
    ids_of: Any = specials | dict(zip(absent, encode(absent), strict=True))
    encoded = encode_conversations(probes, found, encode, [], contract.eos_id, "responses", ids_of)
    stops, afters = set(), set()
    for result in encoded:
        if isinstance(result, UserError):
            continue
        ids, mask = result
        supervised = np.flatnonzero(mask)
        stops.add(int(ids[supervised[-1]]))
        afters.add(tuple(ids[supervised[-1] + 1 :].tolist()))
    if len(stops) != 1 or len(afters) != 1:
        raise UserError("the template does not end every reply alike")
    misplaced = None
    if isinstance(found, ChatTemplate):
        try:
            found.check_start()
        except UserError as error:
            misplaced = error
    prompts = [prompt_ids(probe[:1], found, encode, [], {EOS: contract.eos_id} | ids_of) for probe in probes]
    texts = ["".join(segment.text for segment in found.segments(probe[:1])) for probe in probes]
    own = _common_end([list(text) for text in texts])
    written = texts[0].replace(_QUESTIONS[0], "")
    markers = {*absent, *re.findall(r"<\|[^|<>\s]+\|>|<(?:start|end)_of_turn>", written)} - specials.keys()
    plain = functools.reduce(lambda text, token: text.replace(token, ""), specials, written)
    last_line = "".join(own).rstrip().rsplit("\n", 1)[-1].strip()
    return _Form(
        lead=tuple(_common_end(prompts)[-_LONGEST_LEAD:]),
        stop=stops.pop(),
        after=afters.pop(),
        lead_text=re.sub(r"^(<[^<>\s]+>)+", "", last_line),  # such as <NL>, which is decoded as a newline
        misplaced=misplaced,
        begins_with_bos=writes_bos(found, folder, contract),
        own_chat=isinstance(found, ChatTemplate),
        learns_earlier=learns_earlier_replies(found),
        newlines="\n" in written,
        spells_newlines=getattr(found, "newline", "\n") != "\n",
        unknown=contract.unk_id is not None and contract.unk_id in encode([plain])[0],
        split_markers=tuple(sorted(marker for marker in markers if tokenizer.token_to_id(marker) is None)),
    )


def _encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    return lambda texts: [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]


def _common_end(sequences: Sequence[list]) -> list:
    length = 0
    while all(len(s) > length and s[-1 - length] == sequences[0][-1 - length] for s in sequences):
        length += 1
    return sequences[0][len(sequences[0]) - length :]


def _generation_markers(store: Store) -> bool | None:
    """Whether the chat template that the store was made with marks replies; None where there is no chat template."""
    template = store.manifest["template"]
    jinja = template.get("jinja") if isinstance(template, dict) else None
    jinja = jinja or read_chat_template(store.path / "tokenizer")
    return None if jinja is None else marks_replies(jinja)


# --- rows, some million tokens at a time -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """Some rows, one after another: those `rows` of a split; row i is ids[bounds[i]:bounds[i + 1]]."""

    split: str
    rows: np.ndarray
    ids: np.ndarray
    mask: np.ndarray
    bounds: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        return self.bounds[:-1]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.bounds)


def _blocks(name: str, split: Split, indices: Iterable[int], supervised: bool) -> Iterator[_Block]:
    """The rows `indices` (ascending) of a split; neighbours in it are read in one go."""
    rows: list[int] = []
    spans: list[tuple[int, int]] = []
    size = 0

    def block() -> _Block:
        pieces: list[tuple[int, int]] = []
        for start, stop in spans:
            if pieces and pieces[-1][1] == start:
                pieces[-1] = (pieces[-1][0], stop)
            else:
                pieces.append((start, stop))
        read = [split.read(*piece) for piece in pieces if piece[0] < piece[1]]
        ids = np.concatenate([np.empty(0, np.int64), *(ids for ids, _ in read)])
        masks = [np.ones(len(ids), bool) if mask is None or not supervised else mask for ids, mask in read]
        bounds = np.cumsum([0, *(stop - start for start, stop in spans)])
        return _Block(name, np.array(rows), ids, np.concatenate([np.empty(0, bool), *masks]), bounds)

    for index in indices:
        spans.append(split.span(index))
        rows.append(index)
        size += spans[-1][1] - spans[-1][0]
        if size >= _BLOCK_TOKENS:
            yield block()
            rows, spans, size = [], [], 0
    if rows:
        yield block()


class _RowHashes:
    """64-bit hashes of rows and of their prompts: sums of ids times random weights, one a position, modulo 2^64."""

    def __init__(self):
        self._weights = np.empty(0, np.uint64)

    def __call__(self, block: _Block, lengths: np.ndarray) -> np.ndarray:
        """Of the first `lengths` tokens of every row."""
        longest = int(block.lengths.max(initial=0)) + 1
        if longest > len(self._weights):
            drawn = np.random.default_rng(0).integers(0, 2**64, size=2 * longest, dtype=np.uint64)
            self._weights = drawn | np.uint64(1)  # the same ones again, and more
        places = np.arange(len(block.ids)) - np.repeat(block.starts, block.lengths)
        products = (block.ids.astype(np.uint64) + np.uint64(1)) * self._weights[places]
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(products, dtype=np.uint64)])
        hashed = sums[block.starts + lengths] - sums[block.starts]
        return hashed ^ (lengths.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))


@dataclass(frozen=True)
class _Problem:
    message: str
    mend: str
    blocks: bool = True  # where more than BLOCKING_SHARE of the rows have it


_PROBLEMS = {
    "no-supervision": _Problem(
        "rows have no supervised token: they cost time and teach nothing",
        "remove their records, or the `train: false` of their messages; " + _HINT_MASK,
    ),
    "no-generation-markers": _Problem(
        "the chat template marks no replies ({% generation %}), and the masks do not hold them",
        "use a template with generation markers, such as a built-in one; " + _HINT_MASK,
    ),
    "prompt-supervised": _Problem(
        "prompts are supervised, though train_on says replies",
        "set prepare.train_on: everything if that is wanted; else " + _HINT_MASK,
    ),
    "off-by-one": _Problem(
        "masks are shifted by a token: the last token of the prompt is supervised, or the first of the reply is not",
        "store masks that say which token is supervised, not which label (training shifts them); " + _HINT_MASK,
    ),
    "stop-not-supervised": _Problem(
        "the stop token behind a reply is ignored, so that the model never learns to stop",
        "do not mask by token value (pad = eos); " + _HINT_MASK,
    ),
    "stop-missing": _Problem(
        "replies do not end with the stop token, so that the model never learns to stop", _HINT_MASK
    ),
    "stop-inside": _Problem(
        "the stop token stands within a reply, so that the model learns to stop in mid-sentence",
        "the tokenizer turns characters into it: import it with `tsumugu tokenizer import`, and prepare again",
    ),
    "truncated-replies": _Problem(
        "replies are cut off where rows are longest, without their stop token",
        "raise prepare.max_length, or let prepare.too_long drop such rows",
    ),
    "empty-replies": _Problem("replies are empty: the model learns to say nothing", "remove those records"),
    "marker-split": _Problem(
        "the role marker in front of replies is cut into other pieces than when a prompt is generated from",
        "encode prompt and reply for themselves, as `tsumugu prepare` does, with a tokenizer that has every character "
        "of the markers (`tsumugu tokenizer extend` adds them)",
    ),
    "template-mismatch": _Problem(
        "what stands in front of replies is not what the manifest's template writes there, by the store's tokenizer",
        "prepare the store again with the template and the tokenizer that are meant",
    ),
    "train-on-mismatch": _Problem(
        "earlier replies are supervised, though train_on says last_response",
        "set prepare.train_on: responses if that is wanted; else " + _HINT_MASK,
    ),
    "bos-mismatch": _Problem(
        "rows do not begin as the manifest says, with one bos token or with none",
        "let prepare.add_bos or the template write it, not the texts; prepare the store again",
    ),
    "pad-tail": _Problem(
        "rows end in pad tokens, which are read as text: packing and padding know rows by their lengths",
        "prepare the store again without padding, which training adds by itself",
        blocks=False,
    ),
    "empty-documents": _Problem("documents hold no text", "remove those records"),
    "ids-out-of-range": _Problem(
        "ids are beyond the tokenizer's vocabulary", "prepare the store again with the model's tokenizer"
    ),
    "validation-overlap": _Problem(
        "validation rows are also trained on: validation says nothing about new text",
        "split by content (`tsumugu prepare` does), and remove training rows that equal validation rows",
    ),
    "validation-prompts": _Problem(
        "prompts of validation rows are also trained on, with other replies",
        "split by prompt, as `tsumugu prepare` does",
    ),
}


class _Audit:
    """What has been found so far."""

    def __init__(self, store: Store, findings: list[Finding], model: Path | None = None):
        self.store, self.findings = store, findings
        self.supervised = store.supervised
        self.contract = read_contract(store.path / "tokenizer")
        self.model_adds_bos = (read_contract(model) if model else self.contract).adds_bos
        self.settings = store.manifest.get("settings", {})
        self.train_on = self.settings.get("train_on", "responses") if self.supervised else None
        self.not_checked: list[str] = []
        self.tokenizer = self._load_tokenizer()
        self.form = self._find_form()
        self.stop = self.form.stop if self.form else None
        self.begins_with_bos = bool(store.manifest["add_bos"]) or bool(self.form and self.form.begins_with_bos)
        # shortened rows lack their beginning: with truncate_prompt the longest ones, with split any
        self.split = self.supervised and self.settings.get("too_long") == "split"
        self.shortened = self.settings.get("max_length") if self.settings.get("too_long") == "truncate_prompt" else None
        self.several: Counter[str] = Counter()  # rows by how much of them is supervised
        self.splits = {name: SplitFigures() for name in ("train", "validation")}
        self.lengths: dict[str, Counter[int]] = {name: Counter() for name in self.splits}
        self.problems: dict[str, list[tuple[str, int]]] = {}  # rows with each
        self.counts: Counter[str] = Counter()
        self._hash = _RowHashes()
        self.hashes: dict[str, list[np.ndarray]] = {name: [] for name in self.splits}
        self.prompt_hashes: dict[str, list[np.ndarray]] = {name: [] for name in self.splits}

        self.probe_ids: list[list[int]] = []  # of the first rows
        self.unknown_rows: list[tuple[str, int]] = []

    def _load_tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        path = self.store.path / "tokenizer" / "tokenizer.json"
        if not path.is_file():
            self.not_checked.append("texts and the template: the store has no tokenizer.json")
            return None
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def _find_form(self) -> _Form | None:
        if not self.supervised or self.tokenizer is None:
            return None
        try:
            folder = self.store.path / "tokenizer"
            return _form_of(self.store.manifest["template"], folder, self.tokenizer, self.contract)
        except ImportError as error:  # `train` starts with less than `prepare` needs
            self.not_checked.append(f"where replies begin: {error.name} is not installed")
        except UserError as error:
            self.not_checked.append(f"where replies begin: {error.message}")
        return None

    def note(self, name: str, block: _Block, rows: np.ndarray) -> None:
        """Counts rows (by their place in the block) with a problem."""
        rows = np.unique(rows)
        self.counts[name] += len(rows)
        kept = self.problems.setdefault(name, [])
        kept += [(block.split, int(block.rows[row])) for row in rows[: max(0, _EXAMPLES - len(kept))]]

    def take(self, block: _Block) -> None:
        figures = self.splits[block.split]
        figures.rows += len(block.rows)
        figures.tokens += len(block.ids)
        self.lengths[block.split].update(block.lengths.tolist())
        if self.contract.unk_id is not None:
            unknown = block.ids == self.contract.unk_id
            figures.unknown_tokens += int(unknown.sum())
            if len(self.unknown_rows) < _EXAMPLES and unknown.any():
                rows = np.unique(_row_of(block, np.flatnonzero(unknown)))[:_EXAMPLES]
                self.unknown_rows += [(block.split, int(block.rows[row])) for row in rows]
        beyond = np.flatnonzero((block.ids >= self.contract.vocab_size) | (block.ids < 0))
        self.note("ids-out-of-range", block, _row_of(block, beyond))
        for row in range(min(len(block.rows), 64 - len(self.probe_ids))):
            self.probe_ids.append(block.ids[block.bounds[row] : block.bounds[row + 1]][:2000].tolist())
        self._check_ends(block)
        if self.supervised:
            figures.supervised_tokens += int(block.mask.sum())
            self._take_replies(block)
        else:
            special = np.isin(block.ids, [id for id in (self.contract.bos_id, self.contract.eos_id) if id is not None])
            text = np.concatenate([[0], np.cumsum(~special)])
            self.note("empty-documents", block, np.flatnonzero(text[block.bounds[1:]] == text[block.starts]))
        self.hashes[block.split].append(self._hash(block, block.lengths))

    def _check_ends(self, block: _Block) -> None:
        """Whether rows begin with bos as they should, and do not end in padding."""
        filled = np.flatnonzero(block.lengths > 1)
        first, last = block.starts[filled], block.bounds[1:][filled] - 1
        bos, pad = self.contract.bos_id, self.contract.pad_id
        told = self.form is not None or not isinstance(self.store.manifest["template"], dict)
        if bos is not None and told and not self.split:
            begins = block.ids[first] == bos
            twice = begins & (block.ids[first + 1] == bos)
            self.note("bos-mismatch", block, filled[(begins != self.begins_with_bos) | twice])
        if pad is not None:
            padded = block.ids[last] == pad
            if pad in (self.stop, self.contract.eos_id):
                padded &= block.ids[last - 1] == pad
            self.note("pad-tail", block, filled[padded])

    def _cut(self, block: _Block) -> np.ndarray:
        """Of each row, whether its beginning may have been cut away."""
        return np.full(len(block.rows), self.split) | (block.lengths == self.shortened)

    def _take_replies(self, block: _Block) -> None:
        """The checks of supervised rows."""
        bounds, mask = block.bounds, block.mask
        figures = self.splits[block.split]
        filled = block.lengths > 0
        before, behind = np.roll(mask, 1), np.roll(mask, -1)
        before[bounds[:-1][filled]] = False
        behind[bounds[1:][filled] - 1] = False
        starts, stops = np.flatnonzero(mask & ~before), np.flatnonzero(mask & ~behind) + 1
        rows = _row_of(block, starts)
        figures.replies += len(starts)

        without = np.setdiff1d(np.arange(len(block.rows)), rows)
        figures.rows_without_supervision += len(without)
        self.note("no-supervision", block, without)
        first, place = np.unique(rows, return_index=True)
        prompts = np.zeros_like(block.lengths)  # tokens before the first supervised one
        prompts[first] = starts[place] - bounds[first]
        compared = (prompts > 1) & ~self._cut(block)
        self.prompt_hashes[block.split].append(np.where(compared, self._hash(block, prompts), np.uint64(0)))

        if self.stop is None:
            self.stop = self._likely_stop(block.ids[stops - 1])
        ends = _ends_of(block.ids, self.form.lead) if self.form and self.form.lead else None
        if ends is not None and not self.split:
            self._check_train_on(block, stops, rows, ends)
        shifted = np.zeros(len(starts), bool)
        if self.train_on != "everything" and len(starts):
            shifted = self._check_starts(block, starts, stops, rows, ends)
        if self.form or self.train_on != "everything":
            self._check_stops(block, starts[~shifted], stops[~shifted], rows[~shifted])

    def _likely_stop(self, ends: np.ndarray) -> int | None:
        """The stop token where no template says it: the special token that most replies end with, or eos."""
        ids, counts = np.unique(ends, return_counts=True)
        id = int(ids[counts.argmax()]) if len(ids) else -1
        special = 0 <= id < self.contract.vocab_size and self.contract.token_bytes[id] == 0
        return id if special and counts.max() > len(ends) / 2 else self.contract.eos_id

    def _check_train_on(self, block: _Block, stops: np.ndarray, rows: np.ndarray, ends: np.ndarray) -> None:
        """Whether the replies are supervised that train_on says, of rows with several of them."""
        bounds, cut = block.bounds, self._cut(block)
        stretches = np.bincount(rows, minlength=len(block.rows))
        # a lead may be spelt in a text; a stop token may not
        leads = ends[bounds[1:]] - ends[block.starts]
        several = (leads > 1) & (_count(block.ids == self.stop, block.starts, bounds[1:]) > 1) & ~cut
        whole = _count(block.mask, block.starts, bounds[1:]) == block.lengths
        self.several.update(rows=int(several.sum()), all=int((several & (stretches > 1)).sum()), whole=int(whole.sum()))
        if self.train_on == "last_response":
            earlier = ends[bounds[rows + 1]] > ends[stops]  # another reply follows
            self.note("train-on-mismatch", block, rows[(earlier | (stretches[rows] > 1)) & several[rows]])

    def _check_starts(
        self, block: _Block, starts: np.ndarray, stops: np.ndarray, rows: np.ndarray, ends: np.ndarray | None
    ) -> np.ndarray:
        """Whether each supervised stretch begins where the template lets replies begin; those shifted by a token.

        Args:
            ends: Of `_ends_of` for what the template writes in front of a reply; None where that is nothing.
        """
        ids, bounds = block.ids, block.bounds
        bos = int(self.begins_with_bos)
        going_on = self.split & (starts - bounds[rows] <= 1)  # with a reply that the row before began
        at_head = (starts - bounds[rows] <= bos) & ~(going_on & (starts > bounds[rows]))
        if ends is None:  # nothing stands in front of a reply by which to know it
            self.note("prompt-supervised", block, rows[at_head])
            return np.zeros(len(starts), bool)
        assert self.form is not None
        lead, cut = self.form.lead, self._cut(block)[rows]

        def led(places: np.ndarray) -> np.ndarray:
            """Whether the lead ends there, within the row; of one that is cut, as much as the row has."""
            has = places - bounds[rows]
            wanted = np.where(cut, np.minimum(len(lead), has - bos), len(lead))
            found = (wanted > 0) & (wanted <= has) & (places <= bounds[rows + 1])
            for offset, id in enumerate(reversed(lead), start=1):
                compared = found & (offset <= wanted)
                found[compared] = ids[places[compared] - offset] == id
            return found

        right = led(starts) | (going_on & ~at_head)
        inside = ends[stops] - ends[np.minimum(starts + 1, stops)] > 0  # the lead ends within the stretch
        shifted = ~right & (led(starts - 1) | led(starts + 1))
        prompt = ~right & ~shifted & (inside | at_head)
        later = right & inside & (_count(ids == self.stop, starts, stops - 1) > 0)
        other = ~right & ~shifted & ~prompt
        self.note("off-by-one", block, rows[shifted])
        self.note("prompt-supervised", block, rows[prompt | later])
        self.note_other(block, starts[other], rows[other])
        within = right & ~inside & (_count(ids == self.stop, starts, stops - 1) > 0)
        self.note("stop-inside", block, rows[within])
        return shifted

    def note_other(self, block: _Block, starts: np.ndarray, rows: np.ndarray) -> None:
        """Stretches behind something else than the lead: the same text in other pieces, or another text."""
        assert self.form is not None
        wanted = _plain(self.form.lead_text)
        same = np.zeros(len(starts), bool)
        for index, (start, row) in enumerate(zip(starts[:10_000].tolist(), rows.tolist(), strict=False)):
            tail = block.ids[max(block.bounds[row], start - 4 * len(wanted) - 8) : start].tolist()
            same[index] = bool(wanted) and _plain(self.tokenizer.decode(tail, skip_special_tokens=False)).endswith(
                wanted
            )
        self.note("marker-split", block, rows[same])
        self.note("template-mismatch", block, rows[~same])

    def _check_stops(self, block: _Block, starts: np.ndarray, stops: np.ndarray, rows: np.ndarray) -> None:
        """Whether each supervised stretch ends with the stop token, and says something before that."""
        ids, bounds = block.ids, block.bounds
        ends = stops
        if self.train_on == "everything" and self.form and self.form.after:
            ends = np.maximum(stops - len(self.form.after), starts + 1)
        stopped = ids[ends - 1] == self.stop
        inside_row = stops < bounds[rows + 1]
        ignored = ~stopped & inside_row
        ignored[ignored] = ids[stops[ignored]] == self.stop
        caps = [cap for cap in (self.settings.get("max_length"), self._longest) if cap]
        cut = ~stopped & ~ignored & ~inside_row & np.isin(block.lengths[rows], caps)
        self.note("stop-not-supervised", block, rows[ignored])
        self.note("truncated-replies", block, rows[cut])
        missing = ~stopped & ~ignored & ~cut
        if self.train_on == "everything":  # within a row, stretches end where a message is not to be learned
            missing &= ~inside_row
        self.note("stop-missing", block, rows[missing])
        short = stopped & (self._after_thoughts(ids, starts, ends) <= 8) & (self.train_on != "everything")
        short &= ~(self.split & (starts - bounds[rows] <= 1))  # the end of a reply that the row before began
        self.note("empty-replies", block, rows[short][self._blank(ids, starts[short], ends[short] - 1)])

    def _after_thoughts(self, ids: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """(stretches,): tokens of each one, behind its </think> if that is among its last ones."""
        lengths = ends - starts
        closing = self.tokenizer.token_to_id("</think>") if self.tokenizer else None
        if closing is None:
            return lengths
        for tail in range(8, 0, -1):
            places = np.maximum(ends - tail, starts)
            lengths = np.where(ids[places] == closing, ends - places, lengths)
        return lengths

    @property
    def _longest(self) -> int:
        return max(self.store.train.longest_document, self.store.validation.longest_document)

    def _blank(self, ids: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Whether stretches hold nothing but white space, behind their thoughts."""
        blank = starts == ends
        for index in np.flatnonzero(~blank).tolist() if self.tokenizer else ():
            text = self.tokenizer.decode(ids[starts[index] : ends[index]].tolist(), skip_special_tokens=False)
            blank[index] = not text.rpartition("</think>")[2].strip()
        return blank

    # --- the report ---

    def report(self, rows: int, thorough: bool) -> Report:
        for name, figures in self.splits.items():
            figures.lengths, figures.histogram = _distribution(self.lengths[name])
            if not self.supervised:
                figures.supervised_tokens = figures.tokens
        self._rename()
        self.findings += [*self._row_findings(), *self._form_findings(), *self._unknown_findings()]
        self.findings += [*self._bos_findings(), *self._train_on_findings()]
        if self.tokenizer and not any(f.name in ("wrong-tokenizer", "ids-out-of-range") for f in self.findings):
            self.findings += self._returning_findings()
        if thorough:
            self.findings += self._copy_findings()
        characters = self._unknown_characters() if thorough and self._unknown else []
        self.findings.sort(key=lambda finding: (finding.level != "error", -finding.share))
        manifest = self.store.manifest
        template = manifest["template"]
        return Report(
            store=str(self.store.path),
            kind=manifest["kind"],
            template="the tokenizer's chat template or one of one's own" if isinstance(template, dict) else template,
            train_on=self.train_on,
            stop=self._token(self.stop) if self.supervised and self.stop is not None else None,
            splits=self.splits,
            findings=self.findings,
            examples=[self._example("train", row) for row in self._spread(rows)],
            unknown_characters=characters,
            not_checked=self.not_checked,
        )

    @property
    def _rows(self) -> int:
        return sum(figures.rows for figures in self.splits.values())

    @property
    def _unknown(self) -> int:
        return sum(figures.unknown_tokens for figures in self.splits.values())

    def _spread(self, rows: int) -> list[int]:
        count = self.store.train.documents
        return np.unique(np.linspace(0, count - 1, min(rows, count)).astype(int)).tolist() if count and rows else []

    def _rename(self) -> None:
        """What is known only once every row is counted."""
        if self.counts["truncated-replies"] == 1 and not self.settings.get("max_length"):
            # a row is always the longest: one alone was not cut
            self.counts["stop-missing"] += self.counts.pop("truncated-replies")
            self.problems.setdefault("stop-missing", []).extend(self.problems.pop("truncated-replies"))
        if self.supervised and _generation_markers(self.store) is False:
            for name in ("no-supervision", "prompt-supervised"):
                if self.counts[name] > self._rows / 2:
                    self.counts["no-generation-markers"] = self.counts.pop(name)
                    self.problems["no-generation-markers"] = self.problems.pop(name)

    def _row_findings(self) -> list[Finding]:
        return [
            self._finding(name, count, self._rows, self.problems[name])
            for name, count in self.counts.items()
            if count and name in self.problems
        ]

    def _finding(self, name: str, count: int, of: int, rows: list[tuple[str, int]], error: float | None = None):
        share = BLOCKING_SHARE if error is None else error
        problem = _PROBLEMS[name]
        if not problem.blocks or (name == "truncated-replies" and self.split):  # which was asked for
            share = 1.0
        level = "error" if count > share * of else "warning"
        return Finding(
            name, level, problem.message, problem.mend, count, of, examples=[self._example(*row) for row in rows]
        )

    def _form_findings(self) -> list[Finding]:
        findings, form = [], self.form
        if form and form.misplaced:
            message, mend = form.misplaced.message, form.misplaced.hint or _HINT_MASK
            findings.append(Finding("prompt-supervised", "error", message, mend))
        lost = self.contract.newline == "lost"
        if lost and form and form.newlines:
            message = "the template writes newlines, which the tokenizer cannot express: its parts run together"
            mend = "import the tokenizer with --newline TOKEN, extend it by one, or use a template without newlines"
            findings.append(Finding("newline-lost", "error", message, mend))
        elif lost and not (form and form.spells_newlines):
            message = "the tokenizer cannot express newlines: those in the texts are lost"
            mend = "import it with --newline TOKEN, or extend it by a newline, if texts have lines"
            findings.append(Finding("newline-lost", "warning", message, mend))
        if form is None or "marker-split" in [name for name, count in self.counts.items() if count]:
            return findings
        lead = _plain(self.tokenizer.decode(list(form.lead), skip_special_tokens=False)) if form.lead else ""
        why = None
        if form.split_markers:
            why = f"{' '.join(form.split_markers)} are no single tokens of the tokenizer"
        elif form.unknown:
            why = "the tokenizer has no token for some of the template's characters"
        elif not lost and not lead.endswith(_plain(form.lead_text)):
            why = f"{form.lead_text!r} merges with the text in front of it"
        if why:
            problem = _PROBLEMS["marker-split"]
            findings.append(Finding("marker-split", "error", f"{problem.message}: {why}", problem.mend))
        return findings

    def _bos_findings(self) -> list[Finding]:
        """Whether the model reads a bos token in front of every text, as its tokenizer adds it, and the store too."""
        adds = self.model_adds_bos
        if self.contract.bos_id is None or self.counts["bos-mismatch"] or (self.form and self.form.own_chat):
            return []
        if adds == self.begins_with_bos:
            return []
        message = (
            "the tokenizer puts a bos token in front of every text, and the store has none"
            if adds
            else "the store has a bos token in front of every row, which the tokenizer does not put there by itself"
        )
        mend = "leave prepare.add_bos out, unless the model was trained so"
        return [Finding("bos-mismatch", "warning", message, mend)]

    def _train_on_findings(self) -> list[Finding]:
        """Whether no row at all is supervised as far as train_on says; single messages may be left out."""
        several, message = self.several, None
        if self.form is None or not self.form.lead or self.split:
            return []
        if self.train_on == "everything" and not several["whole"]:
            message = "train_on says everything, and no row is supervised as a whole"
        several_but_one = several["rows"] > BLOCKING_SHARE * self._rows and not several["all"]
        if self.train_on == "responses" and self.form.learns_earlier and several_but_one:
            message = "of rows with several replies never more than one is supervised, though train_on says responses"
        mend = "set prepare.train_on to what is wanted, and prepare the store again"
        return [Finding("train-on-mismatch", "warning", message, mend)] if message else []

    def _unknown_findings(self) -> list[Finding]:
        tokens = sum(figures.tokens for figures in self.splits.values())
        if not tokens or self._unknown < _UNKNOWN_WARNING * tokens:
            return []
        return [
            Finding(
                "unknown-flood",
                "error" if self._unknown >= _UNKNOWN_ERROR * tokens else "warning",
                "characters without a token became unknown tokens, which the model learns to write",
                "use a tokenizer with byte fallback, extend this one, or clean the sources of those characters",
                self._unknown,
                tokens,
                "tokens",
                [self._example(*row) for row in self.unknown_rows],
            )
        ]

    def _returning_findings(self) -> list[Finding]:
        """Whether texts are the tokenizer's at all: decoded and encoded again, most tokens come back."""
        kept = total = 0
        for ids, again in zip(
            self.probe_ids,
            _encoder(self.tokenizer)([self.tokenizer.decode(ids) for ids in self.probe_ids]),
            strict=True,
        ):
            text = Counter(ids) - Counter(id for id in ids if self.contract.token_bytes[id] == 0)
            kept += (text & Counter(again)).total()
            total += text.total()
        if kept >= _LEAST_RETURNING * total:
            return []
        message = f"the ids are not this tokenizer's: of texts decoded and encoded again {kept / total:.0%} come back"
        return [Finding("wrong-tokenizer", "error", message, "prepare the store again with the model's tokenizer")]

    def _copy_findings(self) -> list[Finding]:
        train, validation = (
            np.concatenate([np.empty(0, np.uint64), *self.hashes[name]]) for name in ("train", "validation")
        )
        findings = []
        distinct, first = np.unique(train, return_index=True)
        copies = len(train) - len(distinct)
        if copies > _COPIES_WARNING * len(train):
            rows = np.setdiff1d(np.arange(len(train)), first)[:_EXAMPLES]
            findings.append(
                Finding(
                    "duplicates",
                    "error" if self.supervised and copies > _COPIES_ERROR * len(train) else "warning",
                    "training rows are copies of others, and are learned as often as they occur",
                    "set prepare.deduplicate: exact; to repeat a source, give it a weight in data.stores",
                    copies,
                    len(train),
                    examples=[self._example("train", int(row)) for row in rows],
                )
            )
        leaked = np.isin(validation, distinct)
        if leaked.any():
            rows = [("validation", int(row)) for row in np.flatnonzero(leaked)[:_EXAMPLES]]
            findings.append(self._finding("validation-overlap", int(leaked.sum()), len(validation), rows))
        if self.supervised:
            prompts, held_out = (
                np.concatenate([np.empty(0, np.uint64), *self.prompt_hashes[name]]) for name in ("train", "validation")
            )
            shared = np.isin(held_out, prompts[prompts != 0]) & ~leaked
            # texts that differ before the tokenizer's normalisation alone may lie on both sides
            if shared.sum() > BLOCKING_SHARE * len(held_out):
                rows = [("validation", int(row)) for row in np.flatnonzero(shared)[:_EXAMPLES]]
                finding = self._finding("validation-prompts", int(shared.sum()), len(held_out), rows, error=1.0)
                findings.append(finding)
        return findings

    def _unknown_characters(self) -> list[tuple[str, int]]:
        """The worst characters in a sample of the sources that the manifest names, where they are still there."""
        characters: Counter[str] = Counter()
        try:
            for text in _source_texts(self.settings):
                characters.update(text)
        except (OSError, UserError) as error:
            self.not_checked.append(f"which characters are unknown: {error}")
            return []
        distinct = [character for character in characters if not character.isspace()]
        encoded = _encoder(self.tokenizer)(distinct) if self.tokenizer else []
        unknown = {c: characters[c] for c, ids in zip(distinct, encoded, strict=False) if self.contract.unk_id in ids}
        return Counter(unknown).most_common(20)

    def _token(self, id: int) -> str:
        return (self.tokenizer.id_to_token(id) if self.tokenizer else None) or f"<{id}>"

    def _example(self, split: str, row: int) -> Example:
        ids, mask = (self.store.train if split == "train" else self.store.validation).document(row)
        parts: list[tuple[Kind, str]] = []
        kinds = np.where(mask, 1, 0) + 2 * ((ids == self.stop) & self.supervised)
        names: tuple[Kind, ...] = ("ignored", "supervised", "ignored stop", "stop")
        edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(ids)]
        for start, stop in itertools.pairwise(edges):
            if start == stop:
                continue
            kind = names[kinds[start]]
            if kinds[start] >= 2:
                text = "".join(map(self._token, ids[start:stop].tolist()))
            elif self.tokenizer is None:
                text = " ".join(map(str, ids[start:stop].tolist()))
            else:
                text = self.tokenizer.decode(ids[start:stop].tolist(), skip_special_tokens=False)
            parts.append((kind, _short(text)))
        return Example(split, row, parts)


def _row_of(block: _Block, places: np.ndarray) -> np.ndarray:
    """The rows, by their place in the block, that hold these tokens."""
    return np.searchsorted(block.bounds, places, side="right") - 1


def _count(flags: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """How many are true from each start to before each stop."""
    sums = np.concatenate([[0], np.cumsum(flags)])
    return sums[np.maximum(stops, starts)] - sums[starts]


def _ends_of(ids: np.ndarray, lead: tuple[int, ...]) -> np.ndarray:
    """(tokens + 1,): in how many places up to each one the lead has ended."""
    ended = np.zeros(len(ids) + 1, np.int64)
    if len(ids) >= len(lead):
        windows = len(ids) - len(lead) + 1
        found = np.ones(windows, bool)
        for offset, id in enumerate(lead):
            found &= ids[offset : offset + windows] == id
        ended[len(lead) :] = found
    return np.cumsum(ended)


def _plain(text: str) -> str:
    """Text as tokenizers that normalise give it back, without white space."""
    return re.sub(r"\s+", "", unicodedata.normalize("NFKC", text)).lower()


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}"


def _distribution(lengths: Counter[int]) -> tuple[dict[str, int], list[tuple[int, int, int]]]:
    """Quantiles, and a histogram by powers of two."""
    if not lengths:
        return {}, []
    values = np.array(sorted(lengths))
    counts = np.array([lengths[value] for value in values.tolist()])
    sums = np.cumsum(counts)
    quantiles = {"median": 0.5, "90%": 0.9, "99%": 0.99}
    found = {name: int(values[np.searchsorted(sums, share * sums[-1])]) for name, share in quantiles.items()}
    bins: Counter[int] = Counter()
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        bins[max(4, (max(value, 1) - 1).bit_length())] += count
    histogram = [(2 ** (b - 1) + 1 if b > 4 else 0, 2**b, bins[b]) for b in range(min(bins), max(bins) + 1)]
    return {"shortest": int(values[0]), **found, "longest": int(values[-1])}, histogram


def _source_texts(settings: dict) -> Iterator[str]:
    """Texts of the first records of every source."""
    from tsumugu.data import corpus
    from tsumugu.data.instructions import columns_for

    for source in settings.get("sources", ()):
        pieces = corpus.plan(corpus.find_files(source["path"]), 2**30)
        instructions = source["kind"] == "instructions"
        columns = columns_for(source["fields"]) if instructions else [source["text"] or corpus.find_text_column(pieces)]
        left = _RECORDS_READ
        for piece in pieces:
            for record in corpus.read_records(piece, columns):
                if isinstance(record, corpus.Record):
                    yield from _strings([record.values.get(column) for column in columns])
                left -= 1
                if left == 0:
                    break
            if left == 0:
                break


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)

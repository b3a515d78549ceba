"""Every option of tsumugu: frozen dataclasses, what makes them valid, and how files and flags become them.

A configuration is one or more YAML files and, on top of them, flags such as `--train.max_steps 10`. Unknown keys, wrong
types and values that contradict each other are refused here, before anything is read or computed.
"""

import dataclasses
import difflib
import functools
import itertools
import math
import os
import re
import shlex
import tempfile
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from tsumugu.errors import UserError, redact

CHANNELS = "TSUMUGU_CHANNELS"  # where launchers leave channels for `load`: NAME=PATH, with blanks between them
_CHANNEL = re.compile(r"channel:(?P<name>[A-Za-z0-9._-]+)(?P<rest>(?:/.*)?)")


@dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """Normalisation and quality rules. Those that know Japanese touch sources of `language: ja` only."""

    rules: Literal["none", "normalize", "swallow"] | None = None
    """none: text as it is. normalize: characters are mended. swallow: also the quality rules of Swallow Corpus v1.
    Default: normalize for text, none for instructions."""
    control_characters: bool = True
    """normalize: control and invisible characters go (not tab, newline, joiners); every line end becomes a newline."""
    mojibake: Literal["repair", "drop", "keep"] = "repair"
    """normalize, ja and en: text decoded with the wrong encoding is repaired where that is reversible, else dropped."""
    fullwidth_ascii: bool = True
    """normalize, ja: full-width letters, digits and signs become ASCII; Japanese punctuation such as （）！？ stays."""
    halfwidth_kana: bool = True
    """normalize, ja: half-width kana and ｡｢｣､･ become full-width, a voicing mark joins its kana."""
    compatibility_ideographs: bool = True
    """normalize, ja: CJK compatibility ideographs and radicals become the unified kanji."""
    punctuation: bool = True
    """normalize, ja: ， and ． become 、 and 。 in documents that use them instead of 、 and 。, not between digits."""
    min_letters: int = 400
    """swallow, ja: least number of characters of any kind. 0 switches a minimum off."""
    min_japanese_letters: int = 400
    """swallow, ja: least number of hiragana, katakana, kanji and 、。！？."""
    min_hiragana: float = 0.2
    """swallow, ja: share of hiragana among the Japanese letters."""
    max_katakana: float = 0.5
    """swallow, ja: share of katakana among the Japanese letters. 1 switches a share off."""
    min_japanese: float = 0.5
    """swallow, ja: share of Japanese letters among all characters: what is below is not Japanese."""
    min_latin: float = 0.5
    """swallow, en: share of Latin letters among the letters of all scripts: what is below is not English."""
    min_mean_sentence: float = 20
    """swallow, ja: mean length of sentences in characters."""
    max_mean_sentence: float = 90
    """swallow, ja: the same, at most. .inf switches a length off."""
    max_longest_sentence: float = 200
    """swallow, ja: longest sentence in characters."""
    max_ellipsis: float = 0.2
    """swallow, ja: share of sentences that end in … or ・."""
    max_duplicate_paragraphs: float = 0.30
    """swallow, ja: share of lines that repeat an earlier one."""
    max_duplicate_paragraph_characters: float = 0.20
    """swallow, ja: the same, by characters."""
    max_duplicate_sentences: float = 0.30
    """swallow, ja: share of sentences that repeat an earlier one."""
    max_duplicate_sentence_characters: float = 0.20
    """swallow, ja: the same, by characters."""
    max_top_ngrams: list[float] = field(default_factory=lambda: [0.20, 0.18, 0.16])
    """swallow, ja: share of the most frequent 2, 3 and 4 characters among all such. [1, 1, 1] switches them off."""
    max_duplicate_ngrams: list[float] = field(default_factory=lambda: [0.15, 0.14, 0.13, 0.12, 0.11, 0.10])
    """swallow, ja: share of different 5 to 10 characters that occur again. [1, 1, 1, 1, 1, 1] switches them off."""
    ng_words: str | None = None
    """normalize and swallow: a file of words, one a line; documents with too many of them are dropped."""
    max_ng_words: float = 0.05
    """Characters that NG words may cover, over the Japanese letters of a document (en, code: over all characters).
    1 switches it off."""
    mask: list[Literal["email", "phone", "ip", "my_number"]] = field(default_factory=list)
    """normalize and swallow: personal data that becomes <email>, <phone>, <ip_address> or <my_number>."""
    hojichar: list[dict[str, Any]] = field(default_factory=list)
    """normalize and swallow: document filters of HojiChar (pip install hojichar), `name` and arguments; come last."""

    def __post_init__(self):
        for key, value in vars(self).items():
            if isinstance(value, (int, float)) and not value >= 0:
                raise UserError(f"clean.{key} is {value}", "use 0 or more")
        for key, count in (("max_top_ngrams", 3), ("max_duplicate_ngrams", 6)):
            limits = getattr(self, key)
            if len(limits) != count or not all(limit >= 0 for limit in limits):
                raise UserError(f"clean.{key} is {limits}", f"use {count} shares from 0 to 1")
        for index, item in enumerate(self.hojichar):
            if not isinstance(item.get("name"), str):
                raise UserError(f"clean.hojichar[{index}] has no name", "name a filter of HojiChar, such as DiscardAds")


# What a source changes of prepare.clean: the same keys, null where prepare.clean holds.
SourceCleanConfig = dataclasses.make_dataclass(
    "SourceCleanConfig",
    [(key, hint | None, field(default=None)) for key, hint in typing.get_type_hints(CleanConfig).items()],
    frozen=True,
    kw_only=True,
    namespace={"__module__": __name__},  # so that it can be pickled
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One corpus."""

    name: str
    """Name of the source, in manifests and figures."""
    path: str | list[str]
    """Files, folders or globs, local, s3:// or hf://datasets/NAME/: .txt (a document a file), .jsonl, .parquet."""
    kind: Literal["text", "instructions"] = "text"
    """text: documents. instructions: questions and answers, or conversations."""
    text: str | None = None
    """The column that holds the text; default: found, where there is one candidate."""
    fields: dict[str, str] = field(default_factory=dict)
    """For instructions: our name of a field (instruction, output, messages, ...) to the column that holds it."""
    language: Literal["ja", "en", "code"] = "ja"
    """Language of the source: rules of Japanese touch ja only."""
    clean: SourceCleanConfig = field(default_factory=SourceCleanConfig)  # pyright: ignore[reportInvalidTypeForm]
    """What differs from prepare.clean for this source."""
    deduplicate: Literal["none", "exact", "near"] | None = None
    """Whether this source's documents are compared with all that are; default: prepare.deduplicate."""
    validation_share: float | None = None
    """Share of its documents held out for validation, 1 for a source of validation alone; default: prepare's."""


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """How tasks of preparation are submitted, for prepare.executor slurm."""

    partition: str | None = None
    """Partition of the cluster."""
    time: str = "24:00:00"
    """Time limit of a task, as sbatch takes it."""
    memory_gib: int = 4
    """Memory of a task."""
    setup: str | None = None
    """Shell command that makes `tsumugu` available on a node, such as `source /fsx/venv/bin/activate`."""
    options: dict[str, str] = field(default_factory=dict)
    """More sbatch options by their long names, such as account: my-account."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """From text to a token store."""

    sources: list[Source]
    """The corpora, all of one kind."""
    tokenizer: str
    """Folder made by `tsumugu tokenizer`."""
    output: str
    """Folder for the token store."""
    validation_share: float = 0.05
    """Share of documents held out for validation, chosen by the hash of the document."""
    clean: CleanConfig = field(default_factory=CleanConfig)
    """Normalisation and quality rules."""
    deduplicate: Literal["none", "exact", "near"] = "none"
    """Of equal (near: very similar) documents only the first stays."""
    min_similarity: float = 0.4
    """near: least Jaccard similarity of character 5-grams at which the later document is removed."""
    contamination: list[str] = field(default_factory=list)
    """Files of benchmarks (as sources' paths); documents that hold a long stretch of one are dropped."""
    bad_records: Literal["stop", "set_aside"] = "stop"
    """A record that cannot be read stops the run, or is written to OUTPUT/set_aside/ and counted."""
    keep_dropped: bool = False
    """Write what is dropped to OUTPUT/dropped/, with the reason."""
    add_bos: bool | None = None
    """Store a beginning-of-text token before every document; default: as the tokenizer itself does."""
    add_eos: bool | None = None
    """Store an end-of-text token after every document; default: as the tokenizer itself does."""
    template: str = "alpaca-ja"
    """For instructions: alpaca-ja, alpaca-en, plain, rinna, llm-jp, chatml, qwen3, llama3, gemma; chat (the tokenizer's
    own chat template); or a .yaml file of your own."""
    train_on: Literal["responses", "last_response", "everything"] = "responses"
    """For instructions: which tokens are supervised."""
    max_length: int | None = None
    """For instructions: longest example in tokens; longer ones are counted, and treated as too_long says."""
    too_long: Literal["drop", "truncate_prompt", "split"] = "drop"
    """For instructions: drop, cut the first prompt from its left (or drop where that is not enough), or split."""
    workers: int | None = None
    """Processes (slurm: tasks at a time); default: one a core."""
    executor: Literal["local", "slurm", "ray"] = "local"
    """Where tasks run: processes of this machine, a Slurm cluster, a Ray cluster (pip install 'ray[default]')."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """For executor slurm."""

    def __post_init__(self):
        if not self.sources:
            raise UserError("prepare.sources is empty", "name at least one corpus")
        if len({source.kind for source in self.sources}) > 1:
            raise UserError("prepare.sources mixes text and instructions", "make a store of each")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise UserError(f"prepare.sources has the same name twice: {', '.join(names)}", "name each source")
        _require_share("prepare.validation_share", self.validation_share)
        if all(source.validation_share == 1 for source in self.sources):
            raise UserError("every source has validation_share 1", "leave a source to train on")
        if not 0.3 <= self.min_similarity <= 1:
            raise UserError(f"prepare.min_similarity is {self.min_similarity}", "use a similarity from 0.3 to 1")
        for index, source in enumerate(self.sources):
            try:
                rules = self.clean_of(source).rules
            except UserError as error:
                raise UserError(f"prepare.sources[{index}].{error.message}", error.hint) from None
            cleaned = self.clean_of(source)
            if rules == "none" and (cleaned.mask or cleaned.ng_words or cleaned.hojichar):
                raise UserError(
                    f"prepare.sources[{index}]: mask, ng_words or hojichar is set, which clean.rules none leaves out",
                    "set clean.rules to normalize",
                )
            if source.kind == "instructions" and rules == "swallow":
                raise UserError(
                    f"prepare.sources[{index}]: clean.rules is swallow, which measures documents, for instructions",
                    "set it to normalize or none",
                )
            share = source.validation_share
            if share is not None and not 0 <= share <= 1:
                raise UserError(f"prepare.sources[{index}].validation_share is {share}", "use a share from 0 to 1")
        for index, source in enumerate(self.sources):
            if self.kind == "text" and source.fields:
                raise UserError(f"prepare.sources[{index}].fields is set for text", "name the column with text")
        if self.kind == "text" and self.max_length is not None:
            raise UserError("prepare.max_length is set for text", "remove it: data.sequence_length cuts text into rows")
        if self.kind == "instructions" and self.add_eos is not None:
            raise UserError(
                "prepare.add_eos is set for instructions",
                "remove it: the end-of-text token always follows the response, supervised",
            )
        _require_positive("prepare.max_length", self.max_length)
        if self.too_long == "truncate_prompt" and self.train_on == "everything":
            raise UserError(
                "prepare.too_long is truncate_prompt with train_on everything, by which prompts are learned too",
                "set it to split or drop, or prepare.train_on to responses",
            )
        if self.too_long != "drop" and (self.max_length or 0) < 2:
            raise UserError(
                f"prepare.too_long is {self.too_long}, prepare.max_length {self.max_length}", "set it to 2 or more"
            )
        _require_positive("prepare.workers", self.workers)

    @property
    def kind(self) -> Literal["text", "instructions"]:
        return self.sources[0].kind

    def clean_of(self, source: Source) -> CleanConfig:
        """The rules of a source: prepare.clean with what the source changes."""
        changes = {key: value for key, value in dataclasses.asdict(source.clean).items() if value is not None}
        merged = dataclasses.replace(self.clean, **changes)
        default = "normalize" if source.kind == "text" else "none"
        return dataclasses.replace(merged, rules=merged.rules or default)

    def deduplicate_of(self, source: Source) -> Literal["none", "exact", "near"]:
        return source.deduplicate or self.deduplicate

    def validation_share_of(self, source: Source) -> float:
        return self.validation_share if source.validation_share is None else source.validation_share


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Small trained matrices beside the linear layers of a model that stays as it is (the extra `lora`)."""

    rank: int | None = None
    """Of the matrices, such as 16; null: no adapters, every weight is trained."""
    alpha: float | None = None
    """The matrices' product counts alpha / rank times; default: 2 × rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that are dropped."""
    targets: list[str] | None = None
    """Linear layers by the last part of their names, such as query_key_value; default: all of the decoder."""
    quantize: Literal["nf4"] | None = None
    """nf4: the frozen linear layers of the decoder are held in four bits a weight, which changes them a little."""

    def __post_init__(self):
        _require_positive("model.lora.rank", self.rank)
        _require_positive("model.lora.alpha", self.alpha)
        _require_share("model.lora.dropout", self.dropout)
        if self.rank is None and (self.alpha is not None or self.dropout or self.targets or self.quantize):
            raise UserError("model.lora has no rank", "set model.lora.rank, such as 16, or leave model.lora out")
        if self.targets == []:
            raise UserError("model.lora.targets is empty", "name linear layers, or leave it out for all")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where the model comes from: one of preset, pretrained, config (or train.start_from)."""

    preset: str | None = None
    """A named shape, initialised from train.seed: tiny, 1b, 3.6b, 6b, 7b, 13b, 20b, llama-1b, ..., qwen3-1.7b."""
    pretrained: str | None = None
    """A Hugging Face folder or hub name to start from, with its weights."""
    config: str | None = None
    """A Hugging Face config.json, or a folder that holds one, initialised from train.seed."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Trains adapters alone, beside the weights of model.pretrained."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer that the model was made with."""

    path: str | None = None
    """Folder whose contract must equal the store's; default: model.pretrained, where it has one."""


@dataclass(frozen=True, kw_only=True)
class MixedStore:
    """One store of a mixture."""

    name: str
    """Name of the store, in figures and in data.stages."""
    path: str
    """The token store made by `tsumugu prepare`."""
    weight: float | None = None
    """Its share of the rows, relative to the other weights (one of weight, tokens); 0: in later stages, or never."""
    tokens: int | None = None
    """Tokens over the whole run, spread evenly; weights divide the rest."""
    max_epochs: float | None = None
    """At most so many passes over it in the whole run; what it may not take goes to the others by weight."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Other weights from a step on."""

    from_step: int
    """Steps done when these weights begin to hold: the checkpoint of that step is the last without them."""
    weights: dict[str, float]
    """The weight of every store that has one."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how rows are made of it."""

    store: str | None = None
    """The token store made by `tsumugu prepare` (one of store, stores)."""
    stores: list[MixedStore] = field(default_factory=list)
    """Several token stores, read as a mixture."""
    stages: list[Stage] = field(default_factory=list)
    """With data.stores: other weights from a step on, as for annealing or replay."""
    sequence_length: int = 2048
    """Inputs a row; a row reads one token more."""
    packing: Literal["concatenate", "best_fit", "pad_left", "pad_right"] = "concatenate"
    """concatenate: fixed blocks over document boundaries. best_fit: whole documents packed into rows, kept apart.
    pad_left, pad_right: a document a row."""
    document_mask: bool = False
    """concatenate: the documents of a row are kept apart too: no attention across their ends, own positions."""
    group_by_length: bool = False
    """pad_left, pad_right: the rows of a step are dealt out by length, so that there is less padding."""
    audit: Literal["refuse", "warn", "off"] = "refuse"
    """What becomes of a store that would teach the wrong thing, by a look at some hundred rows: see `tsumugu audit`."""

    def __post_init__(self):
        _require_positive("data.sequence_length", self.sequence_length)
        padded = self.packing in ("pad_left", "pad_right")
        if self.document_mask and padded:
            raise UserError(
                f"data.document_mask is set for packing {self.packing}, whose rows hold one document each", "remove it"
            )
        if self.group_by_length and not padded:
            raise UserError(
                f"data.group_by_length is set for packing {self.packing}, whose rows are of one length", "remove it"
            )
        if self.store is not None and self.stores:
            raise UserError("data.store and data.stores are set, of which only one may be", "set data.store to null")
        if self.store is None and not self.stores:
            raise UserError("neither data.store nor data.stores is set", "name the token store")
        names = [store.name for store in self.stores]
        if len(set(names)) < len(names):
            raise UserError(f"data.stores has the same name twice: {', '.join(names)}", "name each store")
        places = [Path(store.path).resolve() for store in self.stores]
        for index, store in enumerate(self.stores):
            self._check_store(f"data.stores[{index}]", store)
            if (first := places.index(places[index])) < index:
                raise UserError(
                    f"data.stores[{index}] ({store.name}) is the store of data.stores[{first}] "
                    f"({self.stores[first].name}): {store.path}",
                    "list it once, with the weight or tokens of both",
                )
        weights = [store.weight for store in self.stores if store.weight is not None]
        if weights and not any(weights):
            raise UserError("no weight of data.stores is above 0", "give a store a weight")
        if self.stages and not self.stores:
            raise UserError("data.stages is set without data.stores", "name the stores there")
        for index, stage in enumerate(self.stages):
            self._check_stage(f"data.stages[{index}]", stage)
        steps = [0, *(stage.from_step for stage in self.stages)]
        for index, (earlier, later) in enumerate(itertools.pairwise(steps)):
            if later <= earlier:
                raise UserError(
                    f"data.stages[{index}].from_step is {later}, not above {earlier}", "list stages in their order"
                )

    def _check_store(self, key: str, store: MixedStore) -> None:
        if not re.fullmatch(r"[\w.-]+", store.name):
            raise UserError(f"{key}.name is {store.name!r}", "use letters, digits, and the signs . _ -")
        if (store.weight is None) == (store.tokens is None):
            found = "neither weight nor tokens" if store.weight is None else "weight and tokens"
            raise UserError(f"{key} ({store.name}) has {found}", "give it one of the two")
        if store.weight is not None:
            _require_not_negative(f"{key}.weight", store.weight)
        _require_positive(f"{key}.tokens", store.tokens)
        _require_positive(f"{key}.max_epochs", store.max_epochs)
        if store.tokens is not None and self.packing != "concatenate":
            raise UserError(
                f"{key}.tokens counts full rows, data.packing {self.packing} has shorter ones", "give it a weight"
            )

    def _check_stage(self, key: str, stage: Stage) -> None:
        weighted = [store.name for store in self.stores if store.weight is not None]
        for name, weight in stage.weights.items():
            if name not in weighted:
                reason = "has tokens" if name in [store.name for store in self.stores] else "is no name in data.stores"
                raise UserError(f"{key}.weights: {name} {reason}", f"stores with a weight: {', '.join(weighted)}")
            _require_not_negative(f"{key}.weights.{name}", weight)
        if missing := [name for name in weighted if name not in stage.weights]:
            raise UserError(f"{key}.weights lacks {', '.join(missing)}", "name every store with a weight, 0 for none")
        if not any(stage.weights.values()):
            raise UserError(f"{key}: no weight is above 0", "give a store a weight")

    @property
    def documents_apart(self) -> bool:
        """Whether rows hold several documents that must not see one another."""
        return self.packing == "best_fit" or self.document_mask

    @property
    def entries(self) -> list[MixedStore]:
        """data.stores, or the one store as such a list."""
        return [MixedStore(name="store", path=self.store, weight=1)] if self.store is not None else self.stores


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, in what batches, and from where."""

    max_steps: int | None = None
    """Length of the run in optimizer steps (one of max_steps, max_tokens, max_epochs)."""
    max_tokens: int | None = None
    """Length of the run in tokens (rows × sequence length), rounded up to whole steps."""
    max_epochs: float | None = None
    """Length of the run in passes over the training rows; the last step may hold fewer rows."""
    global_batch_size: int = 32
    """Rows an optimizer step, over all devices."""
    micro_batch_size: int = 1
    """Rows a forward pass on one device; gradient accumulation follows from it."""
    seed: int = 1234
    """Seed of the initial weights, of the order of the data and of dropout."""
    start_from: str | None = None
    """RUN or RUN@STEP: start from that run's newest (or that) checkpoint, as train.start_state says."""
    start_state: Literal["weights", "full"] = "weights"
    """weights: a new run with a new optimizer. full: go on at that step, with another length, schedule or mixture."""
    dtype: Literal["bfloat16", "float16", "float32", "float64"] | None = None
    """Compute dtype; default: bfloat16 on GPUs, float32 on CPUs. Masters and moments are float32 (float64: tests)."""
    deterministic: bool = False
    """The same bits in every run on the same devices, by kernels that may be slower; what has none is refused."""
    max_hours: float | None = None
    """Save and stop (exit code 3) in time for the checkpoint to be written within so many hours from the start."""
    stop_after: int | None = None
    """Save and stop (exit code 3) after this step, as if asked to; the length of the run stays as it is."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    log_norms: bool = False
    """Lines of metrics also carry the norms of parameters and gradients, of embeddings, every layer and the rest."""
    log_to: list[Literal["tensorboard", "mlflow", "wandb"]] = field(default_factory=lambda: ["tensorboard"])
    """Trackers beside metrics.jsonl. tensorboard is used where it is installed, the others must be."""
    profile_steps: list[int] | None = None
    """[FIRST, LAST]: a profiler trace of those steps from every process, in the run's folder profile/."""
    memory_snapshot: int | None = None
    """GPUs only: the allocations of this step, from every process, in the run's folder memory/."""
    hang_timeout: float | None = 1800.0
    """Seconds without progress after which every process says where it stands and ends with code 4; null: never."""

    def __post_init__(self):
        given = [name for name in ("max_steps", "max_tokens", "max_epochs") if getattr(self, name) is not None]
        if not given:
            raise UserError("none of train.max_steps, train.max_tokens, train.max_epochs is set", "set exactly one")
        if len(given) > 1:
            raise UserError(
                f"{' and '.join(f'train.{name}' for name in given)} are set, of which only one may be",
                f"set the others to null, such as --train.{given[-1]} null",
            )
        positive = ("global_batch_size", "micro_batch_size", "log_every", "max_hours", "stop_after", "hang_timeout")
        for name in (*given, *positive, "memory_snapshot"):
            _require_positive(f"train.{name}", getattr(self, name))
        if self.start_state == "full" and self.start_from is None:
            raise UserError("train.start_state is full without train.start_from", "set train.start_from to RUN@STEP")
        if self.profile_steps is not None:
            ordered = len(self.profile_steps) == 2 and 1 <= self.profile_steps[0] <= self.profile_steps[1]
            if not ordered:
                raise UserError(
                    f"train.profile_steps is {self.profile_steps}", "give the first and the last step, such as [5, 7]"
                )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"train.seed is {self.seed}", "use an integer from 0 to 2^63 - 1")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW."""

    learning_rate: float = 3e-4
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; biases and norms have none."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""

    def __post_init__(self):
        for name in ("learning_rate", "epsilon", "max_grad_norm"):
            _require_positive(f"optimizer.{name}", getattr(self, name))
        _require_not_negative("optimizer.weight_decay", self.weight_decay)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}", "use a number from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the steps; every kind ends exactly at min_learning_rate (constant: at the peak)."""

    kind: Literal["constant", "linear", "cosine", "exponential", "wsd"] = "cosine"
    """wsd: warmup, a plateau, then a decay over the last decay_steps."""
    warmup_steps: int = 0
    """Steps of linear warmup."""
    decay_steps: int | None = None
    """wsd only: steps of the final decay; default: a fifth of the run."""
    decay_shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """wsd only: shape of the final decay."""
    min_learning_rate: float = 0.0
    """The learning rate of the last step."""

    def __post_init__(self):
        _require_not_negative("schedule.warmup_steps", self.warmup_steps)
        _require_positive("schedule.decay_steps", self.decay_steps)
        if self.decay_steps is not None and self.kind != "wsd":
            raise UserError(f"schedule.decay_steps is set for kind {self.kind}", "remove it, or use kind wsd")
        _require_not_negative("schedule.min_learning_rate", self.min_learning_rate)
        if self.kind == "exponential" and self.min_learning_rate == 0:
            raise UserError("schedule.kind exponential never reaches 0", "set schedule.min_learning_rate above 0")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Degrees of the device mesh, and what is traded for memory or speed; but for fp8, none changes what is learned."""

    shard_degree: int | None = None
    """Devices over which parameters, gradients and optimizer state are sharded; default: all."""
    replicate_degree: int | None = None
    """Replicas of that group; default: all processes / shard_degree (/ tensor_degree)."""
    tensor_degree: int = 1
    """Processes that share the work on the same rows by heads and columns (GPT-NeoX, Llama, Qwen3; NVLink)."""
    fsdp: bool | None = None
    """FSDP2; default: except where one device holds all and nothing is offloaded, where it would be copies alone."""
    reshard_after_forward: Literal["auto", "always", "never"] = "auto"
    """Whether gathered weights of a layer go after forward; auto: unless all take less than a tenth of memory."""
    sync_each_micro_batch: bool | None = None
    """Whether devices exchange gradients in every micro batch, or once a step, until which they hold all sums in
    float32; default: once, where the sums take less than a fifth of a device's memory."""
    prefetch: int = 1
    """Layers gathered ahead of the one that is computed; more take memory, and help where gathering is late."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What backward computes again: nothing, all but matrix products and attention, or all but the layers' inputs."""
    checkpoint_every_nth_layer: int = 1
    """Activation checkpointing of every nth decoder layer alone."""
    compile: bool | None = None
    """torch.compile of every decoder layer; default: on GPUs where it can, not on CPUs."""
    activation_memory_budget: float | None = None
    """With compile: the share (0 to 1) of what backward needs of layers that is kept; the cheapest is recomputed."""
    fp8: Literal["tensorwise", "rowwise"] | None = None
    """Matrix products of decoder layers in fp8 by torchao, scaled by tensor or by row: faster, and other numbers."""
    chunked_loss: bool | None = None
    """Head and loss over chunks of tokens, so that logits are never whole in memory; default: where that is exact."""
    offload_activations: bool = False
    """What layers keep for backward waits in host memory (with activation_checkpointing none or full)."""
    offload_optimizer: bool = False
    """Master weights, gradients and moments are in host memory, and the optimizer's step is taken there."""

    def __post_init__(self):
        for name in ("shard_degree", "replicate_degree", "tensor_degree", "prefetch", "checkpoint_every_nth_layer"):
            _require_positive(f"parallel.{name}", getattr(self, name))
        budget = self.activation_memory_budget
        if budget is not None and not 0 <= budget <= 1:
            raise UserError(f"parallel.activation_memory_budget is {budget}", "use a number from 0 to 1")
        if self.tensor_degree > 1 and self.fp8:
            raise UserError(
                "parallel.fp8 does not know layers split by parallel.tensor_degree", "leave one of them out"
            )
        if self.tensor_degree > 1 and self.offload_activations:
            raise UserError(
                "parallel.offload_activations cannot move what a model split by tensor_degree keeps",
                "set parallel.offload_activations to false, or parallel.tensor_degree to 1",
            )
        if self.offload_activations and self.activation_checkpointing == "selective":
            raise UserError(
                "parallel.offload_activations cannot move what activation_checkpointing selective keeps",
                "set parallel.activation_checkpointing to full or none",
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every: int | None = None
    """Steps between checkpoints; one is always written after the last step, and before the decay of a wsd schedule."""
    keep: int = 2
    """Newest checkpoints that stay, at least 2: copying to an object store may upload and delete in any order."""
    keep_every: int | None = None
    """Checkpoints of every multiple of so many steps are written and stay for ever, as those before a decay do."""
    asynchronous: bool = True
    """Training goes on while a copy in host memory is written; false: it waits, which needs no memory for the copy."""

    def __post_init__(self):
        _require_positive("checkpoint.every", self.every)
        _require_positive("checkpoint.keep_every", self.keep_every)
        if self.keep < 2:
            raise UserError(f"checkpoint.keep is {self.keep}", "use 2 or more")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Validation during training."""

    every: int | None = None
    """Steps between validations; one is always done before the first and after the last step."""
    batches: int | None = None
    """Global batches a validation (of each store); default: the whole validation split."""

    def __post_init__(self):
        _require_positive("evaluate.every", self.every)
        _require_positive("evaluate.batches", self.batches)


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What becomes of a step that would do harm; such a step is never applied to the weights."""

    non_finite: Literal["stop", "skip"] = "stop"
    """A loss or gradient norm that is not finite ends the run, or the step is skipped."""
    spike: Literal["ignore", "skip", "rewind"] = "ignore"
    """A loss far above the recent ones: skip the step, or go back to the newest checkpoint and pass over its rows."""
    spike_deviations: float = 6.0
    """How many standard deviations above the mean of the recent losses are a spike."""
    spike_window: int = 128
    """How many losses are recent; before there are so many there is no spike."""
    max_skipped: int = 10
    """A run that would skip more steps than this one after another ends."""

    def __post_init__(self):
        _require_positive("guard.spike_deviations", self.spike_deviations)
        if self.spike_window < 2:
            raise UserError(f"guard.spike_window is {self.spike_window}", "use 2 or more")
        _require_positive("guard.max_skipped", self.max_skipped)


@dataclass(frozen=True, kw_only=True)
class SlurmSiteConfig:
    """A Slurm cluster, as whoever runs it describes it once for all who train there."""

    partition: str | None = None
    """Partition; default: the cluster's own."""
    account: str | None = None
    """Account that is charged."""
    time: str | None = None
    """Time limit as sbatch takes it, such as 24:00:00; default: the partition's."""
    processes_per_node: int | None = None
    """Processes on every node of a training: one a GPU."""
    exclusive: bool = True
    """Training has its nodes to itself."""
    options: dict[str, str] = field(default_factory=dict)
    """More sbatch options by their long names, such as gres: gpu:8 or qos: high."""
    setup: str | None = None
    """Shell lines that make `tsumugu` available on a node; default: the environment of the one who submits."""
    container: str | None = None
    """Image that training runs in; it must hold tsumugu."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """pyxis: `srun --container-image`. apptainer: `apptainer exec --nv`."""
    container_mounts: list[str] = field(default_factory=list)
    """What the container sees of the node, as the runtime takes it, such as /fsx:/fsx."""
    seconds_to_save: int = 300
    """So long before the time limit training is asked to save and stop; Slurm may ask up to a minute earlier."""
    auto_resume: bool = False
    """SageMaker HyperPod: `srun --auto-resume=1`, which replaces a node that fails and starts the step again."""

    def __post_init__(self):
        _require_positive("slurm.processes_per_node", self.processes_per_node)
        _require_positive("slurm.seconds_to_save", self.seconds_to_save)
        if self.container_mounts and self.container is None:
            raise UserError("slurm.container_mounts is set without slurm.container", "name the image too")


@dataclass(frozen=True, kw_only=True)
class SlurmSite:
    """The file of `tsumugu launch slurm --site`."""

    slurm: SlurmSiteConfig


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Configuration of `tsumugu prepare`."""

    prepare: PrepareConfig


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """Configuration of `tsumugu train`."""

    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    parallel: ParallelConfig
    checkpoint: CheckpointConfig
    evaluate: EvaluateConfig
    guard: GuardConfig

    def __post_init__(self):
        given = [name for name in ("preset", "pretrained", "config") if getattr(self.model, name) is not None]
        if self.train.start_from is not None:
            given.append("train.start_from")
        if len(given) != 1:
            found = " and ".join(given) if given else "nothing"
            raise UserError(
                f"the model must come from one place, but {found} is set",
                "set one of model.preset, model.pretrained, model.config, train.start_from",
            )
        if self.model.lora.rank is not None and (self.model.preset or self.model.config):
            raise UserError(
                f"model.lora is set beside model.{given[0]}, whose random weights it would leave as they are",
                "set model.pretrained instead, or leave model.lora out",
            )
        if self.model.lora.rank is not None and self.parallel.tensor_degree > 1:
            raise UserError(
                "model.lora does not go with parallel.tensor_degree: transformers' plans do not split adapters",
                "set parallel.tensor_degree to 1; adapters and frozen weights are sharded by parallel.shard_degree",
            )
        if self.parallel.fp8 and self.model.lora.rank is not None:
            raise UserError(
                "parallel.fp8 is set beside model.lora, whose frozen weights it does not serve", "leave it out"
            )
        if self.parallel.fp8 and self.data.packing in ("pad_left", "pad_right"):
            raise UserError(
                f"parallel.fp8 needs rows of one length, which data.packing {self.data.packing} does not make",
                "set data.packing to best_fit, or leave parallel.fp8 out",
            )
        if self.parallel.fp8 and self.data.sequence_length % 16:
            raise UserError("parallel.fp8 needs a data.sequence_length that is a multiple of 16", "change it")
        if len(self.data.stores) > 1 and self.train.max_epochs is not None:
            raise UserError(
                "train.max_epochs is set with several stores, of which each has its own epochs",
                "set train.max_steps or train.max_tokens, and max_epochs of data.stores",
            )
        if self.schedule.min_learning_rate > self.optimizer.learning_rate:
            raise UserError("schedule.min_learning_rate is above optimizer.learning_rate", "lower it")


def load(
    config_class: type, files: Sequence[str], flags: Sequence[str] = (), channels: Mapping[str, str] | None = None
) -> Any:
    """The configuration of class `config_class` from YAML files, later ones and then flags winning.

    Args:
        config_class: `Preparation`, `TrainingRun`, or another class whose fields are such sections.
        files: YAML files; a list in a later file replaces the earlier list whole.
        flags: `--section.key value` strings.
        channels: What `channel:NAME` stands for at the beginning of a value, by name; default: what the environment
            variable CHANNELS says.

    Raises:
        UserError: A file that cannot be read, an unknown key (with the nearest one), a wrong value, a channel that is
            not there.
    """
    loaded = load_unresolved(config_class, files, flags)
    return resolve_channels(loaded, read_channels() if channels is None else channels)


def read_channels() -> dict[str, str]:
    """Channels by name, of the environment variable CHANNELS.

    Raises:
        UserError: It is not NAME=PATH, with blanks between them.
    """
    try:
        return dict(split_channel(text) for text in shlex.split(os.environ.get(CHANNELS, "")))
    except ValueError as error:
        raise UserError(f"{CHANNELS}: {error}", "write NAME=PATH, with blanks between them") from None


def write_channels(channels: Mapping[str, str]) -> None:
    """Leaves channels for `load` in this process and in those that it starts."""
    os.environ[CHANNELS] = shlex.join(f"{name}={path}" for name, path in channels.items())


def split_channel(text: str) -> tuple[str, str]:
    """NAME=PATH as a pair.

    Raises:
        UserError: It is none, or the name has other signs than a channel's.
    """
    name, _, path = text.partition("=")
    if not path or not _CHANNEL.fullmatch(f"channel:{name}"):
        raise UserError(f"channel {text}: is not NAME=PATH", "give names letters, digits, and the signs . _ -")
    return name, path.rstrip("/") or "/"


def resolve_channels(content: Any, channels: Mapping[str, str], key: str = "") -> Any:
    """A copy of a configuration with the paths that `channel:NAME/…` stands for, at any depth.

    Raises:
        UserError: A channel that is not among them.
    """
    if dataclasses.is_dataclass(content) and not isinstance(content, type):
        values = {field.name: getattr(content, field.name) for field in dataclasses.fields(content)}
        prefix = f"{key}." if key else ""
        resolved = {name: resolve_channels(value, channels, prefix + name) for name, value in values.items()}
        return content if resolved == values else dataclasses.replace(content, **resolved)
    if isinstance(content, dict):
        return {name: resolve_channels(value, channels, f"{key}.{name}") for name, value in content.items()}
    if isinstance(content, list):
        return [resolve_channels(value, channels, f"{key}[{index}]") for index, value in enumerate(content)]
    if not isinstance(content, str) or not content.startswith("channel:"):
        return content
    match = _CHANNEL.fullmatch(content)
    if not match or match["name"] not in channels:
        known = f"; there is: {', '.join(channels)}" if channels else ""
        raise UserError(
            f"{key} is {content}, and no channel has that name{known}",
            f"give it: --channel {match['name'] if match else 'NAME'}=PATH",
        )
    return channels[match["name"]] + match["rest"]


def load_unresolved(config_class: type, files: Sequence[str], flags: Sequence[str] = ()) -> Any:
    """As `load`, but `channel:NAME/…` stays as it is written."""
    contents = {file: _read_yaml(file) for file in files}
    for file, content in contents.items():
        _check(content, config_class, file)
    replaced = _check_flags(flags, config_class)
    # merged here, since jsonargparse fills what an item of a later list lacks from the item of the earlier one
    merged = functools.reduce(_merge, contents.values(), {})
    if merged.get("data", {}).get("audit") is False:  # as YAML 1.1 reads an off without quotes
        merged["data"] = {**merged["data"], "audit": "off"}
    for key in replaced:
        section, _, name = key.rpartition(".")
        functools.reduce(lambda content, part: content.get(part, {}), section.split("."), merged).pop(name, None)
    configuration_parser = parser(config_class)
    try:
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
            yaml.safe_dump(merged, file, allow_unicode=True)
            file.flush()
            namespace = configuration_parser.parse_args([f"--config={file.name}", *flags])
        sections = configuration_parser.instantiate(namespace)
        return config_class(**{f.name: sections[f.name] for f in dataclasses.fields(config_class)})
    except UserError:
        raise
    except Exception as error:  # jsonargparse: ArgumentError, TypeError or ValueError, by the kind of mistake
        raise UserError(_readable(error, contents, flags), "see `--keys` for every key and its type") from None


def _merge(earlier: dict, later: dict) -> dict:
    """Sections are merged key by key; every other value of the later one replaces the earlier one whole."""
    both = {
        key: _merge(earlier[key], value)
        for key, value in later.items()
        if isinstance(value, dict) and isinstance(earlier.get(key), dict)
    }
    return earlier | later | both


def parser(config_class: type):
    """The jsonargparse parser of one configuration class (imported here: `tsumugu --help` does without it)."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    result = jsonargparse.ArgumentParser(exit_on_error=False, allow_abbrev=False, add_help=False)
    result.add_argument("--config", action="config", help="YAML file; may be given several times, later ones win")
    for section in dataclasses.fields(config_class):
        result.add_class_arguments(typing.get_type_hints(config_class)[section.name], section.name)
    return result


def write(config: Any, path: Path) -> None:
    """Writes the resolved configuration with every default as YAML that `load` reads; credentials are redacted."""
    text = yaml.safe_dump(redacted(dataclasses.asdict(config)), allow_unicode=True, sort_keys=False)
    path.write_text(text, encoding="utf-8")


def redacted(content: Any) -> Any:
    """A copy of nested dicts and lists in which no string shows a credential."""
    if isinstance(content, dict):
        return {key: redacted(value) for key, value in content.items()}
    if isinstance(content, list):
        return [redacted(value) for value in content]
    return redact(content) if isinstance(content, str) else content


class _StrictSafeLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML libraries silently keep the last; and 24:00:00 is a time, not
    86400 as in YAML 1.1."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, key in enumerate(keys):
            if key.value in [earlier.value for earlier in keys[:index]]:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} is given twice", problem_mark=key.start_mark)
        return node


def _construct_number(kind: str) -> None:
    tag = f"tag:yaml.org,2002:{kind}"
    construct = yaml.SafeLoader.yaml_constructors[tag]
    _StrictSafeLoader.add_constructor(
        tag, lambda loader, node: node.value if ":" in node.value else construct(loader, node)
    )


for _kind in ("int", "float"):
    _construct_number(_kind)


def _read_yaml(file: str) -> dict:
    try:
        content = yaml.load(Path(file).read_text(encoding="utf-8"), _StrictSafeLoader)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{file}: no such file", "give the path of a configuration file") from None
    except IsADirectoryError:
        raise UserError(f"{file}: is a folder", "give the path of a configuration file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}", "save it as UTF-8") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-45
        place = getattr(error, "problem_mark", None)
        where = f"{file}:{place.line + 1}" if place else file
        raise UserError(f"{where}: not YAML: {getattr(error, 'problem', error)}", "mend that line") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds no configuration", "write sections such as `train:` with keys below them")
    return content


def _check(content: Any, config_class: type, place: str, prefix: str = "") -> None:
    """Refuses what jsonargparse must not see: in place of a dataclass it takes a class's import path, and imports it.

    Args:
        content: What is written for `config_class`; must be a mapping whose keys the class has.
        config_class: A dataclass; fields that are dataclasses, or lists of them, are checked likewise.
        place: The file or flag, for messages.
        prefix: The keys that lead to `content`, such as `prepare.sources[0].`.
    """
    if not isinstance(content, dict):
        raise UserError(
            f"{place}: {prefix[:-1]} holds no keys but {_shown(content)}", "write `key: value` lines below it"
        )
    hints = typing.get_type_hints(config_class)
    for key, value in content.items():
        if key not in hints:
            raise UserError(f"{place}: unknown key {prefix}{key}", _nearest(str(key), list(hints), prefix))
        if dataclasses.is_dataclass(hints[key]):
            _check(value, hints[key], place, f"{prefix}{key}.")
        elif item_class := _item_class(hints[key]):
            if not isinstance(value, list):
                raise UserError(
                    f"{place}: {prefix}{key} is no list but {_shown(value)}", "write items that begin with -"
                )
            for index, item in enumerate(value):
                _check(item, item_class, place, f"{prefix}{key}[{index}].")


def _item_class(hint: Any) -> Any:
    """The dataclass of a list of dataclasses, else None."""
    items = typing.get_args(hint) if typing.get_origin(hint) is list else ()
    return next(filter(dataclasses.is_dataclass, items), None)


def _shown(value: Any) -> str:
    return yaml.safe_dump(value, allow_unicode=True, default_flow_style=True).removesuffix("...\n").strip()


def _check_flags(flags: Sequence[str], config_class: type) -> list[str]:
    """Refuses unknown flags, and values of flags as `_check` does; a whole section is no flag.

    Returns:
        The keys of lists of sections that flags give whole.
    """
    replaced = []
    hints = dict(_flag_names(config_class))
    for flag, following in itertools.zip_longest(flags, flags[1:], fillvalue=""):
        if not flag.startswith("--"):
            continue
        written, has_value, value = flag.partition("=")
        name = written.removeprefix("--").removesuffix("+")
        if name not in hints:
            raise UserError(f"unknown flag --{name}", _nearest(name, list(hints), "--"))
        section_class = hints[name]
        key = name.rpartition(".")[2]
        if not _item_class(typing.get_type_hints(section_class)[key]):
            continue
        try:
            items = yaml.load(value if has_value else following, _StrictSafeLoader)
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"{written}: not YAML: {getattr(error, 'problem', error)}", "mend its value") from None
        if written.endswith("+") and isinstance(items, dict):
            items = [items]  # one more item
        _check({key: items}, section_class, written, name.removesuffix(key))
        if not written.endswith("+"):
            replaced.append(name)
    return replaced


def _flag_names(config_class: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Every `section.key` below a class, and the dataclass that has the key."""
    for key, hint in typing.get_type_hints(config_class).items():
        if dataclasses.is_dataclass(hint):
            yield from _flag_names(typing.cast(type, hint), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", config_class


def _readable(error: Exception, contents: dict[str, dict], flags: Sequence[str]) -> str:
    """jsonargparse's message as `FILES: KEY: expected TYPE, got VALUE`; FILES are those that have the key."""
    message = re.sub(r"Problem with given class_path '[\w.]+': ", "", " ".join(str(error).split()))
    message = re.sub(r'Parser key "([^"]+)": ', r"\1: ", message)
    key, _, _ = message.partition(":")
    section, _, name = key.partition(".")
    places = [file for file, content in contents.items() if name in content.get(section, {})]
    if any(flag.startswith(f"--{key}") for flag in flags):
        places = []
    if found := re.fullmatch(r"((?:\S+: )+).*?(?:Got|Given) value: (.*)", message):
        types = re.findall(r"Expected a (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])", message)
        expected = " or ".join("null" if kind == "NoneType" else kind or choices for kind, choices in types)
        message = f"{found[1]}expected {expected}, got {found[2]}"
    return f"{', '.join(places)}: {message}" if places else message


def _nearest(key: str, keys: list[str], prefix: str) -> str:
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    return f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(sorted(keys))}"


def _require_positive(key: str, value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        raise UserError(f"{key} is {value}", "use a number above 0")


def _require_not_negative(key: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise UserError(f"{key} is {value}", "use 0 or more")


def _require_share(key: str, value: float) -> None:
    if not 0 <= value < 1:
        raise UserError(f"{key} is {value}", "use a share from 0 to below 1")

"""Runs over several stores: resumed exactly, validated store by store, and refused where the stores do not fit."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.ranks import run_ranks
from support.runs import StopAfter, figures, run_config
from support.stores import random_documents, write_store

from tsumugu import cli, config
from tsumugu.config import MixedStore, Stage, TrainingRun
from tsumugu.distributed.environment import process_group
from tsumugu.errors import UserError
from tsumugu.training import checkpoint
from tsumugu.training.trainer import Outcome, Trainer, planned_steps, train

STEPS = 6
STORES: dict[str, dict[str, Any]] = {
    "web": {"weight": 0.5},
    "code": {"weight": 0.3},
    "math": {"weight": 0.2, "max_epochs": 2},
}
STOPS = {"text": (2, 3), "instructions": (4,)}  # before, at and after the change of weights
STAGES = [(3, {"web": 0.1, "code": 0.1, "math": 0.8})]


@pytest.fixture(scope="module")
def stores(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three stores of either kind, the second without validation, and some that do not fit to them."""
    folder = tmp_path_factory.mktemp("stores")
    for seed, (name, number) in enumerate({"web": 40, "code": 20, "math": 3}.items()):
        documents = random_documents(number, seed=seed)
        validation = random_documents(9, seed=10 + seed, longest=9 + seed) if name != "code" else []
        write_store(folder / "text" / name, documents, validation)
        masks = [
            [int(position >= 1 + index % 4) for position in range(len(ids))] for index, ids in enumerate(documents)
        ]
        write_store(folder / "instructions" / name, documents, validation, masks)
    write_store(folder / "other tokenizer", random_documents(9, seed=1), fingerprint="of another tokenizer")
    write_store(folder / "another text", random_documents(40, seed=8))
    return folder


def config_of(
    made: Path, stores: Path, kind: str = "text", mixed: dict = STORES, stages=STAGES, **changes
) -> TrainingRun:
    entries = [MixedStore(**{"name": name, "path": str(stores / kind / name)} | keys) for name, keys in mixed.items()]
    defaults = {
        "model.config": str(made / "gpt_neox"),
        "data.store": None,
        "data.stores": entries,
        "data.stages": [Stage(from_step=step, weights=weights) for step, weights in stages],
        "data.packing": "concatenate" if kind == "text" else "pad_left",
        "train.max_steps": STEPS,
        "train.global_batch_size": 4,
        "evaluate.every": 2,
        "optimizer.learning_rate": 1e-2,
    }
    return run_config(stores, defaults | changes)


def take(config: TrainingRun, run_dir: Path, stop: int | None = None) -> tuple[Outcome, dict[str, torch.Tensor]]:
    with process_group() as environment:
        trainer = Trainer(config, run_dir, environment)
        outcome = trainer.train(StopAfter(stop))
        return outcome, {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def check_resuming(made: Path, stores: Path, folder: Path) -> None:
    for kind, stops in STOPS.items():
        whole, expected = take(config_of(made, stores, kind), folder / kind / "whole")
        for stop in stops:
            run_dir = folder / kind / f"stopped at {stop}"
            assert take(config_of(made, stores, kind), run_dir, stop)[0] == Outcome(stop, STEPS, interrupted=True)
            outcome, found = take(config_of(made, stores, kind), run_dir)
            assert outcome == whole
            assert all(torch.equal(_local(found[name]), _local(expected[name])) for name in expected)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return getattr(tensor, "_local_tensor", tensor)


def test_a_resumed_mixture_is_the_uninterrupted_one_to_the_bit_on_two_ranks(made: Path, stores: Path, tmp_path: Path):
    run_ranks(check_resuming, 2, made, stores, tmp_path)
    for kind, stops in STOPS.items():
        expected = figures(tmp_path / kind / "whole")
        assert [line["step"] for line in expected if "loss" in line] == list(range(1, STEPS + 1))
        plan = (tmp_path / kind / "whole" / "mixture.json").read_bytes()
        for stop in stops:
            assert figures(tmp_path / kind / f"stopped at {stop}") == expected
            assert (tmp_path / kind / f"stopped at {stop}" / "mixture.json").read_bytes() == plan
        # one process with other micro batches takes the same rows
        changes = {"train.micro_batch_size": 4}
        train(config_of(made, stores, kind, **changes), tmp_path / kind / "one")
        for line, other in zip(figures(tmp_path / kind / "one"), expected, strict=True):
            assert line == pytest.approx(other, rel=1e-4)


def test_what_was_seen_of_every_store_is_counted_and_reported(made: Path, stores: Path, tmp_path: Path, capsys):
    train(config_of(made, stores, "instructions"), tmp_path)
    lines = [line for line in figures(tmp_path) if "loss" in line]
    for line in lines:
        assert sum(line[f"tokens/{name}"] for name in STORES) == line["tokens_seen"]
    reported = json.loads((tmp_path / "mixture.json").read_text())
    found = {name: (store["planned_rows"], store["seen_rows"]) for name, store in reported["stores"].items()}
    # math has three rows, to be read twice, though its weights ask for 2.4 and 9.6
    assert found["math"] == (6, 6)
    assert all(planned == seen for planned, seen in found.values())
    assert sum(planned for planned, _ in found.values()) == STEPS * 4
    with process_group() as environment:
        mixture = Trainer(config_of(made, stores, "instructions"), tmp_path / "new", environment).data.mixture
    taken, rows = mixture.at(np.arange(STEPS * 4))
    for store, (name, number) in enumerate({"web": 40, "code": 20, "math": 3}.items()):
        lengths = np.array([len(ids) - 1 for ids in random_documents(number, seed=store)])
        for line in lines:
            here = taken[: 4 * line["step"]] == store
            assert line[f"tokens/{name}"] == lengths[rows[: 4 * line["step"]][here]].sum()
        assert reported["stores"][name]["seen_tokens"] == lines[-1][f"tokens/{name}"]
        assert reported["stores"][name]["seen_epochs"] == found[name][1] / number
    printed = [line for line in capsys.readouterr().err.splitlines() if line.split()[:1] == ["math"]]
    assert ["cut by max_epochs" in line for line in printed] == [True, True]  # at the start and at the end
    assert " 25.000%" in printed[1]


def test_the_report_is_replaced_whole(made: Path, stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train(config_of(made, stores, **{"train.max_steps": 4}), tmp_path)
    before = (tmp_path / "mixture.json").read_bytes()
    with process_group() as environment:
        trainer = Trainer(config_of(made, stores, **{"train.max_steps": 4}), tmp_path, environment)
    trainer.rows_by_store = [1, 2, 3]
    monkeypatch.setattr(Path, "replace", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        trainer._write_mixture()
    assert (tmp_path / "mixture.json").read_bytes() == before


def test_one_store_under_two_names_is_refused(made: Path, stores: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(stores / "text" / "web")
    mixed = {"web": {"weight": 1}, "again": {"weight": 1, "path": str(tmp_path / "link")}}
    with pytest.raises(UserError, match=r"data\.stores\[1\] \(again\) is the store of data\.stores\[0\] \(web\)"):
        config_of(made, stores, mixed=mixed, stages=[])


def test_one_store_is_reported_as_ever(made: Path, stores: Path, tmp_path: Path):
    alone = {"web": {"weight": 3, "max_epochs": 5}}
    train(config_of(made, stores, mixed=alone, stages=[]), tmp_path / "list")
    changes = {"data.stores": [], "data.store": str(stores / "text" / "web")}
    train(config_of(made, stores, stages=[], **changes), tmp_path / "short")
    assert figures(tmp_path / "list") == figures(tmp_path / "short")
    assert not (tmp_path / "list" / "mixture.json").exists()
    assert not [key for line in figures(tmp_path / "list") for key in line if "/" in key]
    identities = [checkpoint.read_state(tmp_path / run, STEPS)["identity"] for run in ("list", "short")]
    assert identities[0] == identities[1]


@pytest.mark.parametrize("kind", ["text", "instructions"])
def test_validation_of_each_store_is_that_of_the_store_alone(kind: str, made: Path, stores: Path, tmp_path: Path):
    with process_group() as environment:

        def evaluate(**changes) -> dict:
            shape = {"train.dtype": "float64", "train.micro_batch_size": 2}
            return Trainer(config_of(made, stores, kind, **shape | changes), tmp_path / "run", environment).evaluate()

        found = evaluate()
        alone = {
            name: evaluate(**{"data.stores": [], "data.stages": [], "data.store": str(stores / kind / name)})
            for name in STORES
        }
    assert alone.pop("code") == {}  # it has no validation split
    for name, expected in alone.items():
        for key, value in expected.items():
            assert found.pop(key.replace("validation_", f"validation/{name}/")) == pytest.approx(value, rel=1e-12)
    # over all: every supervised token counts as one
    tokens = {}
    for seed, name in ((0, "web"), (2, "math")):
        documents = random_documents(9, seed=10 + seed, longest=9 + seed)
        tokens[name] = sum(map(len, documents)) - 1 if kind == "text" else sum(len(ids) - 2 for ids in documents)
    loss = sum(alone[name]["validation_loss"] * tokens[name] for name in alone) / sum(tokens.values())
    assert found.pop("validation_loss") == pytest.approx(loss, rel=1e-12)
    assert found.pop("validation_perplexity") == pytest.approx(math.exp(loss), rel=1e-12)
    assert found.keys() == {"validation_bits_per_byte"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mixed": {**STORES, "web": {"weight": 0.6}}}, "data.stores.web.weight was 0.5, now 0.6"),
        ({"mixed": {**STORES, "math": {"weight": 0.2}}}, "data.stores.math.max_epochs was 2, now None"),
        ({"stages": []}, r"data.stages was \[.*\], now None"),
        ({"stages": [(4, STAGES[0][1])]}, "data.stages was .*'from_step': 3.*, now .*'from_step': 4"),
        ({"mixed": {name: STORES[name] for name in ("code", "web", "math")}}, r"data.stores was \['web', 'code'"),
        ({"mixed": {**STORES, "web": {"weight": 0.5, "path": "another text"}}}, r"data.stores.web was [0-9a-f]+, now"),
        ({"mixed": {"web": {"weight": 1}}, "stages": []}, r"data.stages was .*, now None"),
    ],
)
def test_what_the_mixture_depends_on_must_not_change(change: dict, named: str, made: Path, stores: Path, stopped: Path):
    change = {"mixed": STORES, "stages": STAGES} | change
    mixed = {
        name: {**keys, "path": str(stores / keys["path"])} if "path" in keys else keys
        for name, keys in change["mixed"].items()
    }
    with pytest.raises(UserError, match=named):
        train(config_of(made, stores, mixed=mixed, stages=change["stages"]), stopped)


@pytest.fixture(scope="module")
def stopped(made: Path, stores: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    take(config_of(made, stores), run_dir, 2)
    return run_dir


@pytest.mark.parametrize(
    ("mixed", "changes", "message"),
    [
        ({"web": {"weight": 1}, "x": {"weight": 1, "path": "nowhere"}}, {}, "nowhere holds no token store"),
        (
            {"web": {"weight": 1}, "x": {"weight": 1, "path": "other tokenizer"}},
            {},
            "other tokenizer was made with another tokenizer than .*text/web",
        ),
        (
            {"web": {"weight": 1}, "x": {"weight": 1, "path": "instructions/web"}},
            {},
            "instructions/web has kind instructions, .*text/web has text",
        ),
        (
            {"x": {"weight": 1, "path": "instructions/web"}, "code": {"weight": 1, "path": "instructions/code"}},
            {},
            "data.packing is concatenate, but .*instructions/web holds instructions",
        ),
        (STORES, {"train.max_steps": None, "train.max_epochs": 1}, "train.max_epochs is set with several stores"),
        (
            {"math": {"weight": 1, "max_epochs": 1}, "web": {"weight": 1, "max_epochs": 0.1}},
            {},
            "leaves rows for 1 steps",
        ),
        (
            {"web": {"weight": 1}, "x": {"weight": 1, "path": "instructions/web"}},
            {"data.packing": "pad_left", "data.sequence_length": 8},
            "has kind instructions",
        ),
    ],
)
def test_stores_that_do_not_fit_are_refused(
    mixed: dict, changes: dict, message: str, made: Path, stores: Path, tmp_path
):
    mixed = {
        name: {**keys, "path": str(stores / keys["path"])} if "path" in keys else keys for name, keys in mixed.items()
    }
    with pytest.raises(UserError, match=message):
        planned_steps(config_of(made, stores, mixed=mixed, stages=[], **changes))
    with pytest.raises(UserError, match=message):
        train(config_of(made, stores, mixed=mixed, stages=[], **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


A, B = {"name": "a", "path": "a", "weight": 1}, {"name": "b", "path": "b", "weight": 1}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "neither data.store nor data.stores is set"),
        ({"store": "a", "stores": [A]}, "data.store and data.stores are set, of which only one may be"),
        ({"stores": [A, A]}, "data.stores has the same name twice: a, a"),
        ({"stores": [A, {**B, "name": "b/c"}]}, r"data.stores\[1\].name is 'b/c'"),
        ({"stores": [A, {**B, "tokens": 5}]}, r"data.stores\[1\] \(b\) has weight and tokens"),
        ({"stores": [{**A, "weight": None}, B]}, r"data.stores\[0\] \(a\) has neither weight nor tokens"),
        ({"stores": [A, {**B, "weight": -1}]}, r"data.stores\[1\].weight is -1"),
        ({"stores": [A, {**B, "weight": math.nan}]}, r"data.stores\[1\].weight is nan"),
        ({"stores": [A, {**B, "max_epochs": 0}]}, r"data.stores\[1\].max_epochs is 0"),
        ({"stores": [A, {**B, "weight": None, "tokens": 0}]}, r"data.stores\[1\].tokens is 0"),
        ({"stores": [{**A, "weight": 0}, {**B, "weight": 0}]}, "no weight of data.stores is above 0"),
        ({"stores": [{**A, "weight": 0}, {**B, "weight": None, "tokens": 5}]}, "no weight of data.stores is above 0"),
        (
            {"stores": [A, {**B, "weight": None, "tokens": 5}], "packing": "pad_left"},
            r"data.stores\[1\].tokens counts full rows",
        ),
        ({"store": "a", "stages": [{"from_step": 3, "weights": {"a": 1}}]}, "data.stages is set without data.stores"),
        ({"stores": [A, B], "stages": [{"from_step": 3, "weights": {"a": 1, "c": 1}}]}, r"weights: c is no name in"),
        ({"stores": [A, B], "stages": [{"from_step": 3, "weights": {"a": 1}}]}, r"data.stages\[0\].weights lacks b"),
        (
            {
                "stores": [A, {**B, "weight": None, "tokens": 5}],
                "stages": [{"from_step": 3, "weights": {"a": 1, "b": 1}}],
            },
            r"data.stages\[0\].weights: b has tokens",
        ),
        (
            {"stores": [A, B], "stages": [{"from_step": 3, "weights": {"a": 0, "b": 0}}]},
            r"stages\[0\]: no weight is above",
        ),
        ({"stores": [A, B], "stages": [{"from_step": 3, "weights": {"a": 1, "b": -1}}]}, r"weights.b is -1"),
        ({"stores": [A, B], "stages": [{"from_step": 0, "weights": {"a": 1, "b": 1}}]}, r"from_step is 0, not above 0"),
        (
            {"stores": [A, B], "stages": [{"from_step": step, "weights": {"a": 1, "b": 1}} for step in (5, 9, 9)]},
            r"data.stages\[2\].from_step is 9, not above 9",
        ),
        ({"stores": [A, {**B, "wieght": 2}]}, r"unknown key data.stores\[1\].wieght \(did you mean .*weight"),
        ({"stores": [A, B], "stages": [{"from": 5, "weights": {}}]}, r"unknown key data.stages\[0\].from "),
        ({"stores": [A, {**B, "weight": "much"}]}, "data.stores"),
    ],
)
def test_configurations_that_contradict_themselves_are_one_line(data: dict, message: str, tmp_path: Path, capsys):
    content = {"model": {"preset": "tiny"}, "data": data, "train": {"max_steps": 20}}
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(content).replace("NaN", ".nan"))
    with pytest.raises(UserError, match=message):
        config.load(TrainingRun, [str(file)])
    assert cli.main(["train", "--config", str(file), "--run-dir", str(tmp_path / "run")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("tsumugu: ")


def test_a_written_mixture_reads_back_equal(made: Path, stores: Path, tmp_path: Path):
    written = config_of(made, stores)
    config.write(written, tmp_path / "config.yaml")
    assert config.load(TrainingRun, [str(tmp_path / "config.yaml")]) == written

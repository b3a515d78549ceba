"""The notebooks run from top to bottom, one after another on one folder; and the commands that they would start."""

import ast
import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tsumugu import notebooks
from tsumugu.cli import main

FOLDER = Path(__file__).parents[1] / "notebooks"
ORDER = (
    "data-preprocess",
    "pretrain-jp-gpt-neox",
    "finetune-jp-gpt-neox",
    "instruct-jp-gpt-neox",
    "pretrain-gpt-neox",
    "convert-hf",
)
SHORT = ["--train.max_epochs=null", "--train.max_steps=3", "--train.log_every=1", "--schedule.warmup_steps=0"]
SHORT += ["--evaluate.batches=1", "--train.global_batch_size=2"]


def read(name: str) -> list[dict]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def execute(name: str, settings: dict) -> Iterator[object]:
    """Runs the code cells as a kernel does; the value of every cell that ends with an expression.

    Args:
        name: Of the notebook.
        settings: What is set after the cell with the tag `parameters`, in place of an edit of that cell.
    """
    variables: dict = {"__name__": "__main__"}
    for cell in read(name):
        tags = cell["metadata"].get("tags", [])
        if cell["cell_type"] != "code":
            continue
        body = ast.parse("".join(cell["source"]), filename=f"{name}.ipynb {cell['id']}")
        last = body.body.pop() if body.body and isinstance(body.body[-1], ast.Expr) else None
        exec(compile(body, f"{name}.ipynb", "exec"), variables)
        if isinstance(last, ast.Expr):
            yield eval(compile(ast.Expression(last.value), f"{name}.ipynb", "eval"), variables)
        if "parameters" in tags:
            assert settings.keys() <= variables.keys()
            variables |= settings


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands run in this process, without new interpreters; all but the first training, which is started for real."""
    real, ran = notebooks._start, []

    def start(arguments) -> tuple[int, str]:
        trained = any(earlier[:2] == ["launch", "local"] for earlier in ran)
        ran.append(list(arguments))
        if arguments[0] == "launch" and not trained:
            return real(arguments)
        command = ["train", *arguments[2:]] if arguments[:2] == ("launch", "local") else list(arguments)
        return main(command), ""

    def captured(arguments) -> tuple[int, str, str]:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            return main(list(arguments)), output.getvalue(), ""

    monkeypatch.setattr(notebooks, "_start", start)
    monkeypatch.setattr(notebooks, "_captured", captured)
    return ran


def test_all_six_run_one_after_another(here, tmp_path, capsys):
    shown = {}
    for name in ORDER:
        settings = {"WORK": str(tmp_path), "FLAGS": [] if name == "data-preprocess" else SHORT}
        shown[name] = list(filter(None, execute(name, settings)))
    for name, values in shown.items():
        pictures = [value._repr_png_() for value in values if isinstance(value, notebooks.Picture)]
        assert pictures, name
        assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    for name in ("data-preprocess", "instruct-jp-gpt-neox"):
        pages = "".join(value._repr_html_() for value in shown[name] if isinstance(value, notebooks.Page))
        assert 'class="supervised"' in pages
        assert 'class="stop"' in pages
    generated = [command for command in here if command[0] == "generate"]
    assert {Path(command[1]).name for command in generated} == {
        "model-base",
        "model-finetune",
        "model-instruct",
        "model-en",
    }
    output = capsys.readouterr().out
    assert output.count("ml.p4d.24xlarge × 1: メモリに収まります") == 4
    assert output.count("費用: ") == 4
    for name in ORDER[:3]:  # once more: what is done stays
        list(execute(name, {"WORK": str(tmp_path), "FLAGS": [] if name == "data-preprocess" else SHORT}))
    again = capsys.readouterr().out
    assert again.count("already done") >= 7  # stores, trainings and exports
    assert "gpt_neox torch.bfloat16" in output  # what stock transformers made of it, before it generated
    assert "糸紡ぎとは、" in output


@pytest.mark.parametrize("name", ORDER)
def test_outputs_are_stripped(name):
    """jupyter nbconvert --clear-output --inplace notebooks/*.ipynb"""
    for cell in read(name):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def test_there_are_no_others():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_one_cell_is_all_that_differs_on_sagemaker(name):
    settings = [cell for cell in read(name) if "parameters" in cell["metadata"].get("tags", [])]
    assert len(settings) == 1
    variables: dict = {}
    exec("".join(settings[0]["source"]), variables)
    assert variables["LAUNCH"] == "local"
    assert variables["SAGEMAKER"].keys() == {"role", "image", "bucket", "instance-type", "instance-count", "max-hours"}


@pytest.mark.parametrize("name", ["data-preprocess", "pretrain-jp-gpt-neox", "pretrain-gpt-neox"])
def test_what_the_cell_says_is_a_request_that_sagemaker_knows(name, tmp_path, capsys):
    """A processing job has other types of instances than a training job."""
    [settings] = [cell for cell in read(name) if "parameters" in cell["metadata"].get("tags", [])]
    variables: dict = {}
    exec("".join(settings["source"]), variables)
    recipe = tmp_path / "recipe.yaml"
    if name == "data-preprocess":
        stage, inputs = "prepare", {"prepare.tokenizer": "work/tokenizer", "corpus": "work/corpus"}
        recipe.write_text("prepare: {sources: [{name: a, path: 'channel:corpus/a.jsonl'}], output: x, tokenizer: x}")
    else:
        stage, inputs = "train", {"data.store": "work/store"}
        recipe.write_text("model: {preset: tiny}\ntrain: {max_steps: 3}")
    command = notebooks.sagemaker_command(str(recipe), "work/out", inputs, [], variables["SAGEMAKER"], stage)
    assert main([*command, "--dry-run"]) == 0, capsys.readouterr().err


def test_what_was_downloaded_is_not_launched_again(said, tmp_path, capsys):
    happened = said("")
    notebooks.launch("sagemaker", "r.yaml", str(tmp_path), {"data.store": "work/store"}, [], JOB)
    assert not happened
    assert str(tmp_path) in capsys.readouterr().out


# --- what the notebooks call -----------------------------------------------------------------------------------------

JOB = {"role": "arn", "image": "uri", "bucket": "b", "instance-type": "ml.p4d.24xlarge", "instance-count": 2}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list]:
    """Sets what every command says, and lists commands and uploads in their order."""
    happened: list = []

    def set_answer(answer: str) -> list:
        monkeypatch.setattr(notebooks, "_upload", lambda folder, uri: happened.append((folder, uri)))
        monkeypatch.setattr(notebooks, "_start", lambda arguments: (happened.append(list(arguments)) or 0, answer))
        return happened

    return set_answer


def test_a_training_on_sagemaker_uploads_launches_and_downloads(said):
    happened = said(
        "2 × ml.p4d.24xlarge\nfirst-261128-1000: begins s3://b/tsumugu/first/\nfirst-261128-1000: Completed\n"
    )
    inputs = {"data.store": "work/store", "model.pretrained": "work/base"}
    notebooks.launch("sagemaker", "r.yaml", "work/first", inputs, ["--train.max_steps=3"], JOB)
    store, model = (f"s3://b/tsumugu-notebooks/first/{name}" for name in ("data-store", "model-pretrained"))
    assert happened == [
        ("work/store", store),
        ("work/base", model),
        [
            *("launch", "sagemaker", "--config=r.yaml", "--run-name=first", "--role=arn", "--image=uri", "--bucket=b"),
            *("--instance-type=ml.p4d.24xlarge", "--instance-count=2"),
            *(f"--channel=data-store={store}", "--data.store=channel:data-store"),
            *(f"--channel=model-pretrained={model}", "--model.pretrained=channel:model-pretrained"),
            "--train.max_steps=3",
        ],
        ["launch", "sagemaker", "download", "first-261128-1000", "--run-dir=work/first"],
    ]


def test_a_preparation_on_sagemaker(said):
    happened = said("store-1: begins s3://b/tsumugu/store/\n")
    inputs = {"prepare.tokenizer": "work/tokenizer", "corpus": "work/corpus"}
    notebooks.launch("sagemaker", "r.yaml", "work/store", inputs, [], JOB, stage="prepare")
    command = happened[2]
    assert "--stage=prepare" in command
    assert command[-3:] == [
        "--channel=prepare-tokenizer=s3://b/tsumugu-notebooks/store/prepare-tokenizer",
        "--prepare.tokenizer=channel:prepare-tokenizer",
        "--channel=corpus=s3://b/tsumugu-notebooks/store/corpus",
    ]
    assert happened[3] == ["launch", "sagemaker", "download", "store-1", "--output=work/store"]


def test_a_folder_is_uploaded_whole(tmp_path, capsys):
    (tmp_path / "store" / "train").mkdir(parents=True)
    (tmp_path / "store" / "train" / "00000.bin").write_bytes(b"ids")
    notebooks._upload(str(tmp_path / "store"), "memory://bucket/place")
    import fsspec

    assert fsspec.filesystem("memory").cat_file("/bucket/place/train/00000.bin") == b"ids"
    assert "memory://bucket/place" in capsys.readouterr().out


def test_a_command_that_fails_ends_the_cell_and_says_why(capsys):
    with pytest.raises(RuntimeError, match="`tsumugu report` ended with exit code 2"):
        notebooks.run("report")  # without a run: refused before anything heavy is imported
    assert "tsumugu: " in capsys.readouterr().out


PLAN = {"fits": True, "memory_gib": {"weights": 10.0, "total": 31.5}, "device_memory_gib": 40.0, "days": 2.5}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"cost": {"currency": "USD", "amount": 2400.0, "price_per_hour": 40.0, "price_date": "2026-11-01"}},
            [
                "p4d × 1: メモリに収まります (31.5 GiB / 40 GiB)",
                "学習時間: 約 2.5 日",
                "費用: 約 2,400.00 USD (1 時間 40.00 USD、2026-11-01 時点)",
            ],
        ),
        ({"cost": None, "days": 0.25}, ["学習時間: 約 6.0 時間", "費用: 不明"]),
        ({"cost": None, "days": 0.001}, ["学習時間: 約 1 分"]),
        ({"fits": False, "days": None, "cost": None}, ["メモリに収まりません", "学習時間: 不明", "費用: 不明"]),
    ],
)
def test_an_estimate_says_what_is_not_known(changes, expected):
    text = "\n".join(notebooks.describe_plan(PLAN | changes, "p4d × 1"))
    for line in expected:
        assert line in text


def test_an_estimate_asks_plan_as_it_is_documented(monkeypatch, capsys):
    asked = []

    def answer(arguments) -> tuple[int, str, str]:
        asked.extend(arguments)
        return 1, json.dumps(PLAN | {"fits": False}), ""

    monkeypatch.setattr(notebooks, "_captured", answer)
    notebooks.estimate("r.yaml", {"data.store": "s"}, "ml.p4d.24xlarge", 2, ["--train.max_steps=3"])
    assert asked == [
        *("plan", "--config=r.yaml", "--instance-type=ml.p4d.24xlarge", "--instance-count=2"),
        *("--data.store=s", "--train.max_steps=3", "--json"),
    ]
    assert "メモリに収まりません" in capsys.readouterr().out

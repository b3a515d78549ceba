"""The README.md of an exported folder, English and Japanese: base model and its terms, data, figures, certificate."""

import re
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from tsumugu import config as configuration
from tsumugu.errors import UserError
from tsumugu.model import lora
from tsumugu.model.adapter import base_name, on_hub
from tsumugu.training.metrics import read_metrics

# What the licences of well-known base models ask of a model that is made from theirs, as of 2026: by the id that their
# cards name. Not legal advice; the licence itself counts.
_TERMS = {
    r"llama-?(3|4).*": (
        'The name must begin with "Llama"; show "Built with Llama"; hand on the licence and its notice.',
        "モデル名は「Llama」で始め、「Built with Llama」と表示し、ライセンスと著作権表示を添えてください。",
    ),
    r"llama-?2": (
        "Hand on the licence with its notice; its acceptable use policy holds.",
        "ライセンスと著作権表示を添えてください。利用規約（Acceptable Use Policy）が適用されます。",
    ),
    r"gemma": (
        "Hand on the Gemma terms of use with their restrictions, and say that files were changed.",
        "Gemma 利用規約とその制限を引き継ぎ、変更したファイルであることを明記してください。",
    ),
    r"cc-by-sa.*": (
        "Name the original; publish under the same licence.",
        "原作者を表示し、同じライセンスで公開してください。",
    ),
    r"cc-by-nc.*": ("Name the original; no commercial use.", "原作者を表示してください。商用利用はできません。"),
    r"cc-by-\d.*": ("Name the original.", "原作者を表示してください。"),
    r"apache-2\.0|mit|bsd.*": ("Keep its licence and notices.", "ライセンスと著作権表示を残してください。"),
}


def model_card(
    model: PreTrainedModel,
    origin: dict,
    certified: dict,
    run_dir: Path | None,
    adapters: lora.Adapters | None,
) -> str:
    """Markdown with the front matter that the hub reads.

    Args:
        model: On the meta device.
        origin: Of the export.
        certified: Of `certificate.certify`.
        run_dir: Of the run, if it is one.
        adapters: Where the folder holds these alone.
    """
    run = _configuration(run_dir) if run_dir else None
    base = adapters.base if adapters else _base(run) if run else None
    license = _license(base) if base else {}
    front: dict[str, Any] = {"library_name": "peft" if adapters else "transformers", "pipeline_tag": "text-generation"}
    front |= license
    if base and on_hub(base):
        front["base_model"] = base
    front["tags"] = ["tsumugu"]
    kind = "LoRA adapter" if adapters else type(model).__name__
    sections = [
        f"# {kind}",
        "Trained with tsumugu. / tsumugu で学習したモデルです。",
        *_untrained(origin),
        "\n".join(_facts(model, origin, adapters)),
        *_base_section(base, license, run),
        *_data_section(run),
        *_figures_section(run_dir, origin),
        _certificate_section(certified),
        _usage(adapters, model, origin),
    ]
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n" + "\n\n".join(sections) + "\n"


def _untrained(origin: dict) -> list[str]:
    if origin.get("step") == 0:
        return ["**This model has taken no training step.** / **まだ 1 ステップも学習していません。**"]
    return []


def _facts(model: PreTrainedModel, origin: dict, adapters: lora.Adapters | None) -> list[str]:
    lines = [
        f"- Parameters / パラメータ数: {sum(p.numel() for p in model.parameters()):,}",
        f"- dtype: {origin['dtype']}",
    ]
    if "step" in origin:
        lines.append(f"- Step / ステップ: {origin['step']:,} ({origin['tokens_seen']:,} tokens / トークン)")
    if adapters:
        lines.append(f"- LoRA: rank {adapters.rank}, alpha {adapters.alpha:g}, {', '.join(adapters.targets)}")
    if template := origin.get("template"):
        name = template if isinstance(template, str) else "chat_template.jinja"
        lines.append(f"- Prompt template / プロンプト: `{name}`")
    return lines


def _base_section(base: str | None, license: dict[str, str], run: Any) -> list[str]:
    if base is None:
        return (
            ["## Base model / ベースモデル\n\nNone: trained from random weights. / なし（乱数の初期値から学習）。"]
            if run
            else []
        )
    lines = [f"## Base model / ベースモデル\n\n- {base_name(base)}"]
    name = license.get("license_name") or license.get("license", "")
    lines.append(f"- License / ライセンス: {name or 'unknown here: look it up / 不明（確認してください）'}")
    for pattern, (english, japanese) in _TERMS.items():
        if re.fullmatch(pattern, name.lower()):
            lines.append(f"- {english} / {japanese}")
    return ["\n".join(lines)]


def _data_section(run: Any) -> list[str]:
    if not run:
        return []
    lines = ["## Data / データ", "", "| store | weight |", "| --- | --- |"]
    lines += [f"| {store.name or Path(store.path).name} | {store.weight} |" for store in run.data.entries]
    return ["\n".join(lines)]


def _figures_section(run_dir: Path | None, origin: dict) -> list[str]:
    lines = read_metrics(run_dir) if run_dir else []
    found: dict[str, float] = {}
    for line in lines:
        if line["step"] <= origin["step"]:
            found |= {key: value for key, value in line.items() if key in _FIGURES and value is not None}
    if not found:
        return []
    rows = [f"| {_FIGURES[key]} | {value:.4g} |" for key, value in found.items()]
    return ["\n".join(["## Figures / 学習時の数値", "", "| | |", "| --- | ---: |", *rows])]


_FIGURES = {
    "loss": "training loss / 学習損失",
    "validation_loss": "validation loss / 検証損失",
    "validation_perplexity": "validation perplexity / 検証パープレキシティ",
    "validation_bits_per_byte": "validation bits per byte / 検証 bits/byte",
}


def _certificate_section(certified: dict) -> str:
    lines = [
        "## Certificate / 証明書",
        "",
        "Reloaded in a fresh process and compared with the training checkpoint (`certificate.json`; "
        "`tsumugu export --verify` checks it again).",
        "新しいプロセスで読み込み直し、学習時のチェックポイントと比べた結果です。",
        "",
        "| transformers | torch | largest logit difference | perplexity (checkpoint) | greedy agreement |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for found in certified["verified"]:
        lines.append(
            f"| {found['transformers']} | {found['torch']} | {found['logit_difference']:.2g} | "
            f"{found['perplexity']:.5g} ({found['perplexity_of_checkpoint']:.5g}) | "
            f"{found['greedy_agreement_with_checkpoint']:.1%} |"
        )
    failures = [f"- **{failure}**" for failure in certified["failures"]]
    return "\n".join([*lines, *(["", *failures] if failures else [])])


def _usage(adapters: lora.Adapters | None, model: PreTrainedModel, origin: dict) -> str:
    names = "AutoModelForCausalLM" + (", AutoTokenizer" if origin["tokenizer"] else "")
    quantized = adapters is not None and adapters.quantize is not None
    names += ", BitsAndBytesConfig" if quantized else ""
    lines = ["from peft import PeftModel"] if adapters else []
    lines += [f"from transformers import {names}", ""]
    if origin["tokenizer"]:
        lines.append('tokenizer = AutoTokenizer.from_pretrained("this-folder")')
    if adapters:
        held = ""
        if quantized:  # the adapters belong to what was made of the base, and not to the base
            lines.append('held = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")')
            held = ", quantization_config=held"
        lines.append(f'model = AutoModelForCausalLM.from_pretrained("{base_name(adapters.base)}"{held})')
        if adapters.new_rows:
            lines.append(f"model.resize_token_embeddings({model.config.vocab_size})")
        lines.append('model = PeftModel.from_pretrained(model, "this-folder")')
    else:
        lines.append('model = AutoModelForCausalLM.from_pretrained("this-folder")')
    return "\n".join(["```python", *lines, "```"])


def _configuration(run_dir: Path) -> Any:
    try:
        return configuration.load(configuration.TrainingRun, [str(run_dir / "config.yaml")])
    except UserError:
        return None


def _base(run: Any) -> str | None:
    """The model that a run, or the run that it went on from, started with."""
    seen = []
    while run and run.train.start_from and run.train.start_from not in seen:
        seen.append(run.train.start_from)
        run = _configuration(Path(run.train.start_from.partition("@")[0]))
    return run.model.pretrained if run else None


def _license(base: str) -> dict[str, str]:
    """What the card of a base model names as its licence: of its folder, or of the hub's local copy."""
    from huggingface_hub import try_to_load_from_cache

    card = Path(base) / "README.md" if Path(base).is_dir() else try_to_load_from_cache(base, "README.md")
    if not isinstance(card, (str, Path)) or not Path(card).is_file():
        return {}
    parts = Path(card).read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    try:
        front = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else None
    except yaml.YAMLError:
        front = None
    keys = ("license", "license_name", "license_link")
    return {key: str(front[key]) for key in keys if front.get(key)} if isinstance(front, dict) else {}

"""From a run to a Hugging Face folder: what `save_pretrained` would write, without ever holding the whole model.

transformers 4 reads it too: transformers 5 alone writes only `rope_parameters`, which 4.57 ignores silently, so the
older names are written beside them.
"""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from tsumugu.data.instructions import find_template, jinja_of
from tsumugu.data.instructions.encode import stop_id
from tsumugu.errors import UserError
from tsumugu.model import build, lora, nf4
from tsumugu.tokenizer.contract import CHAT_TEMPLATE, Contract, copy_tokenizer, read_contract
from tsumugu.training import checkpoint

ORIGIN = "tsumugu.json"
MAX_FILE_BYTES = 5 * 10**9

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def export(run: str, output: Path, step: int | None = None, dtype: str | None = None, adapter: bool = False) -> bool:
    """Writes the model of a checkpoint as a Hugging Face folder.

    Adapters (of a run with `model.lora`) are merged: base + alpha / rank · B A, computed in float32 and then cast. For
    that the whole base model is read into memory, in its own dtype.

    Args:
        run: RUN or RUN@STEP.
        output: The folder to make; it appears when it is whole.
        step: The same as @STEP.
        dtype: bfloat16, float16, float32 or float64; default: bfloat16, of an adapter float32.
        adapter: Writes the adapters alone, as a folder that peft loads.

    Returns:
        False where `output` already is this export.

    Raises:
        UserError: No such checkpoint, a damaged one, an output folder that holds something else, a base model that is
            not the one beside which the adapters were trained, or no adapters where they are asked for.
    """
    dtype = dtype or ("float32" if adapter else "bfloat16")
    run_dir, step = checkpoint.resolve(f"{run}@{step}" if step is not None else run)
    path = checkpoint.folder(run_dir, step)
    marker = json.loads((path / checkpoint.COMPLETE).read_text(encoding="utf-8"))
    state = checkpoint.read_state(run_dir, step)
    contract = read_contract(run_dir / "tokenizer")
    origin = {
        "step": step,
        "dtype": dtype,
        "checkpoint": {name: entry["sha256"] for name, entry in marker.items()},
        "tokenizer": contract.fingerprint,
        "template": state["template"],
        "add_bos": state["add_bos"],
    }
    adapters = lora.Adapters(**state["lora"]) if state.get("lora") else None
    if adapter and adapters is None:
        raise UserError(f"{run_dir} was trained without model.lora, and has no adapters", "export without --adapter")
    if adapters:
        lora.check_installed()
        origin |= {"adapter": adapter, "base": adapters.base, "base_sha256": adapters.base_sha256}
    if output.exists():
        if (output / ORIGIN).exists() and json.loads((output / ORIGIN).read_text(encoding="utf-8")) == origin:
            return False
        raise UserError(f"{output} exists already", "choose another --output, or delete it")
    checkpoint.check(path)

    temporary = output.with_name(f".{output.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        copy_tokenizer(run_dir / "tokenizer", temporary)
        config = build.read_config(str(run_dir / "model"))
        build.take_special_ids(config, contract)
        model = build.meta_model(config, _DTYPES[dtype])
        template = find_template(state["template"]) if state["template"] else None
        if adapters and adapter:
            _write_adapter(model, adapters, path, temporary)
        else:
            merged = _merged(config, adapters, path, _DTYPES[dtype]) if adapters else _stored(model, path)
            _write_weights(model, merged, temporary)
            _write_config(model, config, dtype, temporary)
            further = [stop_id(template, temporary)] if template else []
            _write_generation_config(config, contract, [id for id in further if id is not None], temporary)
        if template:  # what it was trained with, in place of the tokenizer's own
            (temporary / CHAT_TEMPLATE).write_text(jinja_of(template, state["add_bos"]), encoding="utf-8")
        card = _adapter_card(adapters, config, origin) if adapters and adapter else _model_card(model, origin)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        (temporary / ORIGIN).write_text(json.dumps(origin, indent=1), encoding="utf-8")
        temporary.rename(output)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if checkpoint.is_disk_full(error):
            raise UserError(f"no space left to write {output}", "free space, then export again") from None
        raise
    return True


_Read = Callable[[list[str]], dict[str, torch.Tensor]]  # names in memory → whole tensors in the dtype of the export


def _stored(model: PreTrainedModel, path: Path) -> _Read:
    """The weights as a checkpoint holds them."""
    state_dict = model.state_dict()
    names = [name for name in state_dict if name not in build.tied_names(model)]
    stored = checkpoint.read_metadata(path).state_dict_metadata
    differing = {f"model.{name}" for name in names} ^ {key for key in stored if key.startswith("model.")}
    if differing:
        raise UserError(
            f"{path}: its weights are not those of its configuration: {', '.join(sorted(differing)[:3])}",
            "export with the transformers version that it was trained with",
        )

    def read(names: list[str]) -> dict[str, torch.Tensor]:
        return _load({name: torch.empty_like(state_dict[name], device="cpu") for name in names}, path)

    return read


def _merged(config: PretrainedConfig, adapters: lora.Adapters, path: Path, dtype: torch.dtype) -> _Read:
    """The weights of the base model, with the adapters of a checkpoint added."""
    folder = build.find_pretrained(adapters.base)
    if build.weights_sha256(folder) != adapters.base_sha256:
        raise UserError(
            f"{adapters.base} is not the model beside which the adapters of {path} were trained: its weights differ",
            "put that model back in its place",
        )
    model = build.adapted_model(config, folder, adapters, lora.merging_dtype(dtype))
    _load({name: parameter.data for name, parameter in lora.trained(model).items()}, path)
    quantized = set()
    if adapters.quantize:
        nf4.check([], torch.device("cpu"))
        quantized = build.quantized_names(build.meta_model(config, dtype))
    weight = lora.merged(model, dtype, quantized)
    return lambda names: {name: weight(name) for name in names}


def _load(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Fills tensors from a checkpoint, casting to the dtype of each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as asked for, by no_dist
        checkpoint.load({"model": tensors}, path)
    return tensors


def _write_weights(model: PreTrainedModel, read: _Read, output: Path) -> None:
    """Weights file by file, each with whole decoder layers, so that what transformers merges on disk stays together."""
    groups = _file_groups(model, [name for name in model.state_dict() if name not in build.tied_names(model)])
    weight_map, total_size = {}, 0
    for number, group in enumerate(groups, start=1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = read(group)
        for name, tensor in tensors.items():
            if tensor.dtype == torch.float16 and tensor.isinf().any():
                raise UserError(f"{name} has values that float16 cannot hold", "use --dtype bfloat16")
        on_disk = build.disk_names(model, tensors)
        save_file({name: tensor.contiguous() for name, tensor in on_disk.items()}, output / file, {"format": "pt"})
        weight_map |= dict.fromkeys(on_disk, file)
        total_size += sum(tensor.nbytes for tensor in on_disk.values())
    if len(groups) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_adapter(model: PreTrainedModel, adapters: lora.Adapters, path: Path, output: Path) -> None:
    """What was trained under the names that peft gives it, and peft's configuration."""
    described = lora.peft_config(model, adapters)
    described.inference_mode = True
    if Path(adapters.base).is_dir():
        described.base_model_name_or_path = str(Path(adapters.base).resolve())
    described.save_pretrained(output)
    lora.add_adapters(model, adapters, model.dtype)
    parameters = lora.trained(model)
    tensors = _load({name: torch.empty_like(p, device="cpu") for name, p in parameters.items()}, path)
    on_disk = {f"base_model.model.{lora.disk_name(name)}": tensor for name, tensor in tensors.items()}
    save_file(on_disk, output / "adapter_model.safetensors", {"format": "pt"})


def _file_groups(model: PreTrainedModel, names: list[str]) -> list[list[str]]:
    """Names in memory, by output file: none over MAX_FILE_BYTES, unless one layer is, and no layer in two files."""
    layers = set(build.decoder_layers(model))
    prefixes = [f"{prefix}." for prefix, module in model.named_modules() if module in layers]
    units: dict[str, list[str]] = {}
    for name in names:
        units.setdefault(next(filter(name.startswith, prefixes), name), []).append(name)
    state_dict = model.state_dict()
    groups: list[list[str]] = [[]]
    size = 0
    for unit in units.values():
        unit_size = sum(state_dict[name].nbytes for name in unit)
        if groups[-1] and size + unit_size > MAX_FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1] += unit
        size += unit_size
    return groups


def _write_config(model: PreTrainedModel, config: PretrainedConfig, dtype: str, output: Path) -> None:
    """config.json for transformers 5, and beside it the names that transformers 4 reads."""
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(output)
    file = output / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["torch_dtype"] = dtype
    rope = content.get("rope_parameters") or {}
    if "rope_theta" in rope:  # not where every kind of layer has its own, which transformers 4 names by the model
        share = rope.get("partial_rotary_factor", 1.0)
        content |= {"rope_theta": rope["rope_theta"], "partial_rotary_factor": share}
        if config.model_type == "gpt_neox":
            content |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": share}
        if rope.get("rope_type", "default") != "default":
            content["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def _write_generation_config(
    config: PretrainedConfig, contract: Contract, template_stops: list[int], output: Path
) -> None:
    """Stops at eos and the template's own stop token; ids that stand for no text (reserved ones, padding of the
    vocabulary) are never generated."""
    stops = list(dict.fromkeys([*template_stops, *build.stop_ids(config)]))
    textless = {id for id, size in enumerate(contract.token_bytes) if size == 0}
    never = (textless | set(range(contract.vocab_size, config.vocab_size))) - set(stops)
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=stops or None,
        pad_token_id=config.pad_token_id,
        suppress_tokens=sorted(never) or None,
    ).save_pretrained(output)


def _adapter_card(adapters: lora.Adapters, config: PretrainedConfig, origin: dict) -> str:
    resize = f"\nmodel.resize_token_embeddings({config.vocab_size})" if adapters.new_rows else ""
    imported, held, given = "", "", ""
    if adapters.quantize:  # the adapters belong to what was made of the base, and not to the base
        imported = ", BitsAndBytesConfig"
        held = '\nheld = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")'
        given = ", quantization_config=held"
    return f"""---
library_name: peft
base_model: {adapters.base}
---
# LoRA adapter

Trained with tsumugu. / tsumugu で学習した LoRA アダプタです。

- Base model / ベースモデル: {adapters.base} (sha256 {adapters.base_sha256[:16]}…)
- rank {adapters.rank}, alpha {adapters.alpha:g}, {", ".join(adapters.targets)}
- Step / ステップ: {origin["step"]}
- dtype: {origin["dtype"]}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer{imported}

tokenizer = AutoTokenizer.from_pretrained("this-folder"){held}
model = AutoModelForCausalLM.from_pretrained("{adapters.base}"{given}){resize}
model = PeftModel.from_pretrained(model, "this-folder")
```
"""


def _model_card(model: PreTrainedModel, origin: dict) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    name = origin["template"] if isinstance(origin["template"], str) else "chat_template.jinja"
    template = f"\n- Prompt template / プロンプト: `{name}`" if origin["template"] else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {type(model).__name__}

Trained with tsumugu. / tsumugu で学習したモデルです。

- Parameters / パラメータ数: {parameters:,}
- Step / ステップ: {origin["step"]}
- dtype: {origin["dtype"]}{template}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this-folder")
model = AutoModelForCausalLM.from_pretrained("this-folder")
```
"""

"""What stock transformers makes of an exported folder: run by its path, in a fresh process, by any Python that has
torch and transformers (4.57 or later). It imports nothing of tsumugu, and only reports; `certificate.py` judges.

Weights stay where `from_pretrained` leaves them (mapped from the files, in the folder's own dtype); every module's own
are brought to float32, and to the GPU where there is one, for the moment in which it computes.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

Fetch = Callable[[nn.Module, str, torch.Tensor], torch.Tensor]


def computing_in_float32(model: nn.Module, device: torch.device, fetch: Fetch) -> None:
    """From now on each module's own parameters and buffers are on `device` in float32 while it computes.

    Args:
        model: Its modules are given hooks.
        device: Where the inputs will be.
        fetch: Called with a module, the name of a parameter or buffer that it owns and that tensor, for its values.
    """

    def enter(module: nn.Module, *_) -> None:
        held[module] = own = {**module._parameters, **module._buffers}
        for name, tensor in own.items():
            if tensor is not None:
                values = fetch(module, name, tensor).to(device)
                values = values.float() if values.is_floating_point() else values
                if name in module._parameters:
                    module._parameters[name] = nn.Parameter(values, requires_grad=False)
                else:
                    module._buffers[name] = values

    def leave(module: nn.Module, *_) -> None:
        own = held.pop(module)
        for name in module._parameters:
            module._parameters[name] = own[name]
        for name in module._buffers:
            module._buffers[name] = own[name]

    held: dict[nn.Module, dict] = {}
    for module in model.modules():
        if module._parameters or module._buffers:
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)


@torch.no_grad()
def real_logits(model: Any, rows: list[list[int]], device: torch.device) -> list[torch.Tensor]:
    """Logits (tokens, vocabulary) in float32 on the host, of each row; all go through the model together."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)  # behind: seen by nobody
    logits = model(input_ids=ids, use_cache=False).logits
    return [found[: len(row)].float().cpu() for found, row in zip(logits, rows, strict=True)]


def buffers(model: nn.Module) -> dict[str, list[float]]:
    """Those that no file holds, such as rotary frequencies: the settings that made them show in their values."""
    saved = model.state_dict().keys()
    own = {name: buffer for name, buffer in model.named_buffers() if name not in saved and buffer.is_floating_point()}
    found = {name: buffer for name, buffer in own.items() if buffer.numel() > 1}  # GPT-2's old constant has one
    return {name: b.float().flatten().tolist() for name, b in found.items() if not name.endswith("original_inv_freq")}


def generation_settings(generation_config: Any) -> dict:
    """What differs from transformers' own defaults, as JSON has it."""
    content = json.loads(json.dumps(generation_config.to_diff_dict(), default=str))
    return {key: value for key, value in content.items() if key != "transformers_version" and not key.startswith("_")}


def is_tied(model: Any) -> bool:
    """Whether the head is the input embedding."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def device_at_hand() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _load(folder: str, base: str | None) -> tuple[Any, dict]:
    from transformers import AutoModelForCausalLM

    if base:
        origin = json.loads((Path(folder) / "tsumugu.json").read_text(encoding="utf-8"))
        model = load_base(base, origin, "auto")
        found = {"missing_keys": [], "unexpected_keys": [], "buffers": buffers(model)}  # peft has some of its own
        return with_adapters(model, folder), found
    load: Any = AutoModelForCausalLM.from_pretrained
    model, info = load(folder, dtype="auto", output_loading_info=True, trust_remote_code=False)
    keys = {key: sorted(map(str, info.get(key) or ())) for key in ("missing_keys", "unexpected_keys")}
    return model, keys | {"buffers": buffers(model)}


def load_base(base: str, origin: dict, dtype: torch.dtype | str) -> Any:
    """A base model as adapters were trained beside it.

    Args:
        base: Its folder.
        origin: What tsumugu.json says of the adapters, if there is one: `quantize` (nf4, in which the linear layers
            were held in training) and `vocab_size`.
        dtype: Of the base model.
    """
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(base, dtype=dtype, trust_remote_code=False)
    if origin.get("quantize"):
        _through_nf4(model)
    own = model.get_input_embeddings().weight.shape[0]
    if (rows := origin.get("vocab_size", own)) != own:
        model.resize_token_embeddings(rows)
    return model


def with_adapters(model: Any, folder: str) -> Any:
    """The adapters of a folder beside the weights of their base model, by peft."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder)


def _through_nf4(model: Any) -> None:
    """Gives linear layers but for the head the values that bitsandbytes holds of them, in float32.

    Its own layers would compute with other ones on some processors, where no gradient is asked for.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            held, state = quantize_4bit(module.weight.data.float(), blocksize=64, quant_type="nf4")
            module.weight.data = dequantize_4bit(held, state)


def _tokenizer(folder: str, request: dict) -> dict:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    golden = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in request["texts"]]
    return {
        "golden": golden,
        "decoded": [tokenizer.decode(ids, skip_special_tokens=False) for ids in golden],
        "default": tokenizer("あ")["input_ids"],
        "vocabulary": vocabulary_sha256(tokenizer.get_vocab()),
        "prompts": [_prompt(tokenizer, messages) for messages in request["conversations"]],
        "special": {name: getattr(tokenizer, f"{name}_token_id") for name in ("unk", "bos", "eos", "pad")},
    }


def vocabulary_sha256(ids: dict[str, int]) -> str:
    """Of tokens and their ids."""
    return hashlib.sha256(json.dumps(sorted(ids.items())).encode()).hexdigest()


def _prompt(tokenizer: Any, messages: list[dict]) -> list[int] | str:
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except Exception as error:  # whatever the template of the folder does
        return f"{type(error).__name__}: {error}"


def _ends_at(model: Any, prompt: list[int], stop: int, stops: list[int], device: torch.device) -> bool:
    """Whether generation, by the folder's generation_config.json, ends at a stop token that is made to come second."""
    from transformers import LogitsProcessor

    class StopSecond(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores = scores.clone()
            if input_ids.shape[1] == len(prompt):
                scores[:, stops] = -torch.inf
            elif input_ids.shape[1] == len(prompt) + 1:
                scores.fill_(-torch.inf)
                scores[:, stop] = 0
            return scores

    ids = torch.tensor([prompt], device=device)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, logits_processor=[StopSecond()]
    )
    new = output[0, len(prompt) :].tolist()
    return len(new) == 2 and new[1] == stop


def reload(request: dict) -> dict:
    """Answers a request of `certificate.py`: logits go to the file that it names, the rest is returned."""
    import transformers

    transformers.logging.set_verbosity_error()
    model, loaded = _load(request["folder"], request["base"])
    model.eval()
    device = device_at_hand()
    found = {
        **loaded,
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        },
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}),
        "tied": is_tied(model),
        "config": json.loads(json.dumps(model.config.to_dict(), default=str)),
        "generation": generation_settings(model.generation_config),
        "tokenizer": _tokenizer(request["folder"], request) if request["has_tokenizer"] else None,
    }
    if request["base"]:  # whose modules use one another's tensors
        model.float().to(device)
    else:
        computing_in_float32(model, device, lambda module, name, tensor: tensor)
    logits = real_logits(model, request["rows"], device)
    with open(request["logits"], "wb") as file:
        for row in logits:
            np.save(file, row.numpy())
    found["ends"] = [_ends_at(model, request["rows"][0], stop, request["stops"], device) for stop in request["stops"]]
    return found


def main(asked: Path, answer: Path) -> None:
    answer.write_text(json.dumps(reload(json.loads(asked.read_text(encoding="utf-8")))), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

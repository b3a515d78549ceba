"""Text from an exported folder, through stock transformers."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsumugu.data.instructions import find_template
from tsumugu.errors import UserError
from tsumugu.export import ORIGIN


class Generator:
    """A loaded model.

    Args:
        folder: A Hugging Face folder.
        template: Name of a prompt template, "none", or None for the one that the folder was trained with.
    """

    def __init__(self, folder: Path, template: str | None = None):
        if not (folder / "config.json").exists():
            raise UserError(f"{folder} holds no model", "make one with `tsumugu export`")
        origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8")) if (folder / ORIGIN).exists() else {}
        name = template or origin.get("template")
        self.template = find_template(name) if name and name != "none" else None
        self.add_bos = origin.get("add_bos", False)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        self.model.eval()
        if torch.cuda.is_available():
            self.model.to("cuda")

    @torch.no_grad()
    def generate(self, prompt: str, input: str = "", max_new_tokens: int = 128) -> tuple[str, bool]:
        """The greedy continuation of a prompt (with a template: the reply), and whether it ended by itself."""
        text = self.template.prompt(prompt, input) if self.template else prompt
        ids = self.tokenizer(text)["input_ids"]
        if self.add_bos and ids[:1] != [self.tokenizer.bos_token_id]:
            ids = [self.tokenizer.bos_token_id, *ids]
        if not ids:
            raise UserError("the prompt is empty", "give some text to continue")
        ids = torch.tensor([ids], device=self.model.device)
        output = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
        )
        reply = output[0, ids.shape[1] :]
        stop_ids = self.model.generation_config.eos_token_id
        stopped = reply[-1].item() in (stop_ids if isinstance(stop_ids, list) else [stop_ids])
        return self.tokenizer.decode(reply, skip_special_tokens=True), stopped

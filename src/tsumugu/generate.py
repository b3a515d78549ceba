"""Text from an exported folder, through stock transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsumugu.data.instructions import find_template
from tsumugu.errors import UserError
from tsumugu.export import ORIGIN
from tsumugu.model.build import quiet
from tsumugu.tokenizer.load import check_unicode


class Generator:
    """A loaded model.

    Args:
        folder: A Hugging Face folder.
        template: Name of a prompt template, "none", or None for the one that the folder was trained with.

    Raises:
        UserError: No model there that can be read, or no template of that name.
    """

    def __init__(self, folder: Path, template: str | None = None):
        if not (folder / "config.json").exists():
            raise UserError(f"{folder} holds no model", "make one with `tsumugu export`")
        origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8")) if (folder / ORIGIN).exists() else {}
        name = template or origin.get("template")
        self.template = find_template(name) if name and name != "none" else None
        self.add_bos: bool | None = origin.get("add_bos")  # None: as the tokenizer itself does
        try:
            with quiet():
                self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
                self.model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{folder} cannot be loaded: {reason}", "export it anew") from None
        self.model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    @torch.no_grad()
    def generate(self, prompt: str, input: str = "", max_new_tokens: int = 128) -> tuple[str, bool]:
        """The greedy continuation of a prompt (with a template: the reply), and whether it ended by itself."""
        if max_new_tokens < 1:
            raise UserError(f"--max-new-tokens is {max_new_tokens}", "use 1 or more")
        for what, text in (("the prompt", prompt), ("the input", input)):
            check_unicode(text, what)
        ids = self._encode(prompt, input)
        longest = getattr(self.model.config, "max_position_embeddings", None) or len(ids) + max_new_tokens
        if len(ids) >= longest:
            raise UserError(f"the prompt has {len(ids)} tokens, the model has {longest} positions", "shorten it")
        prompt_ids = torch.tensor([ids], device=self.model.device)
        output = self.model.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            max_new_tokens=min(max_new_tokens, longest - len(ids)),
            do_sample=False,
        )
        reply = output[0, len(ids) :]
        stop_ids = self.model.generation_config.eos_token_id
        stopped = reply[-1].item() in (stop_ids if isinstance(stop_ids, list) else [stop_ids])
        return self.tokenizer.decode(reply, skip_special_tokens=True), stopped

    def _encode(self, prompt: str, input: str) -> list[int]:
        """The ids that this prompt has in training: special tokens spelt in it are text, and no eos follows it."""
        if input and not self.template:
            raise UserError("an input is given, but no prompt template", "name one with --template")
        text = self.template.prompt(prompt, input) if self.template else prompt
        by_tokenizer = self.add_bos is None
        ids = self.tokenizer(text, add_special_tokens=by_tokenizer, split_special_tokens=True)["input_ids"]
        if self.add_bos:
            ids = [self.tokenizer.bos_token_id, *ids]
        if not ids:
            raise UserError("the prompt is empty", "give some text to continue")
        return ids

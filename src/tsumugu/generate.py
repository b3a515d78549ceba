"""Text from an exported folder, through stock transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsumugu.data.instructions import Message, find_template, prompt_ids
from tsumugu.data.instructions.encode import special_ids, stop_id
from tsumugu.data.instructions.templates import EOS
from tsumugu.errors import UserError
from tsumugu.export import ORIGIN
from tsumugu.model.build import quiet
from tsumugu.tokenizer.load import check_unicode


class Generator:
    """A loaded model.

    Args:
        folder: A Hugging Face folder.
        template: What `find_template` takes, "none", or None for the template that the folder was trained with.

    Raises:
        UserError: No model there that can be read, or no template of that name.
    """

    def __init__(self, folder: Path, template: str | None = None):
        if not (folder / "config.json").exists():
            raise UserError(f"{folder} holds no model", "make one with `tsumugu export`")
        origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8")) if (folder / ORIGIN).exists() else {}
        name = template or origin.get("template")
        self.template = find_template(name, folder) if name and name != "none" else None
        self.add_bos: bool | None = origin.get("add_bos")  # None: as the tokenizer itself does
        try:
            with quiet():
                self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
                self.model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{folder} cannot be loaded: {reason}", "export it anew") from None
        self.specials: dict[str, int] = {}
        self.stop_ids = _ids(self.model.generation_config.eos_token_id)
        if self.template:
            self.specials = {EOS: self.tokenizer.eos_token_id, **special_ids(folder)}
            if missing := [t for t in getattr(self.template, "special_tokens", ()) if t not in self.specials]:
                raise UserError(f"{folder} lacks {' '.join(missing)} of the template", "choose another --template")
            own = stop_id(self.template, folder)
            self.stop_ids += [own] if own is not None and own not in self.stop_ids else []
        self.model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    @torch.no_grad()
    def generate(self, prompt: str, input: str = "", max_new_tokens: int = 128, system: str = "") -> tuple[str, bool]:
        """The greedy continuation of a prompt (with a template: the reply), and whether it ended by itself."""
        if max_new_tokens < 1:
            raise UserError(f"--max-new-tokens is {max_new_tokens}", "use 1 or more")
        for what, text in (("the prompt", prompt), ("the input", input), ("the system message", system)):
            check_unicode(text, what)
        ids = self._encode(prompt, input, system)
        longest = getattr(self.model.config, "max_position_embeddings", None) or len(ids) + max_new_tokens
        if len(ids) >= longest:
            raise UserError(f"the prompt has {len(ids)} tokens, the model has {longest} positions", "shorten it")
        prompt_ids = torch.tensor([ids], device=self.model.device)
        output = self.model.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            max_new_tokens=min(max_new_tokens, longest - len(ids)),
            do_sample=False,
            eos_token_id=self.stop_ids or None,
        )
        reply = output[0, len(ids) :]
        stopped = reply[-1].item() in self.stop_ids
        text = self.tokenizer.decode(reply, skip_special_tokens=True)
        newline = getattr(self.template, "newline", "\n")
        return text.replace(newline, "\n"), stopped

    def _encode(self, prompt: str, input: str = "", system: str = "") -> list[int]:
        """The ids that this prompt has in training: special tokens spelt in it are text, and no eos follows it."""
        for what, text in (("an input", input), ("a system message", system)):
            if text and not self.template:
                raise UserError(f"{what} is given, but no prompt template", "name one with --template")
        bos = [self.tokenizer.bos_token_id] if self.add_bos else []
        if self.template:
            messages = [*([Message("system", system)] if system else []), Message("user", prompt, input=input)]
            own = [self.tokenizer.bos_token_id]
            by_tokenizer = self.add_bos is None and self.tokenizer("あ")["input_ids"][:1] == own
            ids = prompt_ids(messages, self.template, self._ids, [], self.specials)
            if by_tokenizer and getattr(self.template, "jinja", None) is None and ids[:1] != own:
                bos = own
            return [*bos, *ids]
        ids = self.tokenizer(prompt, add_special_tokens=self.add_bos is None, split_special_tokens=True)["input_ids"]
        if not [*bos, *ids]:
            raise UserError("the prompt is empty", "give some text to continue")
        return [*bos, *ids]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [self.tokenizer(t, add_special_tokens=False, split_special_tokens=True)["input_ids"] for t in texts]


def _ids(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]

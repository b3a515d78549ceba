"""On a GPU: variable-length attention gives the losses and gradients of documents one by one, to bf16 rounding.

    python benchmarks/gpu_checks.py

For GPT-NeoX, Llama (grouped heads) and Qwen3 (heads of their own size) it compares, with float32 one by one as truth,
the error of bf16 one by one with that of bf16 packed: packing must not add to it. Exit code 1 where it does. Prints a
Markdown table.
"""

import copy
import sys

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tsumugu.model import attention

VOCABULARY, WIDTH = 1000, 512
SHAPE = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
SHAPES = {
    "gpt_neox": SHAPE,
    "llama": SHAPE | {"num_key_value_heads": 2},
    "qwen3": SHAPE | {"num_key_value_heads": 2, "head_dim": 128},
}
ROWS = [[200, 150, 100, 62], [1, 300, 7, 100], [512]]  # lengths of documents; the second row is filled up


def one_by_one(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    losses = []
    for row, lengths in zip(ids, ROWS, strict=True):
        start = 0
        for length in lengths:
            document = row[start : start + length + 1]
            logits = model(document[None, :-1], use_cache=False).logits[0].float()
            losses.append(F.cross_entropy(logits, document[1:], reduction="none"))
            start += length
    return torch.cat(losses), gradient(model, torch.cat(losses))


def packed(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    filled = [[*lengths, WIDTH - sum(lengths)] if sum(lengths) < WIDTH else lengths for lengths in ROWS]
    ends = np.concatenate([[0], np.cumsum([length for lengths in filled for length in lengths])]).astype(np.int32)
    positions = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in filled])
    logits = model(
        ids[:, :-1], position_ids=positions.cuda(), use_cache=False, **attention.arguments(model, ends, WIDTH)
    ).logits.float()
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ROWS), WIDTH)
    kept = torch.cat([losses[row, : sum(lengths)] for row, lengths in enumerate(ROWS)])
    return kept, gradient(model, kept)


def gradient(model: PreTrainedModel, losses: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    losses.mean().backward()
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


def main() -> None:
    torch.manual_seed(0)
    failed = False
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| model | attention | loss: bf16 one by one | bf16 packed | gradient: one by one | packed |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for name, shape in SHAPES.items():
        exact = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, vocab_size=VOCABULARY, **shape)).cuda()
        ids = torch.randint(VOCABULARY, (len(ROWS), WIDTH + 1), device="cuda")
        truth = one_by_one(exact, ids)
        half = copy.deepcopy(exact).to(torch.bfloat16)
        alone = one_by_one(half, ids)
        line = attention.keep_documents_apart(half, torch.bfloat16)
        together = packed(half, ids)
        errors = [
            ((found - right).norm() / right.norm()).item()
            for right, *several in zip(truth, alone, together, strict=True)
            for found in several
        ]
        failed |= half.config._attn_implementation != attention.VARLEN
        failed |= errors[1] > 1.5 * errors[0] + 1e-5 or errors[3] > 1.5 * errors[2] + 1e-5
        print(f"| {name} | {line.rpartition('by ')[2]} | " + " | ".join(f"{error:.2e}" for error in errors) + " |")
    print("\nfailed" if failed else "\npacking adds no error")
    sys.exit(failed)


if __name__ == "__main__":
    main()

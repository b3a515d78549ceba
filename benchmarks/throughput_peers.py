"""The other tools that throughput.py measures: each trains the shape in --out on random tokens, in steps of its own.

Every function returns a model of the shape on the meta device, of which FLOPs are counted, and seconds a step and the
loss of the last.
"""

import argparse
import os
import time
from typing import Any

import torch
from throughput import MICRO_BATCHES, SEED, reset_peak
from transformers import AutoConfig, AutoModelForCausalLM

Measured = tuple[Any, dict[str, Any]]


def alike(shape: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape)


def hf(options: dict[str, str], arguments: argparse.Namespace) -> Measured:
    """Measures Hugging Face's Trainer."""
    import numpy as np
    from transformers import Trainer, TrainerCallback, TrainingArguments

    micro, model_config = int(options.get("micro", 1)), AutoConfig.from_pretrained(arguments.out / "model")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    model.config.use_cache = False
    sharded: dict[str, Any] = {}
    processes = int(options.get("gpus", 1))
    if processes > 1:
        fsdp = {"version": 2, "reshard_after_forward": options.get("reshard") != "never"}
        sharded = {"fsdp": True, "fsdp_config": fsdp}
    steps = arguments.warm + arguments.steps
    draw = np.random.default_rng(0)
    rows = draw.integers(4, model_config.vocab_size, (micro * MICRO_BATCHES * steps * processes, arguments.length))
    data: Any = [{"input_ids": row, "labels": row} for row in torch.from_numpy(rows)]
    clock: dict[int, float] = {}

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (arguments.warm, steps):
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                clock[state.global_step] = time.perf_counter()
            if state.global_step == arguments.warm:
                reset_peak()

    trainer = Trainer(
        model=model,
        train_dataset=data,
        callbacks=[Clock()],
        args=TrainingArguments(
            output_dir=str(arguments.out / "hf"), max_steps=steps, per_device_train_batch_size=micro,
            gradient_accumulation_steps=MICRO_BATCHES, bf16=torch.cuda.is_available(),
            torch_compile=torch.cuda.is_available() and options.get("liger") != "1",
            optim="adamw_torch_fused", learning_rate=3e-4, weight_decay=0.1,
            adam_beta2=0.95, max_grad_norm=1.0, lr_scheduler_type="constant", logging_strategy="no",
            save_strategy="no", report_to=[], disable_tqdm=True, seed=SEED, remove_unused_columns=False,
            gradient_checkpointing=options.get("recompute") == "full", use_liger_kernel=options.get("liger") == "1",
            **sharded,
        ),
    )  # fmt: skip
    loss = trainer.train().training_loss
    seconds = (clock[steps] - clock[arguments.warm]) / arguments.steps
    return alike(model_config), {"step_seconds": seconds, "loss": loss}


def litgpt(options: dict[str, str], arguments: argparse.Namespace) -> Measured:
    """Measures litgpt's GPT-NeoX in the steps that its `pretrain.fit` takes."""
    import lightning
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    shape, micro = AutoConfig.from_pretrained(arguments.out / "model"), int(options.get("micro", 1))
    fabric = lightning.Fabric(devices=1, precision="bf16-mixed")
    with fabric.init_module(empty_init=False):
        model = GPT(
            Config(
                block_size=arguments.length, n_layer=shape.num_hidden_layers, n_embd=shape.hidden_size,
                n_head=shape.num_attention_heads, padded_vocab_size=shape.vocab_size, rotary_percentage=1.0,
                parallel_residual=shape.use_parallel_residual, bias=True, lm_head_bias=False,
                intermediate_size=shape.intermediate_size, mlp_class_name="GptNeoxMLP", norm_class_name="LayerNorm",
            )
        )  # fmt: skip
    model = fabric.setup(torch.compile(model))
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    )
    draw = torch.Generator().manual_seed(SEED)
    loss = torch.zeros(())
    for step in range(arguments.warm + arguments.steps):
        if step == arguments.warm:
            torch.cuda.synchronize()
            reset_peak()
            started = time.perf_counter()
        for number in range(MICRO_BATCHES):
            ids = torch.randint(4, arguments.vocabulary, (micro, arguments.length + 1), generator=draw).cuda()
            with fabric.no_backward_sync(model, enabled=number < MICRO_BATCHES - 1):
                loss = chunked_cross_entropy(model(ids[:, :-1]), ids[:, 1:], chunk_size=0)
                fabric.backward(loss / MICRO_BATCHES)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / arguments.steps
    return alike(shape), {"step_seconds": seconds, "loss": loss.item()}


def titan(options: dict[str, str], arguments: argparse.Namespace) -> Measured:
    """torchtitan 0.2.2: its Llama, sharding, compiling, loss, clipping and mixed precision, as its `Trainer` does."""
    import torch.distributed as dist
    from torchtitan.components.loss import build_cross_entropy_loss
    from torchtitan.config import JobConfig
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed import utils as of_titan
    from torchtitan.models.llama3 import Transformer, TransformerModelArgs, parallelize_llama

    from tsumugu.distributed.environment import process_group

    shape, micro = AutoConfig.from_pretrained(arguments.out / "model"), int(options.get("micro", 1))
    processes, kind = int(options.get("gpus", 1)), "cuda" if torch.cuda.is_available() else "cpu"
    job = JobConfig()
    job.compile.enable, job.activation_checkpoint.mode = kind == "cuda", options.get("recompute", "none")
    job.training.seq_len = arguments.length
    with process_group() as environment:
        one = dict.fromkeys(("dp_replicate", "cp", "tp", "pp", "ep", "etp"), 1)
        dims = ParallelDims(**one, dp_shard=processes, world_size=processes)
        if processes > 1:
            dims.build_mesh()
        with torch.device("meta"):
            model = Transformer(
                TransformerModelArgs(
                    dim=shape.hidden_size, n_layers=shape.num_hidden_layers, n_heads=shape.num_attention_heads,
                    n_kv_heads=shape.num_key_value_heads, vocab_size=shape.vocab_size, max_seq_len=arguments.length,
                    # rounded up to a multiple of 16, which the size is
                    multiple_of=16, ffn_dim_multiplier=(shape.intermediate_size - 1) / (8 * shape.hidden_size // 3),
                )
            )  # fmt: skip
        right = alike(shape)
        same = sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in right.parameters())
        assert same, "torchtitan has no such shape: it ties no embeddings, and heads share the hidden size"
        parallelize_llama(model, dims, job)
        model.to_empty(device=environment.device)
        with torch.no_grad():
            model.init_weights(buffer_device=None)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        loss_of, amp = build_cross_entropy_loss(job), of_titan.maybe_enable_amp(dims, "bfloat16", kind)
        draw = torch.Generator().manual_seed(SEED + environment.rank)
        tokens = micro * MICRO_BATCHES * arguments.length * processes
        started, losses = 0.0, []
        for step in range(arguments.warm + arguments.steps):
            if step == arguments.warm:
                dist.barrier()
                if kind == "cuda":
                    torch.cuda.synchronize()
                reset_peak()
                started = time.perf_counter()
            optimizer.zero_grad()
            losses = []
            for _ in range(MICRO_BATCHES):
                ids = torch.randint(4, arguments.vocabulary, (micro, arguments.length + 1), generator=draw)
                ids = ids.to(environment.device)
                with amp:
                    loss = loss_of(model(ids[:, :-1]), ids[:, 1:]) / tokens
                loss.backward()
                losses.append(loss.detach())
            of_titan.clip_grad_norm_(list(model.parameters()), 1.0, foreach=True)
            optimizer.step()
        loss = torch.stack(losses).sum().item() * processes  # waits for the device
        dist.barrier()
        seconds = (time.perf_counter() - started) / arguments.steps
    return right, {"step_seconds": seconds, "loss": loss}

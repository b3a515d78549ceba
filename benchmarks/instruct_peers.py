"""Real tokens a second of instruction tuning on one GPU: tsumugu, Hugging Face's Trainer, and TRL's packing.

    python benchmarks/instruct_peers.py                          # 1b (GPT-NeoX), every row in a process of its own
    python benchmarks/instruct_peers.py --preset llama-1b        # a shape that Liger's kernels know
    python benchmarks/instruct_peers.py --gpus 4                 # four rows at a time, each on a GPU of its own
    python benchmarks/instruct_peers.py --preset tiny --quick    # a CPU will do: does it run?

The lengths are those of `instruct.py`: a lognormal distribution with the mean (382) and the longest (1,327) of JaQuAD's
instructions. A step learns from 24 examples, or from as many rows of 2,048 tokens as hold about so many. Tokens are
those of examples; padding does not count. Rows:

    best_fit          tsumugu: whole examples packed into rows, documents kept apart
    pad_left          tsumugu: 24 examples padded to the longest, as the sample does, with recomputation
    causal            tsumugu: rows of 2,048 tokens of one document: what packing is to cost no more than
    hf                transformers' Trainer, batches of 24 padded on the left, gradient checkpointing (the sample's)
    hf batch=8        the same with 8 examples a batch, three batches a step, without checkpointing
    hf compile=1      the same with torch.compile
    trl               TRL's SFTTrainer, packing bfd (padding-free) with Liger's kernels; attention is torch's
                      variable-length kernel, since that machine need not have the flash-attn package
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from instruct import PADDED_BATCH, VOCABULARY, measure, run_of, synthetic
from throughput import file_name, measure_rows, reset_peak, settings

from tsumugu.data.store import open_store
from tsumugu.distributed.environment import process_group
from tsumugu.model.presets import preset_config
from tsumugu.tokenizer.contract import read_contract
from tsumugu.training.trainer import Trainer

LENGTH, WARM = 2048, 6
ROWS = ["hf", "hf batch=8", "hf batch=8 compile=1", "pad_left", "best_fit", "best_fit micro=4", "causal"]
LIGER_ROWS = ["hf batch=8 liger=1", "trl micro=2", "trl micro=4", "best_fit micro=2", "best_fit micro=4"]


def of_tsumugu(way: str, options: dict[str, str], arguments: argparse.Namespace) -> dict[str, Any]:
    split = open_store(arguments.store).train
    mean, gpu = split.tokens / split.documents, torch.cuda.is_available()
    rows = max(1, round(PADDED_BATCH * mean / LENGTH))
    if way == "pad_left":
        longest = split.longest_document - 1
        run = run_of(arguments.store, arguments.preset, way, longest, PADDED_BATCH, PADDED_BATCH, False, gpu)
    else:
        packing = "best_fit" if way == "best_fit" else "concatenate"
        micro = int(options.get("micro", 2))
        run = run_of(arguments.store, arguments.preset, packing, LENGTH, max(rows, micro), micro, False, False)
    with tempfile.TemporaryDirectory() as folder, process_group() as environment:
        trainer = Trainer(run, Path(folder), environment)
        print(trainer.attention, *trainer.paths, sep="\n", flush=True)
        measure(trainer, arguments.seconds / 2)  # compiles
        measure(trainer, arguments.seconds / 4)
        reset_peak()
        seconds, tokens, _ = measure(trainer, arguments.seconds)
    return {"tokens_per_second": tokens / seconds}


def examples(store: Path) -> list[dict[str, list[int]]]:
    """The store's examples in the order of a shuffle, as ids and labels."""
    split = open_store(store).train
    found = []
    for index in np.random.default_rng(1).permutation(split.documents):
        ids, mask = split.document(int(index))
        labels = np.where(mask, ids, -100)
        found.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return found


def clock(warm: int, seconds: float) -> Any:
    """A callback that notes the time, and ends training so many seconds after the first steps."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        began, ended, last = 0.0, 0.0, warm

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == warm:
                synchronize()
                reset_peak()
                self.began = time.perf_counter()
            elif state.global_step > warm and state.global_step % 4 == 0:
                synchronize()
                self.ended, self.last = time.perf_counter(), state.global_step
                control.should_training_stop = self.ended - self.began > seconds

    return Clock()


def model_of(arguments: argparse.Namespace) -> Any:
    from transformers import AutoModelForCausalLM

    model_config = preset_config(arguments.preset, read_contract(arguments.store / "tokenizer"))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    model.config.use_cache = False
    return model


def training_arguments(options: dict[str, str], folder: str, batch: int, steps: int) -> dict[str, Any]:
    return {
        **{"output_dir": folder, "max_steps": 10**6, "per_device_train_batch_size": batch, "report_to": []},
        **{"gradient_accumulation_steps": steps, "bf16": torch.cuda.is_available(), "optim": "adamw_torch_fused"},
        **{"learning_rate": 3e-4, "weight_decay": 0.1, "adam_beta2": 0.95, "lr_scheduler_type": "constant"},
        **{"logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True, "dataloader_num_workers": 2},
        **{"use_liger_kernel": options.get("liger") == "1", "torch_compile": options.get("compile") == "1"},
    }


def of_transformers(options: dict[str, str], arguments: argparse.Namespace) -> dict[str, Any]:
    from transformers import Trainer, TrainingArguments

    data, batch = examples(arguments.store), int(options.get("batch", PADDED_BATCH))

    def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        columns = {"input_ids": 3, "labels": -100}
        batch_of = {
            name: torch.tensor([[filler] * (width - len(row[name])) + row[name] for row in rows])
            for name, filler in columns.items()
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        mask = (torch.arange(width) >= width - lengths[:, None]).long()
        return {**batch_of, "attention_mask": mask}

    noted = clock(WARM, arguments.seconds)
    with tempfile.TemporaryDirectory() as folder:
        steps = PADDED_BATCH // batch
        trainer = Trainer(
            model=model_of(arguments),
            train_dataset=data,  # type: ignore[arg-type]
            data_collator=padded,  # type: ignore[arg-type]
            callbacks=[noted],
            args=TrainingArguments(
                **training_arguments(options, folder, batch, steps),
                remove_unused_columns=False,
                gradient_checkpointing=batch == PADDED_BATCH,
            ),
        )
        trainer.train()
    mean = sum(len(row["input_ids"]) for row in data) / len(data)
    return {"tokens_per_second": (noted.last - WARM) * PADDED_BATCH * mean / (noted.ended - noted.began)}


def of_trl(options: dict[str, str], arguments: argparse.Namespace) -> dict[str, Any]:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from torch.nn.attention.varlen import varlen_attn
    from transformers import AttentionInterface, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    def varlen(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **given: Any) -> Any:
        positions = given["position_ids"].flatten()
        starts = torch.nonzero(positions == 0).flatten().int()
        ends = torch.cat([starts, torch.tensor([len(positions)], dtype=torch.int32, device=starts.device)])
        groups = query.shape[1] // key.shape[1]
        query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
        out: Any = varlen_attn(query, key, value, ends, ends, LENGTH, LENGTH, scale=scaling, window_size=(-1, 0))
        return out[None], None

    data, micro = examples(arguments.store), int(options.get("micro", 2))
    letters = {f"<{index}>": index for index in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(letters, unk_token="<0>")), eos_token="<2>", pad_token="<3>"
    )
    model = model_of(arguments)
    if torch.cuda.is_available():
        AttentionInterface.register("varlen_of_torch", varlen)
        model.set_attn_implementation("varlen_of_torch")
    mean = sum(len(row["input_ids"]) for row in data) / len(data)
    noted, rows = clock(WARM, arguments.seconds), max(1, round(PADDED_BATCH * mean / LENGTH))
    with tempfile.TemporaryDirectory() as folder:
        given = training_arguments(options | {"liger": "1" if torch.cuda.is_available() else "0"}, folder, micro, 1)
        given["gradient_accumulation_steps"] = max(1, rows // micro)
        trainer = SFTTrainer(
            model=model,
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
            callbacks=[noted],
            args=SFTConfig(
                **given, packing=True, packing_strategy="bfd", max_length=LENGTH, gradient_checkpointing=False,
                dataset_kwargs={"skip_prepare_dataset": False},
            ),
        )  # fmt: skip
        lengths = [len(row["input_ids"]) for row in trainer.train_dataset]  # type: ignore[union-attr]
        trainer.train()
    done = (noted.last - WARM) * given["gradient_accumulation_steps"] * micro
    return {"tokens_per_second": done * sum(lengths) / len(lengths) / (noted.ended - noted.began)}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def one_row(row: str, arguments: argparse.Namespace) -> None:
    way, options = settings(row)
    if way == "hf":
        result = of_transformers(options, arguments)
    elif way == "trl":
        result = of_trl(options, arguments)
    else:
        result = of_tsumugu(way, options, arguments)
    gpu = torch.cuda.is_available()
    result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if gpu else None
    result["device"] = torch.cuda.get_device_name() if gpu else "CPU"
    (arguments.out / f"{file_name(row)}.json").write_text(json.dumps({"row": row, **result}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="1b")
    parser.add_argument("--row", action="append", help="a row to measure, in place of all; may be repeated")
    parser.add_argument("--seconds", type=float, default=20, help="of every measurement")
    parser.add_argument("--limit", type=float, default=150, help="seconds of one row")
    parser.add_argument("--total", type=float, default=570, help="seconds of all; rows after that are left out")
    parser.add_argument("--gpus", type=int, default=1, help="rows measured at a time, each on a GPU of its own")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="a folder for JSON and logs")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds = 2
    arguments.out = arguments.out or Path("/tmp/instruct-peers") / arguments.preset
    arguments.store = arguments.out / "store"
    if arguments.one:
        one_row(arguments.one, arguments)
        return
    if not arguments.store.exists():
        arguments.store.mkdir(parents=True)
        synthetic(arguments.store)
    rows = arguments.row or (ROWS if arguments.preset in ("1b", "tiny") else LIGER_ROWS)
    ends = measure_rows(__file__, rows, arguments)
    print(f"\n{arguments.preset}\n\n| row | tokens/s | peak GiB | device |\n| --- | ---: | ---: | --- |")
    for row in rows:
        file = arguments.out / f"{file_name(row)}.json"
        if file.exists():
            found = json.loads(file.read_text())
            peak = "–" if found["peak_gib"] is None else f"{found['peak_gib']:.1f}"
            print(f"| {row} | {found['tokens_per_second']:,.0f} | {peak} | {found['device']} |")
        else:
            print(f"| {row} | {ends[row]} | | |")


if __name__ == "__main__":
    main()

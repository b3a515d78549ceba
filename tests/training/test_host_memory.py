"""Host memory at the start, optimizer state on the host, and float16 with its loss scale."""

import copy
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.models import VOCABULARY, stock_model, tiny_config
from support.ranks import run_ranks
from support.runs import StopAfter, figures, run_config, whole
from support.stores import write_store
from transformers import AutoModelForCausalLM

from tsumugu.config import ParallelConfig
from tsumugu.data.sampler import row_at
from tsumugu.distributed.environment import process_group
from tsumugu.distributed.mesh import build_mesh
from tsumugu.model import build
from tsumugu.training.optimizer import LossScale
from tsumugu.training.signals import StopRequest
from tsumugu.training.trainer import Trainer

MIB = 2**20


def anonymous_memory() -> int:
    """Bytes of this process that no file backs: what is mapped from a file goes when memory is short."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def growth(folder: str, initialise: bool) -> tuple[float, float]:
    """MiB that starting a model adds at its peak, and MiB of this process's shards."""
    model_config = build.read_config(folder)
    world_size = torch.distributed.get_world_size()
    mesh, cpu = build_mesh(ParallelConfig(), world_size, "cpu"), torch.device("cpu")
    build.weight_bytes(model_config, torch.float32)  # what transformers imports on its way
    before = peak = anonymous_memory()
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_memory())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    fill = build.initialised(1) if initialise else build.pretrained(Path(folder))
    model = build.build_model(model_config, mesh, cpu, torch.float32, torch.float32, fill)
    done.set()
    watcher.join()
    shards = sum(p.to_local().nbytes for p in model.parameters())  # type: ignore[attr-defined]
    return (max(peak, anonymous_memory()) - before) / MIB, shards / MIB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_no_process_ever_holds_the_whole_model(tmp_path: Path):
    shape = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048}
    model = stock_model(tiny_config("gpt_neox", False, **shape, vocab_size=4096))
    size = sum(p.nbytes for p in model.parameters()) / MIB
    largest = max(p.nbytes for p in model.parameters()) / MIB
    assert size > 150
    model.bfloat16().save_pretrained(tmp_path, max_shard_size="16MB")  # so that weights are converted on their way
    file = max(path.stat().st_size for path in tmp_path.glob("*.safetensors")) / MIB
    for initialise, beside in ((False, file), (True, 2 * largest)):
        for grown, shards in run_ranks(growth, 2, str(tmp_path), initialise):
            assert shards == pytest.approx(size / 2, rel=0.01)
            assert shards - 1 < grown < shards + beside + 16 < 0.75 * size, (initialise, grown, shards)


SEED = 7
HOST = {"parallel.offload_optimizer": True}
COMMON = {"train.global_batch_size": 4, "train.max_steps": 6, "optimizer.learning_rate": 1e-2}


def trained(store: Path, run_dir: Path, changes: dict, stop_after: int | None = None) -> dict[str, torch.Tensor]:
    with process_group() as environment:
        trainer = Trainer(run_config(store, COMMON | changes), run_dir, environment)
        trainer.train(StopAfter(stop_after))
        return {name: whole(p) for name, p in trainer.model.named_parameters()}


def test_a_run_with_its_optimizer_on_the_host_is_the_same_and_resumes_with_or_without(made: Path, tmp_path: Path):
    changes = {"model.config": str(made / "gpt_neox")}
    expected = trained(made / "text", tmp_path / "plain", changes)
    found = trained(made / "text", tmp_path / "host", changes | HOST)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for name, first, then in (("there", {}, HOST), ("back", HOST, {})):
        trained(made / "text", tmp_path / name, changes | first, stop_after=3)
        resumed = trained(made / "text", tmp_path / name, changes | then)
        assert all(torch.equal(resumed[key], expected[key]) for key in expected)
        assert figures(tmp_path / name) == figures(tmp_path / "plain")


def test_a_step_that_is_not_finite_leaves_weights_on_the_host_alone(made: Path, tmp_path: Path):
    changes = {"model.config": str(made / "gpt_neox"), "guard.non_finite": "skip", **HOST}
    with process_group() as environment:
        trainer = Trainer(run_config(made / "text", COMMON | changes), tmp_path, environment)
        with torch.no_grad():
            trainer.model.get_output_embeddings().weight.to_local()[5] = torch.nan
        before = {name: whole(p) for name, p in trainer.model.named_parameters()}
        trainer.train_step(StopRequest())
        after = {name: whole(p) for name, p in trainer.model.named_parameters()}
    assert all(torch.equal(before[name].nan_to_num(7), after[name].nan_to_num(7)) for name in before)


def test_float16_steps_are_those_of_a_plain_loop_with_a_grad_scaler(tmp_path: Path):
    """Masters in float32, copies in float16; the scale is too large at first, and those steps are not applied."""
    stock_model(tiny_config("gpt_neox", False)).save_pretrained(tmp_path / "model")
    scale, width, batch, steps, rate = 2.0**22, 16, 4, 7, 1e-2
    tokens = torch.randint(4, VOCABULARY, (30 * width + 1,), generator=torch.Generator().manual_seed(0))
    store = write_store(tmp_path / "store", [tokens.tolist()])
    changes = {
        **COMMON,
        "model.pretrained": str(tmp_path / "model"),
        "tokenizer.path": str(store / "tokenizer"),
        "train.micro_batch_size": batch,
        "train.dtype": "float16",
        "train.max_steps": steps,
        "train.seed": SEED,
        "schedule.kind": "constant",
    }
    with process_group() as environment:
        trainer = Trainer(run_config(store, changes), tmp_path / "run", environment)
        trainer.loss_scale = LossScale(trainer.device, [scale, 0])
        ours = []
        for _ in range(steps):
            ours.append(trainer.train_step(StopRequest()).figures())
            trainer.step += 1
        weights = {name: whole(p) for name, p in trainer.model.named_parameters()}

    masters = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    half = copy.deepcopy(masters).half()
    matrices = [p for p in masters.parameters() if p.ndim > 1]
    vectors = [p for p in masters.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    order = row_at(np.arange(steps * batch), 30, SEED).reshape(steps, batch)
    used = []
    for step in range(steps):
        rows = torch.stack([tokens[row * width : (row + 1) * width + 1] for row in order[step].tolist()])
        for copied, master in zip(half.parameters(), masters.parameters(), strict=True):
            copied.data.copy_(master.data)
            copied.grad = None
        logits = half(rows[:, :-1]).logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        used.append(scaler.get_scale())
        scaler.scale(loss).backward()
        for copied, master in zip(half.parameters(), masters.parameters(), strict=True):
            master.grad = copied.grad.float()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(masters.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        assert ours[step].loss == pytest.approx(loss.item(), rel=1e-4)
        assert ours[step].loss_scale == used[-1]
    assert used[0] > used[-1] == scaler.get_scale()
    applied = [figures.verdict == 0 for figures in ours]
    assert applied == [later == earlier for earlier, later in zip(used, [*used[1:], scaler.get_scale()], strict=True)]
    assert False in applied
    assert True in applied
    for name, master in masters.named_parameters():
        if not name.endswith("query_key_value.bias"):  # keys' have no gradient but rounding, in which processors differ
            torch.testing.assert_close(weights[name], master.detach(), rtol=0, atol=5e-4)

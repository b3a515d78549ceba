"""The trainer: build, then step, log, evaluate, checkpoint, and stop if asked.

Pretraining, fine-tuning and instruction tuning are this one trainer over a token store; they differ in configuration.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

import tsumugu
from tsumugu import config as configuration
from tsumugu.config import DataConfig, ScheduleConfig, TrainingRun
from tsumugu.data.audit import quick_audit
from tsumugu.data.batches import Share, rows_read, training_batches, validation_batches
from tsumugu.data.mixture import Mixture, Past, mix, report, table
from tsumugu.data.packing import IGNORE_INDEX, Batch, BestFit, Rows, rows_of
from tsumugu.data.store import Store, open_store
from tsumugu.distributed import paths, tensor
from tsumugu.distributed.environment import Environment, on_device, on_main, process_group
from tsumugu.distributed.exchange import Exchange
from tsumugu.distributed.mesh import build_mesh
from tsumugu.distributed.parallelize import is_recomputed, reshard
from tsumugu.errors import UserError
from tsumugu.kernels.linear import sum_in_products
from tsumugu.model import attention, build, head, lora, nf4
from tsumugu.model.flops import flops, peak_flops
from tsumugu.model.presets import preset_config
from tsumugu.tokenizer.contract import Contract, copy_tokenizer, new_rows, read_contract
from tsumugu.training import checkpoint, memory, norms
from tsumugu.training.deterministic import deterministic
from tsumugu.training.guard import APPLIED, SPIKE, Guard
from tsumugu.training.isolation import crossing
from tsumugu.training.lock import locked
from tsumugu.training.loss import summed_loss
from tsumugu.training.metrics import Metrics, memory_peak_gib, read_metrics
from tsumugu.training.optimizer import LossScale, MasterAdamW, build_optimizer, clip_gradients, take_step
from tsumugu.training.profile import Profile
from tsumugu.training.saving import Saver
from tsumugu.training.schedule import check_schedule, decay_steps, learning_rate
from tsumugu.training.signals import StopRequest, stop_requests
from tsumugu.training.storages import new_group, together
from tsumugu.training.trackers import check_trackers, open_trackers
from tsumugu.training.watchdog import PATIENCE, Watchdog, group_timeout, outlast

STARTS = "starts.jsonl"  # in the run folder: a line for every start
SAVED = ".saved"  # in the run folder: the last start ended with a checkpoint of its last step


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended: steps done of all, and whether it was asked to stop or had nothing to do."""

    step: int
    max_steps: int
    interrupted: bool = False
    already_done: bool = False


def train(config: TrainingRun, run_dir: Path) -> Outcome:
    """Trains to the end, from the newest checkpoint of `run_dir` where there is one.

    Every process of a torchrun job calls it; without torchrun this is the only process.

    Raises:
        UserError: A configuration, store, model or checkpoint that cannot be used, a run folder that another run
            trains into, a full disk, or too little memory.
    """
    hang_timeout = config.train.hang_timeout
    try:
        with (
            deterministic(config.train.deterministic),
            process_group(group_timeout(hang_timeout)) as environment,
            locked(run_dir),
            stop_requests() as request,
        ):
            watchdog = Watchdog(hang_timeout, environment.rank, environment.world_size)
            with watchdog.watching(), _memory_explained(config, environment):
                trainer = Trainer(config, run_dir, environment, watchdog)
                outlast(hang_timeout, trainer.group)
                with _memory_explained(config, environment, trainer):
                    return trainer.train(request)
    except (OSError, CheckpointException) as error:
        if checkpoint.is_disk_full(error):
            raise UserError(f"no space left to write {run_dir}", "free space, then start again: it resumes") from None
        raise


class Trainer:
    """One run, built and ready to take steps."""

    def __init__(self, config: TrainingRun, run_dir: Path, environment: Environment, watchdog: Watchdog | None = None):
        self.started = time.monotonic()
        self.config, self.run_dir, self.environment = config, run_dir, environment
        self.watchdog = watchdog or Watchdog(None, environment.rank)
        self.watchdog.mark("building: reading stores, configuration and weights", PATIENCE)
        self.device = environment.device
        check_trackers(config.train.log_to)
        self.profile = Profile(config.train, run_dir, environment.rank, self.device)
        opened = _open_stores(config)
        contract = opened.contract
        mesh = build_mesh(config.parallel, environment.world_size, self.device.type)
        self.tensor_degree = config.parallel.tensor_degree
        self.share = Share(  # of which the processes of a tensor group have the same
            rank=environment.rank // self.tensor_degree,
            world_size=environment.world_size // self.tensor_degree,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            by_length=config.data.group_by_length,
        )
        self.max_steps = opened.steps
        check_schedule(self.max_steps, config.schedule)

        self.group = new_group()
        self.damaged: set[int] = set()  # steps whose checkpoints are not whole
        resumed = checkpoint.newest(run_dir, self.group, lambda line: print(line, flush=True), self.damaged)
        if not resumed and config.data.audit != "off":
            on_main(lambda: _audit(config.data, opened.stores))
        saved = resumed or (checkpoint.find(config.train.start_from, self.group) if config.train.start_from else None)
        self.model_config = _model_config(config, contract, environment, saved, resumed is not None)
        self.adapters = _adapters(config, self.model_config, environment, saved, resumed is not None)
        processor = on_main(lambda: paths.this_device(self.device))
        dtype = paths.compute_dtype(config.train.dtype, processor)
        branched = saved if saved and not resumed and config.train.start_state == "full" else None
        state = resumed.state() if resumed else {}
        if branched:
            identity = _identity(config, opened, opened.total_rows, self.model_config, dtype, self.adapters)
            _check_branch(branched.state(), identity)
            state = _branched(branched.state(), opened)
        self.past = Past(**state["past"]) if state.get("past") else None
        self.earlier_orders = state.get("orders", [])  # also of stores that are not read now, but may be again
        self.data = data = _Data(**vars(opened), mixture=_mixture(config, opened, self.past))
        self.identity = _identity(config, data, data.mixture.total, self.model_config, dtype, self.adapters)
        if resumed:
            _check_identity(state, self.identity, resumed)
        self.resumed = resumed is not None
        self.compute_dtype = compute_dtype = build.DTYPES[dtype]
        master_dtype = torch.float64 if dtype == "float64" else torch.float32
        new = [] if saved is None or resumed else on_main(lambda: _extension(config, str(saved.run_dir / "tokenizer")))
        fill = checkpoint.weights(saved, new) if saved else _starting_weights(config)
        if self.adapters:
            fill = _adapted(self.adapters, config.train.seed, saved)
        weight_bytes = build.weight_bytes(self.model_config, compute_dtype, config.model.lora.quantize)
        weight_bytes //= self.tensor_degree
        processes = environment.world_size
        parallel = paths.decide(
            config.parallel, processor, mesh["shard"].size(), weight_bytes, processes=processes, dtype=dtype
        )
        self.model = build.build_model(
            self.model_config, mesh, self.device, master_dtype, compute_dtype, fill, parallel, self.adapters
        )
        attention_name = build.attention_implementation(self.model)
        self.takes_positions = build.takes_positions(self.model)
        self.attention: str | None = None
        if config.data.documents_apart:
            self.attention = attention.keep_documents_apart(self.model, compute_dtype)
        elif config.data.packing == "concatenate":
            attention.without_masks(self.model)
        self.whole_logits: str | None = "parallel.chunked_loss"
        if parallel.chunked_loss is not False:
            self.whole_logits = head.sum_losses(self.model, self.device, compute_dtype)
            reshard(self.model)
        if parallel.chunked_loss and self.whole_logits:
            raise UserError(f"parallel.chunked_loss is true, but {self.whole_logits}", "leave it out")
        self.paths = paths.describe(
            asked=config.parallel,
            asked_dtype=config.train.dtype,
            decided=parallel,
            dtype=dtype,
            device=processor,
            attention=attention_name,
            mesh=dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)),
            weight_bytes=weight_bytes,
            whole_logits=self.whole_logits,
        )
        self.tensor_mesh = mesh["tensor"] if self.tensor_degree > 1 else None
        self.held_whole = tensor.whole_parameters(self.model) if self.tensor_mesh else []
        self.optimizer = build_optimizer(self.model, config.optimizer)
        layers = build.decoder_layers(self.model)
        if isinstance(self.optimizer, MasterAdamW):
            for index, layer in enumerate(layers):
                if not is_recomputed(index, parallel):
                    sum_in_products(layer, self.optimizer.sums)
        micro_batches = len(self.share.positions(0))
        self.exchange = Exchange(self.model, layers, parallel, master_dtype, self.device, micro_batches)
        if moments := resumed or branched:
            checkpoint.load_optimizer(moments, self.model, self.optimizer)
        self._take_over(state)
        self.first_step = self.step + 1
        if self.attention:
            self._check_isolation(compute_dtype)

        self.token_bytes = torch.zeros(self.model_config.vocab_size, dtype=torch.int64, device=self.device)
        self.token_bytes[: contract.vocab_size] = torch.tensor(contract.token_bytes, device=self.device)
        self.metrics: Metrics | None = None
        self.squared_norms: torch.Tensor | None = None  # of the latest step that is logged, with train.log_norms
        self.step_seconds, self.save_seconds, self.evaluation_seconds = 0.0, 0.0, 0.0  # of the latest ones
        self.rewinds, self.rewound_to = 0, 0  # how often the run went back to the checkpoint of this step
        self.saver = Saver(run_dir, self.group, config.checkpoint, self._keeps, self.damaged)

    def _check_isolation(self, dtype: torch.dtype) -> None:
        """Refuses a model that does not keep the documents of a row apart."""
        rows, name = self.data.train_rows[0], self.model_config.model_type
        shape = self.config.train.micro_batch_size, self.config.data.sequence_length
        self.model.eval()
        if not self.takes_positions:
            far = math.inf
        else:
            far = crossing(self.logits, rows, shape, self.model_config.vocab_size, dtype)
            reshard(self.model)  # else the root's parameters stay whole until a backward pass
        if far:
            raise UserError(
                f"a model of type {name} does not keep the documents of a row apart, which "
                f"{'data.packing best_fit' if isinstance(rows, BestFit) else 'data.document_mask'} needs",
                "set data.packing to pad_left" if isinstance(rows, BestFit) else "set data.document_mask to false",
            )

    @property
    def mixed(self) -> bool:
        """Whether the run reads several stores, and says so in its figures."""
        return len(self.data.stores) > 1

    def _state(self) -> dict:
        """What a checkpoint holds beside the tensors: everything that a later step depends on."""
        counters = {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "supervised_tokens_seen": self.supervised_tokens_seen,
            "rows_by_store": self.rows_by_store,
            "tokens_by_store": self.tokens_by_store,
            "passed_over": sorted(self.passed_over),
            "skipped_in_a_row": self.skipped_in_a_row,
            "recent_losses": self.guard.losses(),
        }
        return counters | ({"loss_scale": self.loss_scale.state()} if self.loss_scale else {})

    def _take_over(self, state: dict) -> None:
        """Goes on from the state of a checkpoint, or starts with an empty one."""
        none = [0] * len(self.data.stores)
        self.step, self.tokens_seen = state.get("step", 0), state.get("tokens_seen", 0)
        self.supervised_tokens_seen = state.get("supervised_tokens_seen", 0)
        self.rows_by_store = list(state.get("rows_by_store", none))
        self.tokens_by_store = list(state.get("tokens_by_store", none))
        self.passed_over = set(state.get("passed_over", ()))
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)
        self.guard = Guard(self.config.guard, self.device, state.get("recent_losses", []))
        half = self.config.train.dtype == "float16"
        self.loss_scale = LossScale(self.device, state.get("loss_scale")) if half else None

    def train(self, request: StopRequest) -> Outcome:
        """Takes the steps that are left; ends early, with a checkpoint, once any process is asked to stop."""
        if self.step == self.max_steps:
            return Outcome(self.step, self.max_steps, already_done=True)
        self._open_run_folder()
        try:
            self._take_steps(request)
            self.saver.wait()
            self._note_saved()
            self._say_mixture()
            on_main((self.run_dir / SAVED).touch)
        finally:
            self.profile.close()
            # what has ended the run is raised; what is being written is finished
            with contextlib.suppress(Exception, CheckpointException):
                self.saver.wait()
            if self.metrics:
                self.metrics.close()
        return Outcome(self.step, self.max_steps, interrupted=self.step < self.max_steps)

    def _take_steps(self, request: StopRequest) -> None:
        if self.step == 0:
            self.evaluate()
        interval, previous, saved = _Interval(), None, self.step if self.resumed else None
        while self.step < self.max_steps:
            step, last = self.step + 1, self.step + 1 == self.max_steps
            log_due = self._log_due(step)
            evaluation_due = _due(step, self.config.evaluate.every) or last
            checkpoint_due = _due(step, self.config.checkpoint.every) or self._keeps(step) or last
            self.profile.before(step)
            with interval.timed():
                launched = self.train_step(request)
                stands = previous is None or self._settle(previous)  # while the device is busy with the next one
                previous = launched
                if launched and stands:
                    self.step = step
                    interval.add(launched)
                    if log_due or evaluation_due or checkpoint_due:
                        stands, previous = self._settle(launched), None
            self.profile.after(step)
            if not stands:
                interval, previous, saved = _Interval(), None, self.step
                continue
            if launched is None:
                if self.saver.failed:
                    self.saver.wait()
                if saved != self.step:
                    self.save()
                break
            self.step_seconds = interval.seconds / interval.steps
            if log_due:
                self._log(launched.figures(), interval)
                interval = _Interval()
            self._note_saved()
            if self.metrics:
                self.metrics.advance()
            if evaluation_due:
                self.evaluate()
            if checkpoint_due:
                self.save()
                saved = self.step

    def train_step(self, request: StopRequest) -> "Launched | None":
        """Launches one optimizer step; None, and no step, once any process is asked to stop.

        The loss is the sum over the supervised tokens of all rows of the step, on all processes, over their number.
        Counts and the wish to stop are exchanged between the hosts; the device is not waited for.
        """
        started = time.perf_counter()
        self._mark("reading data")
        torch.manual_seed(self._step_seed())
        batches, stores = training_batches(self.data.train_rows, self.data.mixture, self.step, self.share)
        data_seconds = time.perf_counter() - started
        counts = [
            int(self._must_stop(request) or self.saver.failed),
            sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches),
            sum(sum(batch.lengths) for batch in batches),
            sum(batch.squared_lengths for batch in batches),
        ]
        lengths = [length for batch in batches for length in batch.lengths][: len(stores)]
        by_store = [np.bincount(stores, values, len(self.data.stores)) for values in (None, lengths)]
        counts += [int(count) for counted in by_store for count in counted]
        # every process puts its own data_seconds into a place of its own, so that the sum holds them all
        waited = [0] * self.environment.world_size
        waited[self.environment.rank] = int(data_seconds * 1e9)
        total = torch.tensor([*counts, *waited])
        self._mark("exchanging counts with the other processes")
        dist.all_reduce(total)
        stops, *sums = total[: len(counts)].tolist()
        supervised, tokens, squared_lengths, *counts_by_store = (value // self.tensor_degree for value in sums)
        data_seconds = total[len(counts) :].max().item() / 1e9  # of the slowest
        if stops:
            return None
        if self.step in self.passed_over:
            supervised = tokens = squared_lengths = 0
            counts_by_store = [0] * len(counts_by_store)

        values = self._update(batches, supervised) if supervised else None
        self.tokens_seen += tokens
        self.supervised_tokens_seen += supervised
        for index in range(len(self.data.stores)):
            self.rows_by_store[index] += counts_by_store[index]
            self.tokens_by_store[index] += counts_by_store[len(self.data.stores) + index]
        return Launched(self.step + 1, tokens, squared_lengths, data_seconds, values)

    def _update(self, batches: list[Batch], supervised: int) -> torch.Tensor:
        """Gradients of the batches, and the optimizer's step unless the guard objects.

        Returns:
            (5,) in float64 on the device: loss and gradient norm of the step, the verdict, this process's share of the
            loss, the loss scale.
        """
        self.model.train()
        scale = self.loss_scale.scale if self.loss_scale else None
        own_loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(batches, start=1):
            self._mark(f"in forward and backward of micro batch {number} of {len(batches)}")
            self.exchange.before(last=number == len(batches))
            batch_loss = self._summed_loss(batch) / supervised
            (batch_loss if scale is None else batch_loss * scale).backward()
            own_loss += batch_loss.detach()
        self.exchange.after()
        master_optimizer = self.optimizer if isinstance(self.optimizer, MasterAdamW) else None
        if master_optimizer:
            master_optimizer.collect()
        loss = own_loss / self.tensor_degree  # each process of a tensor group has the loss of the same rows
        self._mark("reducing the loss and the gradient norm")
        dist.all_reduce(loss)
        if self.tensor_mesh:
            tensor.reduce_gradients(self.held_whole, self.tensor_mesh)
        if self.config.train.log_norms and self._log_due(self.step + 1):
            self.squared_norms = norms.squared_norms(self.model)
        max_norm = self.config.optimizer.max_grad_norm
        if master_optimizer:
            grad_norm = master_optimizer.clip_gradients(self.model.parameters(), max_norm)
        else:
            grad_norm = clip_gradients(self.model.parameters(), max_norm, scale)
        grad_norm = grad_norm.to(self.device)  # from the host, with parallel.offload_optimizer
        verdict = self.guard.judge(loss, grad_norm)
        self._mark("taking the optimizer's step")
        rate = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        take_step(self.optimizer, skip=verdict != APPLIED, grad_scale=scale)
        self.optimizer.zero_grad()
        if self.loss_scale:
            self.loss_scale.update(grad_norm)
        values = [loss, grad_norm, verdict, own_loss, own_loss if scale is None else scale]
        return torch.stack([value.double() for value in values])

    def _must_stop(self, request: StopRequest) -> bool:
        """Whether this process was asked to stop before the next step, or has no time for it and a checkpoint."""
        train = self.config.train
        if train.stop_after is not None and self.step >= train.stop_after:
            return True
        if train.max_hours is not None:
            saves = 1.5 * self.save_seconds * (2 if self.saver.running else 1)
            reserve = 2 * self.step_seconds + saves
            if time.monotonic() - self.started + reserve > train.max_hours * 3600:
                return True
        return bool(request)

    def _settle(self, launched: "Launched") -> bool:
        """Waits for a step and acts on its verdict; False where the run went back to an earlier checkpoint.

        Raises:
            UserError: The step would do harm and the run is to stop, or too many in a row were skipped.
        """
        self._mark(f"waiting for the device to end step {launched.step}")
        figures, guard = launched.figures(), self.config.guard
        if figures.verdict == APPLIED:
            if not launched.empty:
                self.skipped_in_a_row = 0
            return True
        if self.loss_scale and math.isfinite(figures.loss) and figures.loss_scale > 1:
            return True  # an overflow of float16, after which the scale is halved
        spike = figures.verdict == SPIKE
        message = (
            f"step {launched.step}: {'a spike' if spike else 'not finite'}: loss {figures.loss:.6g}, gradient norm "
            f"{figures.grad_norm:.6g} ({self._whence(launched.step, figures.own_loss)})"
        )
        back_to = self._newest() if spike and guard.spike == "rewind" else None
        self.skipped_in_a_row += 1
        if back_to:
            self.rewinds = self.rewinds + 1 if back_to.step == self.rewound_to else 1
            self.rewound_to = back_to.step
        in_a_row = max(self.skipped_in_a_row, self.rewinds if back_to else 0)
        if (not spike and guard.non_finite == "stop") or in_a_row > guard.max_skipped:
            many = f"; {in_a_row} such steps in a row" if in_a_row > 1 else ""
            raise UserError(
                f"{message}; the step is not applied{many}",
                "lower optimizer.learning_rate or lengthen schedule.warmup_steps, or look at those rows; "
                f"{self.run_dir} resumes from its newest checkpoint",
            )
        if self.metrics:
            then = f"back to step {back_to.step}, to pass over this step and the one before" if back_to else "skipped"
            self.metrics.say(f"{message}: {then}")
        if back_to:
            self._rewind(back_to, launched.step)
        return back_to is None

    def _newest(self) -> checkpoint.Whole | None:
        """The newest checkpoint, once the one that is being written is complete."""
        self._mark("waiting for the newest checkpoint, and reading it through", PATIENCE)
        self.saver.wait()
        self._note_saved()
        return checkpoint.newest(self.run_dir, self.group, lambda line: print(line, flush=True), self.damaged)

    def _whence(self, step: int, own_loss: float) -> str:
        """The ranks whose loss is not finite (or all, where each is), and the rows of the step that they read."""
        stores, indices = rows_read(self.data.train_rows, self.data.mixture, step - 1, self.share)
        rows = [f"{self.data.mixture.names[store]}:{index}" for store, index in zip(stores, indices, strict=True)]
        everywhere: list = [None] * self.environment.world_size
        dist.all_gather_object(everywhere, (math.isfinite(own_loss), rows))
        faulty = [rank for rank, (finite, _) in enumerate(everywhere) if not finite]
        return "; ".join(
            f"rank {rank}, rows {' '.join(everywhere[rank][1])}" for rank in faulty or range(len(everywhere))
        )

    def _rewind(self, back_to: checkpoint.Whole, spiked: int) -> None:
        """Goes back to a checkpoint, and will pass over the rows of the step that spiked and of the one before it."""
        self._mark(f"going back to the checkpoint of step {back_to.step}", PATIENCE)
        passed_over = self.passed_over | {spiked - 1, max(back_to.step, spiked - 2)}
        checkpoint.weights(back_to)(self.model, [])
        checkpoint.load_optimizer(back_to, self.model, self.optimizer)
        in_a_row = self.skipped_in_a_row
        self._take_over(back_to.state())
        self.passed_over |= passed_over
        self.skipped_in_a_row = in_a_row

        def reopen() -> None:
            if self.metrics:
                self.metrics.close()
                self._open_metrics()

        on_main(reopen)

    @torch.no_grad()
    def evaluate(self) -> dict:
        """Loss, perplexity and bits per byte of the validation splits, over their supervised tokens; {} without any.

        With several stores those of each come after those of all, in which a token of any store counts as one.
        """
        started = time.monotonic()
        self.model.eval()
        sums = torch.zeros(len(self.data.stores), 3, dtype=torch.float64, device=self.device)
        for rows, of_store in zip(self.data.validation_rows, sums, strict=True):
            for batch in validation_batches(rows, self.share, self.config.evaluate.batches):
                self._mark("evaluating")
                labels = torch.from_numpy(batch.labels).to(self.device)
                supervised = labels[labels != IGNORE_INDEX]
                of_store[0] += self._summed_loss(batch)
                of_store[1] += supervised.numel()
                of_store[2] += self.token_bytes[supervised].sum()
        reshard(self.model)
        self._mark("evaluating: reducing the sums")
        dist.all_reduce(sums)
        sums /= self.tensor_degree
        figures = _validation_figures("validation_", sums.sum(dim=0).tolist())
        if self.mixed:
            for name, of_store in zip(self.data.mixture.names, sums.tolist(), strict=True):
                figures |= _validation_figures(f"validation/{name}/", of_store)
        self.evaluation_seconds = time.monotonic() - started
        if self.metrics and figures:
            self.metrics.write({"step": self.step, **figures})
        return figures

    def save(self) -> None:
        """Writes a checkpoint of the steps done, while training goes on."""
        self._mark("saving a checkpoint", PATIENCE)
        state = self._state() | {
            "template": self.data.stores[0].manifest["template"],
            "add_bos": self.data.stores[0].manifest["add_bos"],
            "identity": self.identity,
            "past": dataclasses.asdict(self.past) if self.past else None,
            "lora": dataclasses.asdict(self.adapters) if self.adapters else None,
            "orders": self._orders(),
        }
        self.saver.save(self.step, self.model, self.optimizer, state)
        on_main(self._write_mixture)
        self._note_saved()

    def _orders(self) -> list[dict]:
        """How far every store was read, and in which order, for a run that goes on from here with other stores."""
        mixture = self.data.mixture
        uses = mixture.uses_before(self.step * self.config.train.global_batch_size)
        read = zip(_contents(self.data.stores), mixture.seeds, uses, strict=True)
        orders = [{"content": content, "seed": seed, "uses": used} for content, seed, used in read]
        return orders + [order for order in self.earlier_orders if order["content"] not in _contents(self.data.stores)]

    def _note_saved(self) -> None:
        """Writes down what has become complete, once it has."""
        for saved in self.saver.completed():
            self.save_seconds = saved.seconds
            if self.metrics:
                times = {"checkpoint_stall_seconds": saved.stall_seconds, "checkpoint_seconds": saved.seconds}
                self.metrics.write({"step": saved.step, **times})

    def _keeps(self, step: int) -> bool:
        """Whether the checkpoint of a step is written and kept for ever: a run is extended from before its decay."""
        schedule = self.config.schedule
        decays = schedule.kind == "wsd" and step == self.max_steps - decay_steps(self.max_steps, schedule)
        return decays or _due(step, self.config.checkpoint.keep_every)

    def _open_run_folder(self) -> None:
        """Makes the run folder on every storage, with what a checkpoint needs beside it; figures go to the main one."""
        self.saver.open()

        def write_origin() -> None:
            if not self.resumed or not (self.run_dir / "model").exists():  # on a storage that is new
                _write_origin(self.run_dir, self.model_config, self.data.stores[0])
            configuration.write(self.config, self.run_dir / "config.yaml")

        def open_figures() -> float:
            (self.run_dir / SAVED).unlink(missing_ok=True)
            self._open_metrics()
            self._say_paths()
            self._note_start()
            if self.past and self.metrics:
                before = (f"{name} after {uses} rows" for name, uses in zip(names, self.past.uses, strict=True))
                self.metrics.say(f"goes on at step {self.step} from another run; stores: {', '.join(before)}")
            self._write_mixture()
            self._say_mixture()
            self._say_packing()
            if self.save_seconds or self.config.train.max_hours is None:
                return self.save_seconds
            return _first_save_seconds(self.run_dir, self.model)

        names = self.data.mixture.names
        together(self.group, lambda: write_origin() if self.saver.leads else None)
        self.save_seconds = on_main(open_figures)

    def _open_metrics(self) -> None:
        redacted = configuration.redacted(dataclasses.asdict(self.config))
        trackers = open_trackers(self.config.train.log_to, self.run_dir, self.step, redacted)
        self.metrics = Metrics(self.run_dir, self.step, self.max_steps, trackers)

    def _say_paths(self) -> None:
        assert self.metrics
        for line in self.paths:
            self.metrics.say(line)

    def _note_start(self) -> None:
        """Where and with what the steps from here on are taken; nothing that names a host or a person."""
        start = {
            "step": self.step,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "processes": self.environment.world_size,
            "device": paths.this_device(self.device).name,
            "paths": self.paths,
            "versions": {
                "tsumugu": tsumugu.__version__,
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "cuda": torch.version.cuda if self.device.type == "cuda" else None,
                "transformers": transformers.__version__,
            },
        }
        with open(self.run_dir / STARTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(start) + "\n")

    def _write_mixture(self) -> None:
        if self.mixed:
            reported = report(self.data.mixture, self.rows_by_store, self.tokens_by_store)
            partial = self.run_dir / ".mixture.json"
            partial.write_text(json.dumps(reported, ensure_ascii=False, indent=1), encoding="utf-8")
            partial.replace(self.run_dir / "mixture.json")

    def _say_mixture(self) -> None:
        if self.mixed and self.metrics:
            self.metrics.say(table(report(self.data.mixture, self.rows_by_store, self.tokens_by_store)))

    def _say_packing(self) -> None:
        if not self.metrics:
            return
        for name, rows in zip(self.data.mixture.names, self.data.train_rows, strict=True):
            if isinstance(rows, BestFit):
                self.metrics.say(f"{name}: best_fit fills {rows.filled:.2%} of {len(rows):,} rows")
        if self.attention:
            self.metrics.say(self.attention)

    def logits(self, batch: Batch) -> torch.Tensor:
        """(batch, tokens, vocabulary); every process calls it."""
        return self.model(**self._inputs(batch)).logits

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if self.takes_positions:
            inputs["position_ids"] = batch.position_ids
        tensors = {key: on_device(a, self.device) for key, a in inputs.items() if a is not None}
        boundaries = attention.arguments(self.model, batch.boundaries, batch.input_ids.shape[1])
        # transformers keeps documents apart by restarting positions only without a cache and without a mask
        return tensors | boundaries | {"use_cache": False}

    def _summed_loss(self, batch: Batch) -> torch.Tensor:
        if self.whole_logits:
            return summed_loss(self.logits(batch), on_device(batch.labels, self.device))
        labels = batch.labels.ravel()
        positions = np.flatnonzero(labels != IGNORE_INDEX)  # on the host, which knows without waiting for the device
        targets = None, on_device(labels, self.device)
        if len(positions) < len(labels):
            targets = on_device(positions, self.device), on_device(labels[positions], self.device)
        return self.model(**self._inputs(batch), targets=targets)

    def _mark(self, doing: str, patience: float = 1.0) -> None:
        first = self.step + 1 == self.first_step  # compiles, and starts what starts late
        self.watchdog.mark(f"{doing} (after {self.step} steps)", PATIENCE if first else patience)

    def _log_due(self, step: int) -> bool:
        return step in (1, self.max_steps) or _due(step, self.config.train.log_every)

    def _learning_rate(self) -> float:
        """Of the step that is being taken, the one after the `self.step` steps done."""
        peak = self.config.optimizer.learning_rate
        return learning_rate(self.step + 1, self.max_steps, peak, self.config.schedule)

    def _step_seed(self) -> int:
        """Dropout is drawn anew each step from (seed, step, rank), so that no generator state need be saved."""
        key = f"{self.config.train.seed} {self.step} {self.share.rank}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "little")

    def _log(self, figures: "StepFigures", interval: "_Interval") -> None:
        memory_peak = torch.tensor(memory_peak_gib(self.device))
        self._mark("comparing the processes' figures")
        dist.all_reduce(memory_peak, dist.ReduceOp.MAX)
        if not self.metrics:
            return
        of_parts = {}
        if self.squared_norms is not None:
            of_parts = norms.figures(self.model, self.squared_norms, figures.loss_scale if self.loss_scale else 1.0)
        seconds = interval.seconds
        world_size = self.environment.world_size
        tokens_per_second = interval.tokens / seconds
        flops_per_second = flops(self.model, interval.tokens, interval.squared_lengths) / seconds / world_size
        peak = peak_flops(self.device)
        peak_rate = self.config.optimizer.learning_rate
        self.metrics.write(
            {
                "step": self.step,
                "loss": figures.loss,
                "learning_rate": learning_rate(self.step, self.max_steps, peak_rate, self.config.schedule),
                "grad_norm": figures.grad_norm,
                "tokens_seen": self.tokens_seen,
                "supervised_tokens": self.supervised_tokens_seen,
                "tokens_per_second": tokens_per_second,
                "tokens_per_second_per_device": tokens_per_second / world_size,
                "tflops_per_device": flops_per_second / 1e12,
                "mfu": flops_per_second / peak if peak else None,
                "memory_peak_gib": memory_peak.item(),
                "step_seconds": seconds / interval.steps,
                "data_seconds": interval.data_seconds / interval.steps,
            }
            | self._seen_by_store()
            | of_parts
        )

    def _seen_by_store(self) -> dict:
        if not self.mixed:
            return {}
        names = self.data.mixture.names
        return {f"tokens/{name}": tokens for name, tokens in zip(names, self.tokens_by_store, strict=True)}


@dataclass(frozen=True)
class StepFigures:
    """Of one step: loss (nats a supervised token) and gradient norm over all processes, and what the guard says."""

    loss: float
    grad_norm: float
    verdict: int
    own_loss: float
    loss_scale: float


class Launched:
    """A step whose work may still be queued on the device.

    Args:
        step: Its number, counted from 1.
        tokens: Inputs on all processes.
        squared_lengths: Of its rows, their sum.
        data_seconds: For which the slowest process made its rows.
        values: From `Trainer._update`; None for a step without a supervised token, which changes nothing.
    """

    def __init__(self, step: int, tokens: int, squared_lengths: int, data_seconds: float, values: torch.Tensor | None):
        self.step, self.tokens, self.squared_lengths, self.data_seconds = step, tokens, squared_lengths, data_seconds
        self.empty = values is None
        self._values, self._ready = values, None
        if values is not None and values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def figures(self) -> StepFigures:
        """Waits until the device has done the step."""
        if self._values is None:
            return StepFigures(math.nan, 0.0, APPLIED, math.nan, math.nan)
        if self._ready:
            self._ready.synchronize()
        loss, grad_norm, verdict, own_loss, loss_scale = self._values.tolist()
        return StepFigures(loss, grad_norm, int(verdict), own_loss, loss_scale)


class _Interval:
    """Sums since the last line of metrics."""

    def __init__(self):
        self.steps, self.tokens, self.squared_lengths = 0, 0, 0
        self.seconds, self.data_seconds = 0.0, 0.0

    def add(self, launched: Launched) -> None:
        self.steps += 1
        self.tokens += launched.tokens
        self.squared_lengths += launched.squared_lengths
        self.data_seconds += launched.data_seconds

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """What is done inside belongs to the steps of the interval."""
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started


@dataclass(frozen=True)
class _Stores:
    """Stores of one tokenizer, the rows of their splits, and how many steps (and rows) are asked for."""

    stores: list[Store]
    contract: Contract
    train_rows: list[Rows]
    validation_rows: list[Rows]
    steps: int
    total_rows: int


@dataclass(frozen=True)
class _Data(_Stores):
    """What a run reads: stores, and in what order."""

    mixture: Mixture


@contextlib.contextmanager
def _memory_explained(config: TrainingRun, environment: Environment, trainer: Trainer | None = None) -> Iterator[None]:
    """Says where the memory is where it runs out, with the model that there is by then."""
    device = environment.device
    try:
        yield
    except torch.OutOfMemoryError as error:
        found, options = None, []
        place = f"rank {environment.rank}, building the model"
        if trainer is not None:
            place = f"rank {environment.rank}, step {trainer.step + 1}"
            found = memory.measure(
                trainer.model,
                trainer.optimizer,
                config,
                trainer.model_config.vocab_size,
                trainer.compute_dtype,
                device,
                trainer.whole_logits is None,
                trainer.exchange.waiting(),
            )
            options = memory.changes(config, found, trainer.share.world_size)
        block, refusal = memory.out_of_memory(error, place, found, options, device)
        memory.say(block)
        raise refusal from None


def planned_steps(config: TrainingRun) -> int:
    """The steps that a configuration asks for, on the stores that it names."""
    opened = _open_stores(config)
    if config.train.start_state == "weights":  # else what was read before is in a checkpoint
        _mixture(config, opened, None)
    return opened.steps


def _first_save_seconds(run_dir: Path, model: PreTrainedModel) -> float:
    """How long a checkpoint will take: as the last one of the run did, else by 12 bytes a parameter at 100 MB/s."""
    lines = [line for line in read_metrics(run_dir) if "checkpoint_seconds" in line]
    if lines:
        return lines[-1]["checkpoint_seconds"]
    local = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters() if p.requires_grad)
    return sum(parameter.numel() for parameter in local) * 12 / 100e6


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _validation_figures(prefix: str, sums: list[float]) -> dict:
    """From nats, supervised tokens and bytes of text; {} without a token."""
    nats, tokens, text_bytes = sums
    if tokens == 0:
        return {}
    return {
        f"{prefix}loss": nats / tokens,
        f"{prefix}perplexity": math.exp(min(nats / tokens, 700)),
        f"{prefix}bits_per_byte": nats / math.log(2) / text_bytes if text_bytes else math.nan,
    }


def _open_stores(config: TrainingRun) -> _Stores:
    stores = [open_store(Path(entry.path)) for entry in config.data.entries]
    contract, *_ = (_store_contract(store) for store in stores)
    _check_alike(config, stores)
    pad_id = contract.pad_id or 0  # what a padded position holds is never seen: it is neither attended to nor a label
    train_rows, validation_rows = (
        [rows_of(config.data, split, pad_id, stores[0].supervised, config.train.seed) for split in splits]
        for splits in ([store.train for store in stores], [store.validation for store in stores])
    )
    sizes = [len(rows) for rows in train_rows]
    if 0 in sizes:
        raise UserError(f"{stores[sizes.index(0)].path} holds no row for training", "prepare a larger corpus")
    steps, total_rows = _length(config, sizes[0])
    return _Stores(stores, contract, train_rows, validation_rows, steps, total_rows)


def _mixture(config: TrainingRun, opened: _Stores, past: Past | None) -> Mixture:
    sizes = [len(rows) for rows in opened.train_rows]
    return mix(config.data, sizes, opened.total_rows, config.train.global_batch_size, config.train.seed, past)


def _audit(data: DataConfig, stores: list[Store]) -> None:
    """Looks at some rows of every store, says what is suspicious, and refuses what would teach the wrong thing."""
    for store in stores:
        for finding in quick_audit(store).findings:
            about = f"{finding.count} of {finding.of} {finding.unit}: " if finding.of else ""
            message = f"{store.path}: {finding.name}: {about}{finding.message}"
            if finding.level == "error" and data.audit == "refuse":
                hint = f"{finding.mend}; `tsumugu audit {store.path}` shows more; data.audit: warn trains all the same"
                raise UserError(message, hint)
            print(f"tsumugu: warning: {message} ({finding.mend})", file=sys.stderr, flush=True)


def _store_contract(store: Store) -> Contract:
    contract = read_contract(store.path / "tokenizer")
    if contract.fingerprint != store.fingerprint:
        raise UserError(
            f"{store.path}: its tokenizer folder is not the tokenizer that made its ids", "prepare the store again"
        )
    return contract


def _check_alike(config: TrainingRun, stores: list[Store]) -> None:
    """Refuses a packing that the stores do not allow, and stores that no one model can be trained and exported with."""
    first = stores[0]
    for store in stores:
        if store.fingerprint != first.fingerprint:
            raise UserError(
                f"{store.path} was made with another tokenizer than {first.path}", "prepare both with the same one"
            )
        for key in ("kind", "template", "add_bos"):
            if store.manifest[key] != first.manifest[key]:
                raise UserError(
                    f"{store.path} has {key} {store.manifest[key]}, {first.path} has {first.manifest[key]}",
                    "stores of a mixture must be prepared alike",
                )
    if first.supervised and config.data.packing == "concatenate":
        raise UserError(
            f"data.packing is concatenate, but {first.path} holds instructions",
            "set data.packing to best_fit (or pad_left)",
        )


def _length(config: TrainingRun, rows: int) -> tuple[int, int]:
    """Steps of the run, and the position from which rows are empty; `rows` are those of a lone store."""
    train, batch = config.train, config.train.global_batch_size
    if train.max_epochs is not None:
        total_rows = max(1, math.ceil(round(train.max_epochs * rows, 6)))  # 1.1 × 10 is 11.000000000000002
        return math.ceil(total_rows / batch), total_rows
    if train.max_tokens is not None:
        if config.data.packing != "concatenate":
            raise UserError(
                f"train.max_tokens counts full rows, data.packing {config.data.packing} has shorter ones",
                "set train.max_epochs or train.max_steps",
            )
        steps = math.ceil(train.max_tokens / (batch * config.data.sequence_length))
    else:
        assert train.max_steps is not None
        steps = train.max_steps
    return steps, steps * batch


def _model_config(
    config: TrainingRun,
    contract: Contract,
    environment: Environment,
    saved: checkpoint.Whole | None,
    resumed: bool,
) -> PretrainedConfig:
    """The configuration of the model, checked against tokenizer and sequence length.

    `saved` is the checkpoint that the weights come from, if they do; `resumed` says whether it is the run's own.
    """
    model, own_tokenizer = config.model, config.tokenizer.path
    if own_tokenizer is not None:
        _check_tokenizer(own_tokenizer, contract, "tokenizer.path", own_tokenizer, _extension(config, own_tokenizer))
    if model.preset is not None:
        result = preset_config(model.preset, contract)
    elif model.config is not None:
        result = build.read_config(model.config)
        build.take_special_ids(result, contract)
    elif saved is not None:  # of a run that resumes: what it started from need not exist any more
        run_dir = saved.run_dir
        result = on_main(lambda: build.read_config(str(run_dir / "model")))  # a storage that is new has none yet
        if not resumed:
            extension = on_main(lambda: _check_start(config, saved, contract))
            if extension:
                result.vocab_size = max(result.vocab_size, contract.vocab_size)
    else:
        assert model.pretrained is not None
        name = model.pretrained
        folder = build.barrier_first(environment.local_rank, lambda: build.find_pretrained(name))
        result = build.read_config(str(folder))
        if own_tokenizer is None or (folder / "contract.json").exists():
            _check_tokenizer(str(folder), contract, "model.pretrained", name, _extension(config, str(folder)))
        if _new_rows(config, folder):
            result.vocab_size = max(result.vocab_size, contract.vocab_size)
    if contract.vocab_size > result.vocab_size:
        raise UserError(
            f"the store's tokenizer has {contract.vocab_size} ids, the model only {result.vocab_size}",
            "prepare the store with the model's tokenizer",
        )
    longest = getattr(result, "max_position_embeddings", None)
    if longest is not None and config.data.sequence_length > longest:
        raise UserError(
            f"data.sequence_length is {config.data.sequence_length}, the model has {longest} positions",
            f"set it to {longest} or less",
        )
    return result


def _extension(config: TrainingRun, path: str) -> build.NewRows:
    """The rows that the store's tokenizer has beyond the one at `path`, where it is an extension of that."""
    if not (Path(path) / "contract.json").exists():
        return []
    return new_rows(Path(config.data.entries[0].path) / "tokenizer", read_contract(Path(path))) or []


def _new_rows(config: TrainingRun, pretrained: Path) -> build.NewRows:
    """The rows that a pretrained model lacks for the store's tokenizer: by its own contract, or tokenizer.path."""
    return _extension(config, str(pretrained)) or _extension(config, config.tokenizer.path or str(pretrained))


def _check_start(config: TrainingRun, saved: checkpoint.Whole, contract: Contract) -> build.NewRows:
    """The rows that the run of train.start_from lacks, after checking that its tokenizer is that of the store."""
    own = str(saved.run_dir / "tokenizer")
    extension = _extension(config, own)
    _check_tokenizer(own, contract, "train.start_from", str(config.train.start_from), extension)
    return extension


def _check_tokenizer(path: str, contract: Contract, key: str, name: str, extension: build.NewRows = ()) -> None:
    if not (Path(path) / "contract.json").exists():
        raise UserError(
            f"{key} {name}: no contract of its tokenizer, so that the store's ids cannot be compared with it",
            "set tokenizer.path to a tokenizer folder of tsumugu that is that model's",
        )
    if read_contract(Path(path)).fingerprint != contract.fingerprint and not extension:
        raise UserError(f"the store was made with another tokenizer than {key} {name}", f"prepare it with {path}")


def _starting_weights(config: TrainingRun):
    if config.model.pretrained is not None:
        folder = build.find_pretrained(config.model.pretrained)
        return build.pretrained(folder, _new_rows(config, folder))
    return build.initialised(config.train.seed)


def _adapters(
    config: TrainingRun,
    model_config: PretrainedConfig,
    environment: Environment,
    saved: checkpoint.Whole | None,
    resumed: bool,
) -> lora.Adapters | None:
    """The adapters that are trained, if any, with the base model that they stand beside.

    `saved` is the checkpoint that the weights come from, if they do; `resumed` says whether it is the run's own.
    """
    wanted, recorded = config.model.lora, saved.state().get("lora") if saved else None
    if saved and bool(recorded) != (wanted.rank is not None):
        without, name = "with" if recorded else "without", config.train.start_from
        if resumed:
            problem = f"{saved.run_dir} holds a checkpoint of another run: one {without} model.lora"
            raise UserError(problem, "set it back to resume, or choose another --run-dir")
        raise UserError(
            f"train.start_from {name} was trained {without} model.lora, and this run is not",
            f"`tsumugu export {name}`, and set model.pretrained to the folder in place of train.start_from",
        )
    if wanted.rank is None:
        return None
    lora.check_installed()
    name = config.model.pretrained or (recorded or {})["base"]
    folder = build.barrier_first(environment.local_rank, lambda: build.find_pretrained(name))
    layers = build.decoder_layers(build.meta_model(model_config, torch.float32))
    if wanted.quantize:
        nf4.check(layers, environment.device)
    adapters = lora.Adapters(
        rank=wanted.rank,
        alpha=2 * wanted.rank if wanted.alpha is None else wanted.alpha,
        dropout=wanted.dropout,
        targets=lora.find_targets(layers, wanted.targets),
        new_rows=recorded["new_rows"] if recorded else _new_rows(config, folder),
        base=name,
        base_sha256=on_main(lambda: build.weights_sha256(folder)),
        quantize=wanted.quantize,
    )
    if recorded and not resumed:
        if saved and on_main(lambda: _extension(config, str(saved.run_dir / "tokenizer"))):
            raise UserError(
                f"the store's tokenizer has more ids than that of train.start_from {config.train.start_from}",
                "export that run merged, and set model.pretrained to the folder instead",
            )
        own = _identity_of_adapters(lora.Adapters(**recorded))
        for change in _changes(own, _identity_of_adapters(adapters)).values():
            raise UserError(
                f"train.start_from {config.train.start_from} has other adapters: {change}",
                "set it back, or export that run merged and set model.pretrained to the folder instead",
            )
    return adapters


def _adapted(adapters: lora.Adapters, seed: int, saved: checkpoint.Whole | None):
    """Fills a model with the base's weights, and with adapters that are new or those of a checkpoint."""
    read = build.quantized if adapters.quantize else build.pretrained
    base = read(build.find_pretrained(adapters.base), adapters.new_rows)
    fill = build.with_adapters(base, seed)
    if saved is None:
        return fill
    trained = checkpoint.weights(saved)

    def fill_all(model: PreTrainedModel, mapping: list) -> None:
        fill(model, mapping)
        trained(model, mapping)

    return fill_all


def _identity_of_adapters(adapters: lora.Adapters) -> dict:
    values = {
        f"model.lora.{key}": getattr(adapters, key) for key in ("rank", "alpha", "dropout", "targets", "quantize")
    }
    return values | {"the base model's sha256": adapters.base_sha256}


def _identity(
    config: TrainingRun,
    data: _Stores,
    rows: int,
    model_config: PretrainedConfig,
    dtype: str,
    adapters: lora.Adapters | None,
) -> dict:
    """What must not change when a run is resumed: everything that its numbers depend on, but for the mesh."""
    volatile = ("transformers_version", "_name_or_path", "dtype", "architectures")
    shape = {key: value for key, value in model_config.to_dict().items() if key not in volatile}
    return {
        **_identity_of_data(config, data.stores),
        "data.sequence_length": config.data.sequence_length,
        "data.packing": config.data.packing,
        **{f"data.{key}": True for key in ("document_mask", "group_by_length") if getattr(config.data, key)},
        **({"parallel.fp8": config.parallel.fp8} if config.parallel.fp8 else {}),
        "the length of the run (steps)": data.steps,
        "the rows of the run": rows,
        "train.global_batch_size": config.train.global_batch_size,
        "train.seed": config.train.seed,
        "train.dtype": dtype,
        **{f"optimizer.{key}": value for key, value in dataclasses.asdict(config.optimizer).items()},
        **{f"schedule.{key}": value for key, value in dataclasses.asdict(config.schedule).items()},
        **(_identity_of_adapters(adapters) if adapters else {}),
        **{f"the model's {key}": value for key, value in json.loads(json.dumps(shape, default=str)).items()},
    }


def _identity_of_data(config: TrainingRun, stores: list[Store]) -> dict:
    """The contents of the stores, wherever they lie, and how they are mixed."""
    contents = _contents(stores)
    if len(stores) == 1:
        return {"data.store": contents[0]}
    mixed: dict[str, Any] = {}
    mixed |= {f"data.stores.{entry.name}": content for entry, content in zip(config.data.stores, contents, strict=True)}
    for entry in config.data.stores:
        mixed |= {f"data.stores.{entry.name}.{key}": getattr(entry, key) for key in ("weight", "tokens", "max_epochs")}
    if config.data.stages:
        mixed["data.stages"] = [dataclasses.asdict(stage) for stage in config.data.stages]
    return {"data.stores": [entry.name for entry in config.data.stores], **mixed}


def _contents(stores: list[Store]) -> list[str]:
    contents = [json.dumps([store.fingerprint, store.manifest["splits"]], sort_keys=True) for store in stores]
    return [hashlib.sha256(content.encode()).hexdigest() for content in contents]


def _branched(state: dict, opened: _Stores) -> dict:
    """The state of a checkpoint for a run that goes on from it with other stores, or the same."""
    orders, contents = state["orders"], _contents(opened.stores)
    before = [order["content"] for order in orders]
    places = [before.index(content) if content in before else None for content in contents]
    past = Past(
        position=state["step"] * state["identity"]["train.global_batch_size"],
        uses=tuple(0 if place is None else orders[place]["uses"] for place in places),
        seeds=tuple(None if place is None else orders[place]["seed"] for place in places),
    )
    counted = ("rows_by_store", "tokens_by_store")
    counts = {
        key: [0 if place is None or place >= len(state[key]) else state[key][place] for place in places]
        for key in counted
    }
    same_rows = len(contents) == 1 and contents == before[:1]
    passed_over = state["passed_over"] if same_rows else []
    return state | counts | {"past": dataclasses.asdict(past), "passed_over": passed_over}


# What a run that goes on from another one may change: by its first letters in `_identity`.
_BRANCHES = ("the length of the run", "the rows of the run", "schedule.", "optimizer.", "data.store", "data.stages")


def _changes(saved: dict, identity: dict) -> dict[str, str]:
    """What differs, and how."""
    return {
        key: f"{key} was {saved.get(key)}, now {identity.get(key)}"
        for key in sorted(saved.keys() | identity.keys())
        if saved.get(key) != identity.get(key)
    }


def _check_identity(state: dict, identity: dict, resumed: checkpoint.Whole) -> None:
    saved, run_dir = state["identity"], resumed.run_dir
    changes = _changes(saved, identity)
    steps = saved["the length of the run (steps)"]
    if changes and state["step"] == steps and all(key.startswith(_BRANCHES) for key in changes):
        start = steps
        if saved["schedule.kind"] == "wsd":
            schedule = ScheduleConfig(kind="wsd", decay_steps=saved["schedule.decay_steps"])
            decay = steps - decay_steps(steps, schedule)
            start = decay if decay in checkpoint.complete_steps_everywhere(run_dir, resumed.group) else steps
        raise UserError(
            f"{run_dir} has taken all its steps, and {next(iter(changes.values()))}",
            f"to go on, choose another --run-dir and set train.start_from to {run_dir}@{start} in place of the model, "
            "with train.start_state full to keep moments, step and place in the data, or weights to begin anew",
        )
    for change in changes.values():
        raise UserError(
            f"{run_dir} holds a checkpoint of another run: {change}",
            "set it back to resume, or choose another --run-dir",
        )


def _check_branch(state: dict, identity: dict) -> None:
    for key, change in _changes(state["identity"], identity).items():
        if not key.startswith(_BRANCHES):
            raise UserError(
                f"train.start_state is full, but the run of train.start_from is another one: {change}",
                "set it back, or set train.start_state to weights",
            )
    steps = identity["the length of the run (steps)"]
    if steps <= state["step"]:
        raise UserError(
            f"train.start_state is full, and train.start_from has taken {state['step']} of {steps} steps already",
            "lengthen the run, whose steps are counted with those, or set train.start_state to weights",
        )


def _write_origin(run_dir: Path, model_config: PretrainedConfig, store: Store) -> None:
    """What every checkpoint of the run needs beside it; written once, since a run may be killed while it resumes."""
    model_config.save_pretrained(run_dir / "model")
    copy_tokenizer(store.path / "tokenizer", run_dir / "tokenizer")

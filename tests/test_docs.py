"""Pages that name keys, parameters and scripts name those that there are, and both languages the same ones."""

import re
import stat
import subprocess
from pathlib import Path

import pytest

from tsumugu import config
from tsumugu.config import SlurmSiteConfig
from tsumugu.launch.slurm import job_script

DOCS = Path(__file__).parents[1] / "docs"
KEYS = {name for kind in (config.TrainingRun, config.Preparation) for name, _ in config._flag_names(kind)}
TWINS = ("migrating-from-smp", "sagemaker", "serving", "slurm")

# "The SageMaker model parallel library v2 reference": core feature configuration parameters
SMP_V2 = """hybrid_shard_degree sm_activation_offloading activation_loading_horizon fsdp_cache_flush_warnings
allow_empty_shards tensor_parallel_degree context_parallel_degree expert_parallel_degree random_seed"""
# SageMaker Python SDK, "Configuration Parameters for distribution", with those of sharded data parallelism
SMP_V1 = """partitions pipeline_parallel_degree microbatches pipeline optimize placement_strategy auto_partition
default_partition contiguous horovod memory_weight ddp active_microbatches deterministic_server offload_activations
activation_loading_horizon tensor_parallel_degree fp16 fp16_params shard_optimizer_state prescaled_batch skip_tracing
sharded_data_parallel_degree sdp_reduce_bucket_size sdp_param_persistence_threshold sdp_max_live_parameters
sdp_hierarchical_allgather sdp_gradient_clipping processes_per_host custom_mpi_options"""


# amazon-sagemaker-examples, training/distributed_training/pytorch/model_parallel: the arguments of the training script
SAMPLE = """train_batch_size val_batch_size max_steps max_training_steps seed same_seed n_gpus fp16 bf16
sharded_data_parallel_degree ddp_dist_backend grad_clip weight_decay beta1 beta2 activation_checkpointing logging_freq
log_param_norms log_reduced_training_loss use_bert_data zipped_data epochs output-data-dir checkpoint-dir model-dir
training-dir test-dir parallel_proc_data_processing save_final_full_model load_partial load_full logits_output
prescaled_batch fine_tune model_name max_context_width vocab_size hidden_width intermediate_size num_layers num_heads
num_heads_kv resid_pdrop embd_pdrop attn_pdrop alibi summary_first_pdrop use_adamw use_distributed_transformer
checkpoint_sublayers initializer_range tensor_parallel_degree pipeline_parallel_degree microbatches active_microbatches
optimize activation_strategy shard_optimizer_state offload_activations fast_mode static_mode delayed_param
same_partition_load attention_in_fp32 residual_addition_in_fp32 placement_strategy activation_loading_horizon
skip_tracing query_key_layer_scaling fused_softmax flash_attention fused_dropout fused_bias_gelu gradient_accumulation
model_type rotary_pct rotary_emb_base num_kept_checkpoints checkpoint_freq validation_freq validation_batches
manual_partition partition_assignment preserve_np_state fast_validation gather_if_shard clean_cache use_fsx
enable_memory_profiling lr lr_decay_style lr_decay_iters min_lr warmup plateau ci time_to_train throughput loss"""
# the same for SMP v2 (model_parallel_v2), but for those that the sample's script has too
SMP_V2_SCRIPT = """fp8 fp8_amax_history_len fp8_amax_compute_algo patch_neox_rope logging_freq_for_avg tensorboard_dir
checkpoint_dir resume_from_checkpoint checkpoint_type model_dir save_final_model dataset_type data_num_workers data_type
use_synthetic_data training_dir test_dir hf_pretrained_model_name_or_dir use_smp_flash_attn llama_intermediate_size
sliding_window num_key_value_heads num_experts_per_tok num_local_experts moe_load_balancing global_token_shuffle
moe_all_to_all_dispatcher use_smp_implementation moe limit_all_gathers forward_prefetch sharding_strategy
use_orig_params backward_fetch_policy auto_wrap_policy distributed_backend nccl_test_log profile_nsys framework"""


def read(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def parameters(page: str) -> list[set[str]]:
    """What the left cells of the tables name, row by row."""
    rows = re.findall(r"^\| (.*?) \|", page, re.MULTILINE)
    return [set(re.findall(r"`([\w.-]+)`", row)) for row in rows]


@pytest.mark.parametrize(
    "name", ["migrating-from-smp", "migrating-from-smp.ja", "sagemaker", "sagemaker.ja", "slurm", "slurm.ja"]
)
def test_every_key_that_is_named_exists(name):
    sections = "model|tokenizer|data|train|optimizer|schedule|parallel|checkpoint|evaluate|guard|prepare"
    named = set(re.findall(rf"`(?:--)?((?:{sections})\.\w+(?:\.\w+)?)", read(name)))
    assert named
    assert {key for key in named if key not in KEYS and not any(known.startswith(f"{key}.") for known in KEYS)} == set()


@pytest.mark.parametrize("name", TWINS)
def test_both_languages_have_the_same_rows(name):
    assert parameters(read(name)) == parameters(read(f"{name}.ja"))


@pytest.mark.parametrize("name", ["migrating-from-smp", "migrating-from-smp.ja"])
def test_every_hyperparameter_of_the_sample_and_parameter_of_smp_has_a_row(name):
    chapters = re.findall(r"^## .*?(?=^## |\Z)", read(name), re.MULTILINE | re.DOTALL)
    sample, first, second = (set().union(*parameters(chapter)) for chapter in chapters[:3])
    assert set(SAMPLE.split()) - sample == set()
    assert set(SMP_V1.split()) - first == set()
    assert set(f"{SMP_V2} {SMP_V2_SCRIPT}".split()) - second == set()


@pytest.mark.parametrize("name", ["slurm", "slurm.ja"])
def test_the_script_that_is_shown_is_the_one_that_is_written(name):
    shown = next(block for block in blocks(name) if "scontrol" in block)
    written = job_script(Path("/fsx/me/runs/mine"), SlurmSiteConfig(), 4, 8, None)
    for line in shown.splitlines():
        assert line == "…" or line in written.splitlines()


@pytest.mark.parametrize("name", ["slurm", "slurm.ja"])
def test_the_example_for_pbs_starts_a_torchrun_on_every_node(name, tmp_path):
    script = next(block for block in blocks(name) if "#PBS" in block)
    for command, does in {"mpirun": f'printf "%s\\n" "$@" > {tmp_path}/called; exit 7', "module": "true"}.items():
        path = tmp_path / command
        path.write_text(f"#!/bin/bash\n{does}\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    (tmp_path / "nodes").write_text("hnode002\nhnode005\nhnode007\n")
    script = script.replace("/etc/profile.d/modules.sh", "/dev/null")
    variables = {"PBS_O_WORKDIR": str(tmp_path), "PBS_NODEFILE": str(tmp_path / "nodes"), "PBS_JOBID": "9.pbs"}
    variables["PATH"] = f"{tmp_path}:/usr/bin:/bin"
    done = subprocess.run(["bash", "-c", script], env=variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (7, "")
    called = (tmp_path / "called").read_text().split()
    assert called[:2] == ["-np", "3"]
    assert called[called.index("--nnodes") :][:2] == ["--nnodes", "3"]
    assert called[called.index("--rdzv-endpoint") :][:4] == ["--rdzv-endpoint", "hnode002:29500", "--rdzv-id", "9.pbs"]


def blocks(name: str) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", read(name), re.MULTILINE | re.DOTALL)

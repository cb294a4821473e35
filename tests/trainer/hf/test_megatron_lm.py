"""A checkpoint that Megatron-LM's own code saved comes out as the same model; a hostile one does nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from configs.errors import BadInput
from configs.plan.derive import layer_windows
from tests.pool import Place
from trainer.hf.megatron_arguments import INERT, MAPPED, ONLY
from trainer.hf.megatron_lm import _model_fields, find_megatron_checkpoint, read_megatron_model

ROOT = Path(__file__).resolve().parents[3]
# Megatron-LM's argument parser, validation and save_checkpoint, as pretrain_gpt.py calls them, on one CPU rank. Takes a
# JSON file of arguments by folder.
SAVE_WITH_MEGATRON_LM = """
import json
import sys

import torch
import torch.distributed as dist


def main():
    from parallel.platform import load_platform

    load_platform("cpu").activate(0)
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    for folder, words in json.load(open(sys.argv[1])).items():
        save(folder, words)


def save(folder, words):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args
    from megatron.training.checkpointing import save_checkpoint
    from megatron.training.global_vars import set_args
    from trainer.model.attention.core import SdpaCoreAttention

    sys.argv = ["pretrain_gpt.py", *words, "--save", f"{folder}/megatron", "--save-interval", "1"]
    args = parse_args()
    args.padded_vocab_size = 256
    validate_args(args, {})
    set_args(args)
    spec = get_gpt_layer_local_spec(args.num_experts, False, qk_layernorm=args.qk_layernorm, normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = SdpaCoreAttention  # theirs makes a mask on a GPU
    model = GPTModel(
        core_transformer_config_from_args(args), spec, vocab_size=256, max_sequence_length=128,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type="rope", rotary_base=args.rotary_base,
    )
    save_checkpoint(10, [model], None, None, 0)
    tokens = torch.arange(24).view(1, 24) * 7 % 251
    with torch.no_grad():
        logits = model.eval()(tokens, torch.arange(24).view(1, 24), None)
    torch.save({"tokens": tokens, "logits": logits}, f"{folder}/logits.pt")


if __name__ == "__main__":
    main()
"""
ARGUMENTS = (
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 112 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --seq-length 32 --max-position-embeddings 128 --swiglu --normalization RMSNorm "
    "--disable-bias-linear --position-embedding-type rope --rotary-base 50000 --micro-batch-size 1 --vocab-size 251 "
    "--make-vocab-size-divisible-by 16 --tokenizer-type NullTokenizer --transformer-impl local "
    "--ckpt-format torch_dist "
    "--no-save-optim --no-save-rng --use-cpu-initialization --lr 1e-3 --train-iters 1 --no-persist-layer-norm "
    "--no-gradient-accumulation-fusion --no-rope-fusion --no-masked-softmax-fusion"
).split()
EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 48 --moe-router-load-balancing-type none "
    "--moe-token-dispatcher-type alltoall"
).split()


CASES = {
    "LlamaForCausalLM": ["--untie-embeddings-and-output-weights"],
    "Qwen3ForCausalLM": ["--qk-layernorm"],
    "Qwen2ForCausalLM": ["--add-qkv-bias", "--window-size", "6,0", "--window-attn-skip-freq", "2"],
    "MixtralForCausalLM": ["--untie-embeddings-and-output-weights", *EXPERTS],
    "Qwen3MoeForCausalLM": ["--qk-layernorm", "--untie-embeddings-and-output-weights", *EXPERTS],
}


@pytest.fixture(scope="module")
def saved_models(tmp_path_factory) -> Path:
    """Return a folder with one folder for each case, in which Megatron-LM's own code saved a checkpoint and logits."""
    folder = tmp_path_factory.mktemp("megatron_lm")
    for name in CASES:
        (folder / name).mkdir()
    words = {str(folder / name): [*ARGUMENTS, *extra] for name, extra in CASES.items()}
    (folder / "cases.json").write_text(json.dumps(words))
    (folder / "save.py").write_text(SAVE_WITH_MEGATRON_LM)
    command = [sys.executable, "-W", "ignore", str(folder / "save.py"), str(folder / "cases.json")]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return folder


def export(place: Place, checkpoint: str, target: str) -> int:
    """Run the command in a worker."""
    from tools.convert_hf import main

    return main(["export", checkpoint, target])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", CASES)
def test_megatron_lms_own_checkpoint_is_exported(ranks, saved_models, tmp_path, architecture):
    import transformers

    folder = saved_models / architecture
    assert ranks.run(export, str(folder / "megatron"), str(tmp_path / "hf")) == [0]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert model.config.architectures == [architecture]
    expected = torch.load(folder / "logits.pt")
    with torch.no_grad():
        logits = model(expected["tokens"]).logits
    torch.testing.assert_close(logits, expected["logits"][..., :251], atol=1e-6, rtol=0)


class Hostile:
    """Pickles to a call of os.mkdir."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def whole_arguments(**changes) -> Namespace:
    arguments = {
        "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 112, "num_attention_heads": 4, "padded_vocab_size": 256,
        "max_position_embeddings": 128, "swiglu": True, "normalization": "RMSNorm", "add_bias_linear": False,
        "position_embedding_type": "rope", "group_query_attention": False, "kv_channels": 16,
    }  # fmt: skip
    return Namespace(**(arguments | changes))


def with_experts(**changes) -> Namespace:
    return whole_arguments(**({"num_experts": 4, "moe_router_topk": 2} | changes))


def save_common(folder: Path, content: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metadata.json").write_text("{}")
    (folder / ".metadata").touch()
    torch.save(content, folder / "common.pt")
    return folder


def test_nothing_in_a_pickle_is_executed(tmp_path):
    arguments = whole_arguments(attention_backend=Hostile(tmp_path / "executed"))
    checkpoint = save_common(tmp_path / "iter_0000001", {"args": arguments})
    assert read_megatron_model(checkpoint).num_layers == 2
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"args": whole_arguments(position_embedding_type="learned_absolute")}, "position-embedding-type"),
        ({"args": whole_arguments(multi_latent_attention=True)}, "multi-latent-attention True"),
        ({"args": whole_arguments(swiglu=False, squared_relu=False)}, "an activation other than swiglu"),
        ({"args": whole_arguments(no_rope_freq=4)}, "no-rope-freq 4"),
        ({"args": whole_arguments(glu_linear_offset=1.0)}, "glu-linear-offset 1.0"),
        (
            {"args": with_experts(moe_router_load_balancing_type="sinkhorn")},
            "moe-router-load-balancing-type 'sinkhorn'",
        ),
        ({"args": with_experts(moe_router_load_balancing_type=["aux_loss", "sinkhorn"])}, "'sinkhorn']"),
        ({"args": with_experts(moe_router_load_balancing_type="quantile_balancing")}, "'quantile_balancing'"),
        ({"args": with_experts(moe_expert_capacity_factor=1.0)}, "moe-expert-capacity-factor 1.0"),
        ({"args": with_experts(moe_shared_expert_gate=True)}, "moe-shared-expert-gate True"),
        ({"args": with_experts(moe_layer_freq=[1, 0])}, "moe-layer-freq [1, 0] (only dense layers first"),
        ({"args": with_experts(moe_layer_freq=2)}, "moe-layer-freq 2 (only dense layers first"),
        ({"args": whole_arguments(spec=["my.module", "my_spec"])}, "spec ['my.module', 'my_spec'] (only None)"),
        ({"args": whole_arguments(normalization="L2Norm")}, "normalization 'L2Norm' (only 'RMSNorm')"),
        ({"args": whole_arguments(vocab_extra_ids=100)}, "vocab-extra-ids 100 (only 0)"),
        ({"args": whole_arguments(mup_output_mult=2.0)}, "mup-output-mult 2.0 (only 1.0)"),
        ({"args": whole_arguments(softmax_type="learnable")}, "softmax-type 'learnable' (only 'vanilla')"),
        ({"args": whole_arguments(window_size=(7, 1))}, "window-size (7, 1) (only keys to the left"),
        ({"args": whole_arguments(window_size=(-1, 0))}, "window-size (-1, 0) (only keys to the left"),
        ({"args": whole_arguments(new_switch=False)}, "new-switch False (an argument that is not known here)"),
        ({"args": whole_arguments(num_layers=0)}, "its arguments cannot be read"),
        ({"iteration": 3}, "holds no arguments"),
    ],
)
def test_what_cannot_be_expressed_is_refused(tmp_path, content, expected):
    with pytest.raises(BadInput) as caught:
        read_megatron_model(save_common(tmp_path / "iter_0000001", content))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "num_dense_layers"),
    [
        (with_experts(moe_router_load_balancing_type="seq_aux_loss", moe_layer_freq=1, new_option=None), 0),
        (with_experts(moe_router_load_balancing_type=["aux_loss", "global_aux_loss"], moe_layer_freq=[1, 1]), 0),
        (with_experts(moe_layer_freq=[0, 1], moe_expert_capacity_factor=-1.0, moe_router_dtype="fp32"), 1),
    ],
)
def test_what_changes_nothing_is_let_in(tmp_path, arguments, num_dense_layers):
    model = read_megatron_model(save_common(tmp_path / "iter_0000001", {"args": arguments}))
    assert model.moe.num_dense_layers == num_dense_layers


@pytest.mark.parametrize(
    ("skipped", "windows"),
    [(None, (8, 8, 8, 8)), (2, (8, None, 8, None)), (1, (None,) * 4), ([0, 1, 1, 0], (None, 8, 8, None))],
)
def test_windows_are_read(tmp_path, skipped, windows):
    arguments = whole_arguments(num_layers=4, window_size=(7, 0), window_attn_skip_freq=skipped)
    model = read_megatron_model(save_common(tmp_path / "iter_0000001", {"args": arguments}))
    assert layer_windows(model) == windows


def test_balancing_says_nothing_of_a_model_without_experts(tmp_path):
    arguments = whole_arguments(moe_router_load_balancing_type="sinkhorn")
    assert read_megatron_model(save_common(tmp_path / "iter_0000001", {"args": arguments})).moe is None


def arguments_of_megatron_lm(place: Place) -> list[str]:
    """Return the arguments that the installed parser knows."""
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(add_help=False))
    return [action.dest for action in parser._actions]


def test_every_argument_of_the_installed_megatron_lm_has_been_judged(ranks):
    """Does it change what the weights compute? Put it into `ONLY` with the plain value, else into `INERT`."""
    names = ranks.run(arguments_of_megatron_lm)[0]
    assert len(names) > 700
    assert sorted(set(names) - MAPPED - ONLY.keys() - INERT) == []
    assert not MAPPED & INERT and not ONLY.keys() & INERT


def test_every_argument_that_is_read_has_been_judged():
    class Recorded(dict):
        def __missing__(self, name):
            return None

        def get(self, name, default=None):
            read.add(name)
            return super().get(name, default)

        def __getitem__(self, name):
            read.add(name)
            return super().__getitem__(name)

    read: set[str] = set()
    for arguments in (with_experts(group_query_attention=True, use_rope_scaling=True), whole_arguments()):
        _model_fields(Recorded(vars(arguments)))
    assert len(read) > 20 and read <= MAPPED


def test_the_tracker_names_the_iteration(tmp_path):
    save_common(tmp_path / "iter_0000007", {})
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    assert find_megatron_checkpoint(tmp_path) == tmp_path / "iter_0000007"
    assert find_megatron_checkpoint(tmp_path / "iter_0000007") == tmp_path / "iter_0000007"
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("8")
    with pytest.raises(BadInput, match="names iter_0000008, which is no whole"):
        find_megatron_checkpoint(tmp_path)
    assert find_megatron_checkpoint(tmp_path / "nothing") is None

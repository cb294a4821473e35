"""Checkpoints that Megatron-LM itself wrote (`--ckpt-format torch_dist`): their arguments -> our `model` section.

The arguments are a pickled namespace; it is read without executing anything in it, so that a checkpoint from elsewhere
can do no harm. An argument that changes what the weights compute in ways the engine has not is refused, and so is one
that nobody has judged (`trainer.hf.megatron_arguments`).
"""

from __future__ import annotations

import argparse
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from configs.errors import BadInput, in_one_line
from configs.rules.model import check_model
from configs.sections.model import ModelConfig
from trainer.checkpoint.tensors import CheckpointTensors
from trainer.hf.megatron_arguments import INERT, MAPPED, ONLY
from trainer.hf.windows_json import put_windows

_TRACKER = "latest_checkpointed_iteration.txt"
_COMMON_KEY = "common_state/shard_0_1"


def find_megatron_checkpoint(path: Path) -> Path | None:
    """Return the iteration's directory that a path to it, or to its parent with the tracker file, means."""
    if (path / "metadata.json").is_file() and (path / ".metadata").is_file():
        return path
    tracker = path / _TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text(encoding="utf-8").strip()
    found = path / (text if text == "release" else f"iter_{int(text):07d}" if text.isdecimal() else text)
    if not (found / ".metadata").is_file():
        raise BadInput(f"{tracker}: names {found.name}, which is no whole torch_dist checkpoint; name another one.")
    return found


def read_megatron_model(checkpoint: Path) -> ModelConfig:
    """Return the `model` section of a Megatron-LM checkpoint. Raises BadInput for what cannot be expressed."""
    arguments = _read_arguments(checkpoint)
    problems = _find_problems(arguments)
    if problems:
        raise BadInput(f"{checkpoint}: was trained with {', '.join(problems)}, which cannot be converted.")
    try:
        model = ModelConfig.model_validate(_model_fields(arguments))
    except (KeyError, ValueError) as error:
        raise BadInput(
            f"{checkpoint}: its arguments cannot be read ({in_one_line(error)}); was it written by Megatron-LM?"
        ) from error
    found = check_model(model)
    if found:
        raise BadInput(f"{checkpoint}: {' '.join(found)}")
    return model


def _find_problems(arguments: Mapping[str, Any]) -> list[str]:
    """Return each argument that changes what the weights compute, and each that is not known, in words."""
    problems = []
    for name, value in arguments.items():
        is_used = bool(arguments.get("num_experts")) or not name.startswith("moe_")
        words = f"{name.replace('_', '-')} {value!r}"
        if (
            name in ONLY
            and is_used
            and any(one not in ONLY[name] for one in (value if type(value) is list else [value]))
        ):
            problems.append(f"{words} (only {ONLY[name][0]!r})")
        if name not in MAPPED and name not in ONLY and name not in INERT and value is not None:
            problems.append(f"{words} (an argument that is not known here)")
    window = arguments.get("window_size")
    if window is not None and (len(window) != 2 or window[0] < 0 or window[1] != 0):
        problems.append(f"window-size {window!r} (only keys to the left, such as (4095, 0))")
    if not arguments.get("swiglu"):
        problems.append("an activation other than swiglu")
    if arguments.get("num_experts") and _num_dense_layers(arguments) is None:
        problems.append(f"moe-layer-freq {arguments['moe_layer_freq']!r} (only dense layers first, then experts)")
    return problems


def _num_dense_layers(arguments: Mapping[str, Any]) -> int | None:
    """Return how many first layers have no experts; None if others have none."""
    pattern = arguments.get("moe_layer_freq")
    if pattern in (None, 1):
        return 0
    if not isinstance(pattern, list) or sorted(pattern) != pattern or not set(pattern) <= {0, 1}:
        return None
    return pattern.count(0)


def _model_fields(arguments: Mapping[str, Any]) -> dict[str, Any]:
    has_groups = bool(arguments.get("group_query_attention"))
    padded = arguments["padded_vocab_size"]
    fields: dict[str, Any] = {
        "num_layers": arguments["num_layers"],
        "hidden_size": arguments["hidden_size"],
        "ffn_hidden_size": arguments["ffn_hidden_size"],
        "num_attention_heads": arguments["num_attention_heads"],
        "num_query_groups": arguments["num_query_groups"] if has_groups else None,
        "head_dim": arguments.get("kv_channels"),
        # Megatron-LM keeps the tokenizer's size only where it was given; else every padded id is a token.
        "vocab_size": arguments.get("vocab_size") or padded,
        "max_position_embeddings": arguments["max_position_embeddings"],
        "rope": _rope_fields(arguments),
        "norm": "rmsnorm" if arguments.get("normalization") == "RMSNorm" else "layernorm",
        "norm_eps": arguments.get("norm_epsilon", arguments.get("layernorm_epsilon", 1e-5)),
        "tie_embeddings": not arguments.get("untie_embeddings_and_output_weights", False),
        "linear_bias": bool(arguments.get("add_bias_linear", True)),
        "qkv_bias": bool(arguments.get("add_qkv_bias", False)) and not arguments.get("add_bias_linear", True),
        "qk_norm": bool(arguments.get("qk_layernorm", False)),
        "init_std": arguments.get("init_method_std", 0.02),
    }
    if arguments.get("num_experts"):
        fields["moe"] = _moe_fields(arguments)
    if arguments.get("window_size") is not None:  # keys beside the query's own
        put_windows(fields, arguments["window_size"][0] + 1, _windowed_layers(arguments))
    return fields


def _windowed_layers(arguments: Mapping[str, Any]) -> list[bool]:
    """Return which layers have the window: all, all but every n-th, or as a list says."""
    num_layers, skipped = arguments["num_layers"], arguments.get("window_attn_skip_freq")
    if isinstance(skipped, list):
        return [bool(one) for one in skipped]
    return [skipped is None or layer % skipped != 0 for layer in range(1, num_layers + 1)]


def _rope_fields(arguments: Mapping[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {"base": arguments.get("rotary_base", 10000), "fraction": arguments.get("rotary_percent", 1)}
    if arguments.get("use_rope_scaling"):
        # What Megatron-Core does with the flag, whose other constants are fixed.
        rope |= {"scaling": "llama3", "factor": arguments.get("rope_scaling_factor", 8.0)}
        rope |= {"original_max_position_embeddings": 8192}
    return rope


def _moe_fields(arguments: Mapping[str, Any]) -> dict[str, Any]:
    has_bias = bool(arguments.get("moe_router_enable_expert_bias"))
    return {
        "num_experts": arguments["num_experts"],
        "num_dense_layers": _num_dense_layers(arguments),
        "top_k": arguments.get("moe_router_topk", 2),
        "ffn_hidden_size": arguments.get("moe_ffn_hidden_size") or arguments["ffn_hidden_size"],
        "shared_expert_ffn_hidden_size": arguments.get("moe_shared_expert_intermediate_size"),
        "score_function": arguments.get("moe_router_score_function", "softmax"),
        "softmax_before_topk": bool(arguments.get("moe_router_pre_softmax")),
        "balancing": "bias" if has_bias else "none",
        "scaling_factor": arguments.get("moe_router_topk_scaling_factor"),
    }


def _read_arguments(checkpoint: Path) -> dict[str, Any]:
    """Return Megatron-LM's arguments from `common.pt`, or from the state that newer versions put among the tensors."""
    common = checkpoint / "common.pt"
    try:
        content = common.read_bytes() if common.is_file() else CheckpointTensors(checkpoint).read_bytes(_COMMON_KEY)
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=False, pickle_module=_HARMLESS)
    except (OSError, KeyError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise BadInput(
            f"{checkpoint}: its arguments cannot be read ({in_one_line(error)}); was it written by Megatron-LM?"
        ) from error
    state = loaded[0] if isinstance(loaded, list) else loaded
    arguments = state.get("args") if isinstance(state, dict) else None
    if arguments is None:
        raise BadInput(f"{checkpoint}: holds no arguments (args), by which Megatron-LM says what model it is.")
    return dict(vars(arguments))


_TORCH = {
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
    ("torch", "device"),
}


class _Anything:
    """Stands for whatever class a pickle names: takes anything, does nothing."""

    def __init__(self, *values: Any, **fields: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


class _HarmlessUnpickler(pickle.Unpickler):
    """Builds namespaces, containers and tensors; everything else becomes `_Anything`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("argparse", "Namespace"):
            return argparse.Namespace
        is_torch = (module, name) in _TORCH or (module == "torch" and name.endswith("Storage"))
        is_torch = is_torch or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
        is_plain = module == "collections" and name in ("OrderedDict", "defaultdict", "deque")
        is_builtin = module == "builtins" and name in (
            "set",
            "frozenset",
            "slice",
            "complex",
            "bytearray",
            "list",
            "dict",
        )
        if is_torch or is_plain or is_builtin:
            return super().find_class(module, name)
        return type(name, (_Anything,), {})


_HARMLESS = SimpleNamespace(
    __name__="harmless",
    Unpickler=_HarmlessUnpickler,
    load=lambda file, **options: _HarmlessUnpickler(file, **options).load(),
)

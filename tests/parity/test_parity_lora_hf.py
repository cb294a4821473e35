"""LoRA against transformers, by family: logits of base and adapter, of the merged export, and every gradient.

The judge of gradients is the chain rule on what transformers computes: with G the gradient of a merged weight, that of
A is scaling * B^T G and that of B is scaling * G A^T.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.stages import Config
from tests.parity.test_parity_hf import make_hf_model, read_section, transformers_logits
from tests.pool import Place
from tests.small_runs import MadeUpReader, build_stage, open_engine, small_config, train_steps

LORA = {"rank": 4, "alpha": 12}
TP2_SP = (2, {"tp": 2, "sp": True})
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "llama": (*TP2_SP, LORA),
    "qwen3": (1, {}, LORA | {"target_modules": ["q_proj", "v_proj", "up_proj"], "use_rslora": True}),
    "qwen3_moe": (1, {}, LORA),
    "deepseek_v3": (*TP2_SP, LORA),
}


def fill_adapters(engine: Any) -> None:
    """Give the adapters random matrices, of which neither is zero."""
    import torch

    for number, module in enumerate(engine.adapter.modules()):
        generator = torch.Generator().manual_seed(number)
        linear = module.adapted.linear
        a = torch.randn(module.adapted.num_adapted * 4, linear.input.total, generator=generator) * 0.1
        b = torch.randn(linear.output.total, 4, generator=generator) * 0.1
        module.fill(a, b)
    engine.weights_loaded()


def put_gradients_in_place(engine: Any) -> None:
    """Make what was trained its last gradients, so that an export holds these."""
    for chunk in engine.chunks:
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(parameter.main_grad)


def train_and_export(
    place: Place, config: Config, hf: str, folder: str, tokens: np.ndarray
) -> tuple[float, np.ndarray]:
    """Export random adapters, merged too, then their gradients in their place; return the loss and the logits."""
    import torch

    from trainer.checkpoint.base_weights import identify_base
    from trainer.checkpoint.save import CheckpointWriter
    from trainer.engine.state import TrainState
    from trainer.hf.export_source import describe_source
    from trainer.hf.exporting import export_checkpoint
    from trainer.hf.peft import export_adapter
    from trainer.run.weights import load_weights

    def export(state: TrainState, name: str) -> None:
        writer = CheckpointWriter(folder, config, engine.mesh, base=identify_base(Path(hf)))
        writer.save(state, stage)
        writer.finish()
        source = describe_source(Path(folder) / "checkpoints" / f"step_{state.step:08d}")
        export_adapter(source, Path(folder) / name, dtype=None, rank=place.rank)
        if name == "adapter":
            ranks = {"rank": place.rank, "world_size": place.world_size}
            export_checkpoint(source, Path(folder) / "merged", dtype=None, on_bytes=lambda done: None, **ranks)

    with open_engine(place, config) as engine:
        load_weights(engine, hf)
        fill_adapters(engine)
        stage = build_stage(engine)
        export(TrainState(), "adapter")
        logits = engine.compute_logits(torch.from_numpy(tokens)).numpy()
        with engine.adapter.disabled():
            frozen = engine.compute_logits(torch.from_numpy(tokens))
        state, (result,) = train_steps(stage, TrainState(), 1)
        with engine.adapter.disabled():
            assert torch.equal(engine.compute_logits(torch.from_numpy(tokens)), frozen)
        with engine.merged_adapter():
            merged = engine.compute_logits(torch.from_numpy(tokens))
        assert torch.allclose(merged, engine.compute_logits(torch.from_numpy(tokens)), atol=1e-4)
        put_gradients_in_place(engine)
        export(state, "gradients")
        return result.loss, logits


def read_adapter(directory: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return A and B by module, as PEFT names them."""
    from safetensors.numpy import load_file

    tensors = load_file(directory / "adapter_model.safetensors")
    tensors.pop("base_model.model.score.weight", None)
    modules = {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in tensors}
    assert len(tensors) == 2 * len(modules)
    prefix = "base_model.model."
    return {one: (tensors[f"{prefix}{one}.lora_A.weight"], tensors[f"{prefix}{one}.lora_B.weight"]) for one in modules}


def weights_by_module(model: Any, value: Any) -> dict[str, Any]:
    """Return a view of `value(parameter)` for the weight of each linear; transformers stacks those of experts."""
    found = {}
    for name, parameter in model.named_parameters():
        tensor = value(parameter)
        if name.endswith("experts.gate_up_proj"):
            base, half = name.removesuffix(".gate_up_proj"), tensor.shape[1] // 2
            for expert, one in enumerate(tensor):
                found |= {f"{base}.{expert}.gate_proj": one[:half], f"{base}.{expert}.up_proj": one[half:]}
        elif name.endswith("experts.down_proj"):
            found |= {f"{name.removesuffix('.down_proj')}.{number}.down_proj": one for number, one in enumerate(tensor)}
        else:
            found[name.removesuffix(".weight")] = tensor
    return found


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_those_of_transformers(ranks, tmp_path, name):
    import torch
    import transformers

    world, parallel, lora = CASES[name]
    make_hf_model(tmp_path / "hf", name)
    model = read_section(tmp_path / "hf").model_dump() | {"vocab_pad_multiple": 16}
    if model["moe"] is not None and model["moe"]["balancing"] == "aux_loss":
        model["moe"] = {key: value for key, value in model["moe"].items() if key != "aux_loss_coeff"}
        model["moe"]["balancing"] = "none"
    checkpoint = {"async_save": False, "init_from_hf": str(tmp_path / "hf")}
    sections = {"lora": lora, "optimizer": {"clip_grad": 0.0}, "checkpoint": checkpoint}
    config = small_config(world, model=model, parallel=parallel | {"timeout_seconds": 60}, **sections)
    tokens = np.random.default_rng(3).integers(0, 250, (2, 48))
    answers = ranks.run(train_and_export, config, str(tmp_path / "hf"), str(tmp_path / "run"), tokens, world=world)
    adapters, gradients = (read_adapter(tmp_path / "run" / kind) for kind in ("adapter", "gradients"))
    settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    scaling = settings["lora_alpha"] / settings["r"] ** (0.5 if settings["use_rslora"] else 1)
    judge = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    weights = weights_by_module(judge, lambda parameter: parameter.data)
    for module, (a, b) in adapters.items():
        weights[module] += scaling * torch.from_numpy(b @ a)  # as PEFT does it
    with torch.no_grad():
        expected = judge(torch.from_numpy(tokens)).logits.numpy()
    merged = transformers_logits(tmp_path / "run" / "merged", tokens)
    for logits in (merged, *(answer[1] for answer in answers)):
        np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    batches = MadeUpReader(config, 0, 1).read_step()
    losses = [
        torch.nn.functional.cross_entropy(judge(batch.tokens).logits.flatten(0, 1), batch.labels.flatten())
        for batch in batches
    ]
    loss = torch.stack(losses).mean()
    loss.backward()
    assert answers[0][0] == pytest.approx(loss.item(), rel=1e-5)
    grads = weights_by_module(judge, lambda parameter: parameter.grad)
    assert adapters.keys() == gradients.keys() and len(adapters) >= 12
    for module, (a, b) in adapters.items():
        whole = grads[module].numpy()
        for found, closed in zip(gradients[module], (scaling * b.T @ whole, scaling * whole @ a.T), strict=True):
            np.testing.assert_allclose(found, closed, rtol=0, atol=1e-5 * np.abs(closed).max(), err_msg=module)

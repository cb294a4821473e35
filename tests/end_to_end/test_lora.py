"""A LoRA run from a Hugging Face model: what it saves, how it goes on elsewhere, what comes of it, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from configs.errors import ExitCode
from tests.end_to_end.test_hf import llama  # noqa: F401
from tests.end_to_end.test_run import curve

LORA = "lora={rank: 4, alpha: 16, dropout: 0.0}"


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return {name: one for file in directory.glob("*.safetensors") for name, one in load_file(file).items()}


def assert_alike(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], atol: float) -> None:
    assert found.keys() == expected.keys() and found
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=atol, err_msg=name)


def test_adapters_are_trained_saved_resumed_and_exported_alone(train, tmp_path, llama):  # noqa: F811
    from tools.convert_hf import main
    from trainer.checkpoint.tensors import CheckpointTensors

    whole, base = tmp_path / "whole", f"checkpoint.init_from_hf={llama}"
    options = (LORA, base, "checkpoint.export_hf=true", f"run.dir={whole}")
    assert train(2, *options, "parallel.tp=2", "parallel.sp=true") == (ExitCode.DONE, "")
    last = whole / "checkpoints" / "step_00000006"
    assert curve(whole)[-1][1] < curve(whole)[0][1] - 0.05, "the adapters learnt nothing"
    keys = CheckpointTensors(last).keys
    assert keys and all("lora." in key for key in keys), "the base's weights are in the checkpoint"
    assert json.loads((last / "checkpoint.json").read_text())["base"]["path"] == str(llama)
    # Elsewhere, and with the base that the checkpoint names.
    moved, resumed = tmp_path / "moved", f"checkpoint.resume={whole}/checkpoints/step_00000002"
    assert train(2, LORA, resumed, f"run.dir={moved}", "parallel.pp=2")[0] == ExitCode.DONE
    for one, other in zip(curve(moved), curve(whole)[2:], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    # PEFT's format, read back; merged by hand, by the export, and by a run that begins with the checkpoint.
    assert main(["export", str(whole), str(tmp_path / "peft"), "--adapter"]) == 0
    again = (f"lora={{rank: 4, alpha: 16, init_from: {tmp_path}/peft}}", base, "train.num_steps=0")
    assert train(2, *again, f"run.dir={tmp_path}/again", "parallel.tp=2")[0] == ExitCode.DONE
    assert main(["export", f"{tmp_path}/again", str(tmp_path / "back"), "--adapter"]) == 0
    adapters = tensors_of(tmp_path / "peft")
    assert_alike(tensors_of(tmp_path / "back"), adapters, 0.0)
    expected = tensors_of(llama)
    for name in [name for name in adapters if ".lora_A." in name]:
        weight = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
        expected[weight] = expected[weight] + 4.0 * adapters[name.replace("_A.", "_B.")] @ adapters[name]
    assert_alike(tensors_of(last / "hf"), expected, 1e-6)
    merged = (f"checkpoint.init_from={whole}", "train.num_steps=0", "checkpoint.export_hf=true")
    assert train(2, *merged, f"run.dir={tmp_path}/merged", "parallel.pp=2")[0] == ExitCode.DONE
    assert_alike(tensors_of(tmp_path / "merged" / "checkpoints" / "step_00000000" / "hf"), expected, 1e-6)


def test_what_does_not_belong_together_is_refused(train, tmp_path, llama):  # noqa: F811
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    options = (f"checkpoint.init_from_hf={base}", "train.num_steps=2")
    assert train(1, LORA, *options)[0] == ExitCode.DONE
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    longer = ("train.num_steps=4", f"checkpoint.init_from_hf={base}")
    code, sentence = train(1, *longer)
    assert code == ExitCode.BAD_INPUT and sentence.startswith(f"lora: {checkpoint} holds adapters (lora) and this run")
    code, sentence = train(1, "lora={rank: 8, alpha: 16}", *longer)
    assert code == ExitCode.BAD_INPUT and "lora.rank is 4 there and 8 here" in sentence
    weights = tensors_of(base)
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    from safetensors.numpy import save_file

    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    code, sentence = train(1, LORA, *longer)
    assert code == ExitCode.BAD_INPUT and f"those in {base} are others" in sentence
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 16}))
    other = (f"lora={{rank: 4, alpha: 16, init_from: {tmp_path}/peft}}", *options, f"run.dir={tmp_path}/other")
    code, sentence = train(1, *other)
    assert code == ExitCode.BAD_INPUT and sentence.startswith("lora.rank: 4 differs from")
    assert not (tmp_path / "other").exists()

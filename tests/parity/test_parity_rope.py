"""A stage with another rotation than its weights came with: logits beyond the first context as in `transformers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parity.test_parity_hf import make_hf_model, read_section, read_tensors, transformers_logits
from tests.pool import Place
from tests.small_runs import build_stage, open_engine, save_checkpoint, small_config

ORIGINAL = 32
STRETCHED = 4 * ORIGINAL
TP2_SP = (2, {"tp": 2, "sp": True})
CP2 = (2, {"cp": 2})
DYNAMIC = {"scaling": "dynamic", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = {
    "scaling": "llama3", "factor": 4.0, "original_max_position_embeddings": ORIGINAL, "high_freq_factor": 3.0,
}  # fmt: skip
YARN = {"scaling": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
TEMPERED = YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 8.0}
# name -> case of test_parity_hf, the stage's rotation, its layout
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, dict[str, Any]]]] = {
    "abf": ("llama", {"base": 5e5}, (1, {})),
    "linear": ("llama", {"scaling": "linear", "factor": 4.0}, (1, {})),
    "dynamic": ("llama", DYNAMIC, (1, {})),
    "dynamic_tp2_sp": ("llama", DYNAMIC, TP2_SP),
    "dynamic_cp2": ("llama", DYNAMIC, CP2),
    "llama3": ("llama", LLAMA3, (1, {})),
    "yarn": ("llama", YARN, (1, {})),
    "yarn_mscale": ("llama", TEMPERED, (1, {})),
    "yarn_attention_factor": ("llama", YARN | {"attention_factor": 1.3, "truncate": False}, (1, {})),
    "yarn_cp2": ("llama", YARN | {"attention_factor": 0.8}, CP2),
    "latent_yarn": ("deepseek_v3", YARN | {"interleaved": True}, (1, {})),
    "latent_yarn_mscale": ("deepseek_v3", TEMPERED | {"interleaved": True}, (1, {})),
    "latent_yarn_attention_factor": (
        "deepseek_v3",
        YARN | {"interleaved": True, "attention_factor": 1.3, "mscale_all_dim": 1.2, "truncate": False,
                "beta_slow": 0.25},
        (1, {}),
    ),
}  # fmt: skip


def make_source(directory: Path, case: str, *, is_old: bool) -> None:
    """Write a model of a plain rotation and the original context, in transformers' old or new spelling."""
    make_hf_model(directory, case)
    path = directory / "config.json"
    config = json.loads(path.read_text()) | {"max_position_embeddings": ORIGINAL, "model_max_length": ORIGINAL}
    if is_old:
        config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    path.write_text(json.dumps(config))
    (directory / "tokenizer_config.json").write_text(json.dumps({"model_max_length": ORIGINAL, "bos_token": "<s>"}))


def stretch_and_export(
    place: Place, config: Any, source: str, texts: list[np.ndarray], run_dir: str, target: str
) -> list[np.ndarray]:
    """Warm-start from a model directory, return the logits of each text and export."""
    import torch

    from trainer.engine.state import TrainState
    from trainer.hf.export_source import ExportSource
    from trainer.hf.exporting import export_checkpoint
    from trainer.hf.source import HfModel
    from trainer.hf.warm_start import load_hf_weights

    with open_engine(place, config) as engine:
        load_hf_weights(engine, HfModel(source, config.model))
        logits = [engine.compute_logits(torch.from_numpy(text)).numpy() for text in texts]
        save_checkpoint(engine, TrainState(), build_stage(engine), Path(run_dir))
        export_checkpoint(
            ExportSource((Path(run_dir) / "checkpoints" / "latest").resolve(), config.model, carried=Path(source)),
            Path(target),
            dtype=None,
            rank=place.rank,
            world_size=place.world_size,
            on_bytes=lambda done: None,
        )
    return logits


@pytest.mark.parametrize("name", CASES)
def test_a_stretched_stage_computes_what_its_export_does(ranks, tmp_path, name):
    case, rope, (world, layout) = CASES[name]
    is_old = name in ("dynamic", "yarn", "yarn_attention_factor", "latent_yarn_mscale")
    make_source(tmp_path / "hf", case, is_old=is_old)
    before = read_section(tmp_path / "hf")
    stage = {"rope": rope, "max_position_embeddings": STRETCHED, "vocab_pad_multiple": 16}
    config = small_config(world, model=before.model_dump() | stage, parallel=layout | {"timeout_seconds": 60})
    random = np.random.default_rng(3)
    texts = [random.integers(0, 251, (2, length)) for length in (ORIGINAL - 5, ORIGINAL + 1, STRETCHED)]
    arguments = (str(tmp_path / "hf"), texts, str(tmp_path / "run"), str(tmp_path / "out"))
    answers = ranks.run(stretch_and_export, config, *arguments, world=world)
    for text, *found in zip(texts, *answers, strict=True):
        expected = transformers_logits(tmp_path / "out", text)
        for logits in found:
            np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)
    assert np.abs(expected - transformers_logits(tmp_path / "hf", texts[-1])).max() > 1e-3, "the kinds do not differ"
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("rope_scaling" in written, "rope_parameters" in written) == (is_old, not is_old)
    assert written["max_position_embeddings"] == (ORIGINAL if rope.get("scaling") == "dynamic" else STRETCHED)
    assert written["model_max_length"] == STRETCHED
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings == {"model_max_length": STRETCHED, "bos_token": "<s>"}
    assert read_section(tmp_path / "out").rope == config.model.rope
    assert read_tensors(tmp_path / "hf").keys() == read_tensors(tmp_path / "out").keys()


# Documents of these tests are shorter and longer than 8 tokens.
SHORT = {"rope": DYNAMIC | {"original_max_position_embeddings": 8}}


@pytest.mark.parametrize(
    ("world", "parallel", "masks"),
    [(*TP2_SP, "all"), (*CP2, "documents"), (4, {"cp": 2, "pp": 2}, "documents")],
    ids=["tp2_sp", "cp2_documents", "cp2_pp2_documents"],
)
def test_dynamic_scaling_equals_one_rank(judge, world, parallel, masks):
    judge.check(world, parallel, masks=masks, model=SHORT)


def test_dynamic_scaling_does_not_see_the_microbatch(judge):
    """The documents of a microbatch have the length of their own, not of the longest among them."""
    judge.check(1, {}, masks="documents", train={"micro_batch_size": 4}, model=SHORT)


def score_documents(
    place: Place, config: Any, source: str, tokens: np.ndarray, labels: np.ndarray, lengths: list[int]
) -> np.ndarray:
    """Return the log-probabilities `[total]` of the labels of documents that lie in one row."""
    import torch

    from trainer.data.batch import Batch, Documents
    from trainer.engine.forward import score_language_model
    from trainer.hf.source import HfModel
    from trainer.hf.warm_start import load_hf_weights

    with open_engine(place, config) as engine:
        load_hf_weights(engine, HfModel(source, config.model))
        row, positions = torch.from_numpy(tokens)[None], torch.cat([torch.arange(length) for length in lengths])[None]
        documents = Documents.build(torch.tensor([0, *lengths]).cumsum(0))
        batch = Batch(row, torch.from_numpy(labels)[None], positions, torch.ones(row.shape), documents, sample_ids=(0,))
        (scores,) = engine.score([batch], score_language_model)
    return scores.log_probs[0].numpy()


# One token, two, and around the original length, below which nothing is stretched.
DOCUMENTS = [1, ORIGINAL - 1, ORIGINAL, 2, ORIGINAL + 1, STRETCHED, 37]


@pytest.mark.parametrize(
    ("case", "rope", "context"),
    [
        ("llama", {"rope_type": "dynamic", "factor": 4.0}, ORIGINAL),
        ("deepseek_v3", {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3}, STRETCHED),
    ],
    ids=["dynamic", "latent_yarn"],
)
def test_documents_of_a_row_are_rotated_as_transformers_rotates_each_alone(ranks, tmp_path, case, rope, context):
    make_hf_model(tmp_path / "hf", case)
    path = tmp_path / "hf" / "config.json"
    content = json.loads(path.read_text())
    content["rope_parameters"] |= rope | {"original_max_position_embeddings": ORIGINAL}
    path.write_text(json.dumps(content | {"max_position_embeddings": context}))
    total = sum(DOCUMENTS)
    model = read_section(tmp_path / "hf").model_dump() | {"vocab_pad_multiple": 16, "max_position_embeddings": total}
    train = {"num_steps": 1, "seq_len": total, "micro_batch_size": 1, "global_batch_size": 1}
    config = small_config(2, model=model, parallel={"cp": 2}, data={"document_mask": True}, train=train)
    tokens = np.random.default_rng(3).integers(0, 251, total)
    labels = np.roll(tokens, -1)
    answers = ranks.run(score_documents, config, str(tmp_path / "hf"), tokens, labels, DOCUMENTS, world=2)
    for end, length in zip(np.cumsum(DOCUMENTS), DOCUMENTS, strict=True):
        alone = slice(end - length, end)
        logits = transformers_logits(tmp_path / "hf", tokens[None, alone])[0].astype(np.float64)
        chosen = logits[np.arange(length), labels[alone]]
        expected = chosen - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) - logits.max(-1)
        for log_probs in answers:
            np.testing.assert_allclose(log_probs[alone], expected, atol=1e-5, rtol=0)

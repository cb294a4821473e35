"""An independent judge: logits, loss and gradients equal those of `transformers`' Llama in float64, also with cp."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from tests.pool import Place
from tests.small_runs import DOCUMENT_END_ID, SEQ_LEN, VOCAB_SIZE, build_stage, open_engine, roughen, small_config
from tools.made_up_data import write_made_up_dataset

TOLERANCE = 1e-4
OF_LARGEST = 1e-5
"""Largest error of logits and gradients relative to the largest value of each tensor."""


def split_qkv(packed: Any, num_groups: int, num_heads: int, head_dim: int) -> list[Any]:
    """Return the query, key and value rows of the packed `[group x (queries, key, value)]` rows."""
    per_group = packed.view(num_groups, num_heads // num_groups + 2, head_dim, -1)
    parts = per_group[:, :-2], per_group[:, -2:-1], per_group[:, -1:]
    return [part.reshape(-1, packed.shape[-1]) for part in parts]


def as_llama(named: dict[str, Any], config: Any) -> dict[str, Any]:
    """Return weights or gradients under the names of `LlamaForCausalLM`."""
    model = config.model
    vocab = model.vocab_size
    out = {
        "model.embed_tokens.weight": named["embedding.word_embeddings.weight"][:vocab],
        "lm_head.weight": named["output_layer.weight"][:vocab],
        "model.norm.weight": named["decoder.final_layernorm.weight"],
    }
    for layer in range(model.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        head_dim = model.hidden_size // model.num_attention_heads
        qkv = named[f"{ours}self_attention.linear_qkv.weight"]
        parts = split_qkv(qkv, model.num_query_groups, model.num_attention_heads, head_dim)
        for name, part in zip("qkv", parts, strict=True):
            out[f"{theirs}self_attn.{name}_proj.weight"] = part
        out[f"{theirs}self_attn.o_proj.weight"] = named[f"{ours}self_attention.linear_proj.weight"]
        gate, up = named[f"{ours}mlp.linear_fc1.weight"].chunk(2)
        out |= {f"{theirs}mlp.gate_proj.weight": gate, f"{theirs}mlp.up_proj.weight": up}
        out[f"{theirs}mlp.down_proj.weight"] = named[f"{ours}mlp.linear_fc2.weight"]
        out[f"{theirs}input_layernorm.weight"] = named[f"{ours}input_layernorm.weight"]
        out[f"{theirs}post_attention_layernorm.weight"] = named[f"{ours}pre_mlp_layernorm.weight"]
    return out


def build_llama(config: Any, weights: dict[str, Any]) -> Any:
    """Return `transformers`' Llama with these weights, in float64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = config.model
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_query_groups,
            rms_norm_eps=model.norm_eps,
            max_position_embeddings=model.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope.base},
            attn_implementation="eager",
        )
    ).double()
    llama.load_state_dict({name: weight.double() for name, weight in weights.items()})
    return llama


def llama_loss(config: Any, weights: dict[str, Any], batches: list[Any]) -> tuple[float, list[Any], dict[str, Any]]:
    """Return the mean loss over the counted tokens, the logits of each batch, and the gradients, in float64."""
    import torch

    llama = build_llama(config, weights)
    total, count, every = torch.zeros((), dtype=torch.float64), 0, []
    for batch in batches:
        # A document alone is a sequence from position 0; without documents every row is one.
        rows = range(0, batch.tokens.numel() + 1, batch.tokens.shape[1])
        bounds = rows if batch.documents is None else batch.documents.bounds
        tokens = batch.tokens.reshape(1, -1)
        alone = [llama(tokens[:, start:end]).logits for start, end in itertools.pairwise(bounds)]
        logits = torch.cat(alone, dim=1).view(*batch.tokens.shape, -1)
        every.append(logits.detach())
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
        total = total + (losses * batch.loss_mask).sum()
        count += int(batch.loss_mask.sum())
    loss = total / count
    loss.backward()
    return loss.item(), every, {name: parameter.grad for name, parameter in llama.named_parameters()}


def compare_with_llama(place: Place, config: Any) -> tuple[float, float, dict[str, float]]:
    """Return our loss, Llama's, and by parameter the relative error of our gradient in the L2 norm."""
    from trainer.engine.state import TrainState

    with open_engine(place, config) as engine:
        roughen(engine)
        named = {name: parameter.data.clone() for name, parameter in engine.chunks[0].named_parameters()}
        batches = build_stage(engine, "uneven").reader.read_step()
        expected_loss, _, expected = llama_loss(config, as_llama(named, config), batches)
        stage = build_stage(engine, "uneven")
        result = stage.step(TrainState())
        gradients = {name: parameter.main_grad for name, parameter in engine.chunks[0].named_parameters()}
        found = as_llama(gradients, config)
        assert found.keys() == expected.keys()
        errors = {name: float((found[name] - gradient).norm() / gradient.norm()) for name, gradient in expected.items()}
        return result.loss, expected_loss, errors


def test_one_rank_equals_llama_in_float64(ranks):
    config = small_config(optimizer={"clip_grad": 0.0})
    ((loss, expected, errors),) = ranks.run(compare_with_llama, config)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert len(errors) == 3 + 9 * config.model.num_layers
    assert max(errors.values()) < TOLERANCE, errors


def test_the_judge_sees_another_architecture(ranks):
    """With Llama's rotation in neighbouring pairs the losses differ, so equality above says something."""
    config = small_config(optimizer={"clip_grad": 0.0}, model={"rope": {"interleaved": True}})
    ((loss, expected, errors),) = ranks.run(compare_with_llama, config)
    assert abs(loss / expected - 1) > 1e-5
    assert max(errors.values()) > 10 * TOLERANCE


def validate(place: Place, config: Any, prefix: str, num_samples: int, ends: int | None) -> tuple[float, float, int]:
    """Return our validation loss of a dataset's first samples, Llama's, and how many rows our last batch lacks.

    Llama sees each document alone, without the token that ends it.
    """
    import torch

    from trainer.data.indexed import TokenDataset
    from trainer.data.reader import ValidationReader
    from trainer.evaluate.validation import Evaluator

    with open_engine(place, config) as engine:
        roughen(engine)
        reader = ValidationReader(
            TokenDataset(prefix), seq_len=SEQ_LEN, num_samples=num_samples, micro_batch_size=4, dp_rank=0, dp_size=1,
            vocab_size=VOCAB_SIZE, document_end_id=ends,
        )  # fmt: skip
        found = Evaluator({"made-up": reader}).evaluate(engine, build_stage(engine).objective)
        named = {name: parameter.data for name, parameter in engine.chunks[0].named_parameters()}
        llama, losses = build_llama(config, as_llama(named, config)), []
        for window in torch.from_numpy(reader.source.read(np.arange(num_samples))):
            cuts = [0, *(place + 1 for place in range(SEQ_LEN) if ends is not None and window[place] == ends), SEQ_LEN]
            for start, end in zip(cuts, cuts[1:], strict=False):
                counted = window[start:end] != (-1 if ends is None else ends)
                if end > start:
                    with torch.no_grad():
                        scores = llama(window[None, start:end]).logits[0][counted]
                    wanted = window[start + 1 : end + 1][counted]
                    losses += torch.nn.functional.cross_entropy(scores, wanted, reduction="none").tolist()
        return (
            found.values["validation_loss/made-up"],
            float(np.mean(losses)),
            reader.num_microbatches * 4 - num_samples,
        )


@pytest.mark.parametrize("ends", [None, DOCUMENT_END_ID], ids=["rows", "documents"])
def test_validation_is_llamas_mean_over_the_tokens(ranks, tmp_path, ends):
    """Where the last batch is not full, and documents have unequal shares of the loss."""
    write_made_up_dataset(tmp_path / "data", num_tokens=1500, vocab_size=40)
    ((loss, expected, missing),) = ranks.run(validate, small_config(), str(tmp_path / "data"), 10, ends)
    assert missing == 2
    assert loss == pytest.approx(expected, rel=1e-6)


def forward_logits(model: Any, batch: Any) -> Any:
    """Return the logits `[batch, seq/cp, vocab]`, inside documents too, from the last chunk."""
    from trainer.engine.forward import _forward

    def make_logits(*, hidden_states: Any, output_layer: Any, output_weight: Any, **unused: Any) -> Any:
        return output_layer(hidden_states, weight=output_weight)[0].transpose(0, 1)

    return _forward(model, batch, output_processor=make_logits).reshape(*batch.tokens.shape, -1)


def gather_gradients(engine: Any) -> dict[str, Any]:
    """Return the whole gradients of the mean loss after a step, of which each data-parallel rank has its share."""
    import torch.distributed as dist

    group = engine.mesh.dp_cp_group
    for buffer in engine.modules[0].buffers:
        for bucket in buffer.buckets:
            mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)
    return {name: parameter.main_grad for name, parameter in engine.chunks[0].named_parameters()}


def largest_errors(place: Place, config: Any, masks: str) -> tuple[float, float, float, dict[str, float]]:
    """Return our loss, Llama's, and the largest errors of the logits and, by parameter, of the gradients."""
    from trainer.engine.state import TrainState

    with open_engine(place, config) as engine:
        roughen(engine)
        named = {name: parameter.data.clone() for name, parameter in engine.chunks[0].named_parameters()}
        batches = build_stage(engine, masks).reader.read_step()
        vocab_size = config.model.vocab_size
        logits = [one[..., :vocab_size] for one in engine.score(batches, forward_logits)]
        expected_loss, expected_logits, expected = llama_loss(config, as_llama(named, config), batches)
        result = build_stage(engine, masks).step(TrainState())
        found = as_llama(gather_gradients(engine), config)

    def error(one: Any, other: Any) -> float:
        return float((one - other).abs().max() / other.abs().max())

    of_logits = max(error(*both) for both in zip(logits, expected_logits, strict=True))
    errors = {name: error(found[name], gradient) for name, gradient in expected.items()}
    return result.loss, expected_loss, of_logits, errors


@pytest.mark.parametrize("masks", ["uneven", "documents"])
@pytest.mark.parametrize("cp", [2, 4])
def test_a_ring_equals_llama_in_float64(ranks, cp, masks):
    """Documents are what Llama makes of each alone."""
    sections = {"data": {"document_mask": True}} if masks == "documents" else {}
    config = small_config(cp, optimizer={"clip_grad": 0.0}, parallel={"cp": cp, "cp_attention": "ring"}, **sections)
    for loss, expected, of_logits, errors in ranks.run(largest_errors, config, masks, world=cp):
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        assert of_logits < OF_LARGEST
        assert max(errors.values()) < OF_LARGEST, errors

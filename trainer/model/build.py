"""Config -> the model chunks of this rank; the only user of `GPTModel` and of the layer specs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from configs.context_parallel import uses_te_attention
from configs.plan.derive import padded_vocab_size
from configs.roles import HeadKind
from configs.sections.model import MlaConfig, ModelConfig
from configs.stages import Config
from parallel.mesh import Mesh
from trainer.model.attention.core import CORE_ATTENTIONS, SdpaCoreAttention
from trainer.model.attention.own import own_attention
from trainer.model.attention.sinks import draw_sinks
from trainer.model.config import build_transformer_config
from trainer.model.dynamic_rope import DynamicRotaryEmbedding, rotate_by_document
from trainer.model.norm import LayerNorm, RMSNorm
from trainer.model.rope import compute_inverse_frequencies
from trainer.model.rotate import TokenAngles, rotate_by_position
from trainer.model.scalar_head import ScalarHead


def build_model_chunks(config: Config, mesh: Mesh, *, use_te: bool, head: HeadKind = "vocabulary") -> list[GPTModel]:
    """Return this rank's model chunks in virtual-pipeline order, on the device, with initial weights.

    The last one's output layer gives the logits of the vocabulary, or is a `ScalarHead`; beside one tied embeddings are
    the embedding alone.
    """
    transformer = build_transformer_config(config, mesh, use_te=use_te)
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)  # one deprecation line per chunk
    # Without Transformer Engine's rotation documents need ours, which gives its attention no boundaries.
    has_own_rotation = config.has_document_mask and not transformer.apply_rope_fusion
    attention = None
    if not uses_te_attention(config, use_te=use_te) or has_own_rotation:
        attention = CORE_ATTENTIONS[mesh.platform.attention_kernels(config.precision.compute)]
    is_tied = config.model.tie_embeddings and head == "vocabulary"
    chunks = [
        _build_chunk(config.model, transformer, mesh, vpp_rank, use_te=use_te, attention=attention, is_tied=is_tied)
        for vpp_rank in range(mesh.vpp_size)
    ]
    if chunks[-1].post_process and head == "scalar":
        chunks[-1].output_layer = ScalarHead(transformer, chunks[-1].tp_group, mesh.device, config.run.seed)
    elif chunks[-1].post_process:
        _hide_vocabulary_padding(chunks[-1], config.model, mesh)
    return chunks


@contextlib.contextmanager
def attending_with_cache(chunks: Sequence[Any], config: Config, mesh: Mesh) -> Iterator[None]:
    """Let chunks take `CachedTokens`, also those whose attention is Transformer Engine's."""
    kind = CORE_ATTENTIONS[mesh.platform.attention_kernels(config.precision.compute)]
    with own_attention(chunks, kind, _rotation(config.model)):
        yield


def _rotation(model: ModelConfig) -> Callable[..., Any]:
    """Return the forward pre-hook that hands positions down to our rotation."""
    return rotate_by_document if model.rope.scaling == "dynamic" else rotate_by_position


def _build_chunk(
    model: ModelConfig,
    transformer: TransformerConfig,
    mesh: Mesh,
    vpp_rank: int,
    *,
    use_te: bool,
    attention: type[SdpaCoreAttention] | None,
    is_tied: bool,
) -> GPTModel:
    """Return one chunk with our kernels or Transformer Engine's layers, and this core attention or the layers' own."""
    vp_stage = vpp_rank if mesh.vpp_size > 1 else None
    spec = get_gpt_decoder_block_spec(
        transformer, use_transformer_engine=use_te, normalization=transformer.normalization, vp_stage=vp_stage
    )
    if not use_te:
        _use_torch_norms(spec, transformer)
    if attention is not None:
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = attention
    chunk = GPTModel(
        config=transformer,
        transformer_layer_spec=spec,
        vocab_size=padded_vocab_size(model),
        max_sequence_length=model.max_position_embeddings,
        pre_process=mesh.is_first_pp_stage and vpp_rank == 0,
        post_process=mesh.is_last_pp_stage and vpp_rank == mesh.vpp_size - 1,
        share_embeddings_and_output_weights=is_tied,
        position_embedding_type="yarn" if model.rope.scaling == "yarn" and model.mla is None else "rope",
        rotary_percent=model.rope.fraction,
        rotary_base=model.rope.base,
        vp_stage=vp_stage,
    ).to(mesh.device)
    if attention is not None:
        chunk.register_forward_pre_hook(_rotation(model), with_kwargs=True)
    if model.attention_sinks:
        draw_sinks(chunk, transformer)
    _set_rotary_frequencies(chunk, model, mesh.device)
    if model.mla is not None and model.mla.q_lora_rank is None:
        _normalise_latent_alone(chunk, model.mla)
    if model.mla is not None and model.mla.norm_eps is not None:
        _set_latent_epsilon(chunk, model.mla.norm_eps)
    if model.mla is not None and mesh.tp_size > 1 and not use_te:
        _sum_shared_key_gradients(chunk, model.mla)
        _count_query_norm_gradients_once(chunk, model.mla, mesh.tp_size)
    if not use_te:
        _name_norms_as_fused(chunk)
    return chunk


def _use_torch_norms(spec: TransformerBlockSubmodules, transformer: TransformerConfig) -> None:
    """Put our norm into the local spec, whose own refuses sp."""
    norm = RMSNorm if transformer.normalization == "RMSNorm" else LayerNorm
    spec.layer_norm = norm
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = norm
        layer.submodules.pre_mlp_layernorm = norm
        attention: Any = layer.submodules.self_attention.submodules
        for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
            if getattr(attention, name, IdentityOp) is not IdentityOp:
                setattr(attention, name, norm)


def _name_norms_as_fused(chunk: GPTModel) -> None:
    """Give the norms the names in checkpoints that they have in Transformer Engine's layers, which fuse them.

    A checkpoint then reads the same with and without Transformer Engine; Megatron-Core's own map of the local layers
    sees to that in dense layers with ordinary attention alone.
    """
    for layer in chunk.decoder.layers:
        if isinstance(chunk.config, MLATransformerConfig):
            names = {
                "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
                "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
            }
        else:
            names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
        if not isinstance(layer.mlp, MoELayer):
            names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
        layer.submodules_config.sharded_state_dict_keys_map = names


def _set_rotary_frequencies(chunk: GPTModel, model: ModelConfig, device: torch.device) -> None:
    """Set the frequencies of the scaling kinds that Megatron-Core has no fields for, or only with fixed constants.

    yarn (Peng et al. 2023, arXiv:2309.00071) it computes itself, from `trainer.model.config`; latent attention passes
    on all of it but `truncate`.
    """
    if model.mla is None:
        head_dim, embedding = model.head_dim or model.hidden_size // model.num_attention_heads, chunk.rotary_pos_emb
    else:
        head_dim, embedding = model.mla.qk_rope_head_dim, _share_embedding(chunk)
    if model.rope.scaling == "dynamic":
        chunk.rotary_pos_emb = DynamicRotaryEmbedding(model.rope, head_dim, embedding, device)
        return
    chunk.token_angles = TokenAngles(embedding)
    if embedding is None:  # a pipeline stage without layers
        return
    if model.rope.scaling == "yarn":
        embedding.correction_range_round_to_int = model.rope.truncate
    else:
        embedding.inv_freq = compute_inverse_frequencies(model.rope, head_dim).to(device)


def _share_embedding(chunk: GPTModel) -> Any:
    """Return the rotary embedding of latent attention, now one for all layers; Megatron-Core gives each its own."""
    layers = [layer.self_attention for layer in chunk.decoder.layers]
    for layer in layers:
        layer.rotary_pos_emb = layers[0].rotary_pos_emb
    return layers[0].rotary_pos_emb if layers else None


def _normalise_latent_alone(chunk: GPTModel, mla: MlaConfig) -> None:
    """Give latent attention without query compression its one norm, as in DeepSeek-V2-Lite.

    Megatron-Core builds both norms or none, and its substitute for the query's would normalise the hidden state twice.
    """
    config = chunk.config
    norm = RMSNorm if config.normalization == "RMSNorm" else LayerNorm
    for layer in chunk.decoder.layers:
        latent_norm = norm(config, mla.kv_lora_rank, eps=config.layernorm_epsilon)
        layer.self_attention.kv_layernorm = latent_norm.to(next(layer.parameters()).device)


def _set_latent_epsilon(chunk: GPTModel, epsilon: float) -> None:
    """Give the norms of the latents an epsilon of their own; Megatron-Core takes the layers' (Moonlight's differ).

    Transformer Engine's layers have them fused into the up projections.
    """
    for layer in chunk.decoder.layers:
        attention = layer.self_attention
        for name in ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj"):
            module: Any = getattr(attention, name, None)
            if hasattr(module, "eps"):
                module.eps = epsilon


def _sum_shared_key_gradients(chunk: GPTModel, mla: MlaConfig) -> None:
    """Sum the gradient of the rotated key, which all heads share, over the tp ranks that hold the heads.

    Megatron-Core gathers the down projection's columns and gives each rank's columns only that rank's heads' part of
    this gradient. Gathered here first, the output takes the path of an unsplit projection, which is right with sp;
    without sp it lacks the sum too.
    """

    def gather_columns(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        columns, bias = output  # [seq, batch, (latent + rotated)/tp]
        combined = gather_from_tensor_model_parallel_region(columns)
        if chunk.config.sequence_parallel:
            return scatter_to_sequence_parallel_region(combined), bias
        latent, rotated = combined.split([mla.kv_lora_rank, mla.qk_rope_head_dim], dim=-1)
        return torch.cat([latent, copy_to_tensor_model_parallel_region(rotated)], dim=-1), bias

    for layer in chunk.decoder.layers:
        layer.self_attention.linear_kv_down_proj.register_forward_hook(gather_columns)


def _count_query_norm_gradients_once(chunk: GPTModel, mla: MlaConfig, tp_size: int) -> None:
    """Undo that Megatron-Core sums the gradient of every `q_layernorm` over tp, where each rank has the whole of it.

    It means the norm of each head's query, of which a rank has its heads' part. Latent attention's acts on the gathered
    latent; with sp the ranks have parts of the sequence, and the sum is right.
    """
    if mla.q_lora_rank is None or chunk.config.sequence_parallel:
        return
    for layer in chunk.decoder.layers:
        for parameter in layer.self_attention.q_layernorm.parameters():
            parameter.register_hook(lambda gradient: gradient / tp_size)


def _hide_vocabulary_padding(chunk: GPTModel, model: ModelConfig, mesh: Mesh) -> None:
    """Give padded ids no probability, so that loss, sampling and gradients do not depend on the padding."""
    chunk.output_layer.num_real_ids = model.vocab_size
    shard_size = padded_vocab_size(model) // mesh.tp_size
    num_real = model.vocab_size - mesh.tp_rank * shard_size
    if num_real >= shard_size:
        return

    def mask_padding(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        logits, bias = output  # [seq, batch, vocab/tp]
        logits[..., max(num_real, 0) :] = torch.finfo(logits.dtype).min
        return logits, bias

    chunk.output_layer.register_forward_hook(mask_padding)

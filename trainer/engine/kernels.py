"""Every name of Megatron-Core that is replaced by what torch alone can do, in one visible call.

The CPU's own replacements are in `parallel.platform.cpu_patches`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from megatron.core.tensor_parallel import layers
from megatron.core.transformer.transformer_layer import TransformerLayer

from parallel.platform.base import Platform
from parallel.replaced_names import NamePatch, replace_names
from trainer.losses.cross_entropy import find_largest_logits
from trainer.model.fewer_passes import rms_norm, swiglu, weighted_swiglu
from trainer.model.linears import copy_to_tp, forward_without_gradients, reduce_over_tp
from trainer.model.new_tokens import forward_new_tokens
from trainer.model.rotate import angles_of_this_rank, compile_rotation, rotate_documents, rotate_rows
from trainer.model.weight_gradients import WeightGradients
from trainer.optim.adam import GroupStepAdamW, has_fused_adam
from trainer.optim.grad_norm import compute_l2_norm, compute_l2_norm_at_once, scale_tensors

_LINEARS = "megatron.core.tensor_parallel.layers"
_EMBEDDINGS = "megatron.core.models.common.embeddings"
_ROTATION = f"{_EMBEDDINGS}.rope_utils"
_LAYER = "megatron.core.transformer.transformer_layer"
_MLP = "megatron.core.transformer.mlp"
_LOSS = "megatron.core.tensor_parallel.cross_entropy"
_OPTIMIZER = "megatron.core.optimizer"


def replace_kernels(platform: Platform) -> tuple[NamePatch, ...]:
    """Let Megatron-Core use our kernels, and return what is replaced; the first call decides for the process."""
    return _replace(is_fusing=platform.fuses_kernels)


@functools.cache
def _replace(*, is_fusing: bool) -> tuple[NamePatch, ...]:
    patches = tuple(kernel_patches(is_fusing=is_fusing))
    replace_names(patches)
    return patches


def kernel_patches(*, is_fusing: bool) -> Iterator[NamePatch]:
    """Yield the replacements; `is_fusing` says whether the device gains from one kernel over many operations."""
    why = "weight gradients added up in fp32 by the multiplication, also where apex's extension is, for GPUs alone"
    yield NamePatch(f"{_LINEARS}:fused_weight_gradient_mlp_cuda", WeightGradients, why, is_optional=True)
    yield NamePatch(f"{_LINEARS}:_grad_accum_fusion_available", True, why)
    why = "its own goes through autograd where nothing is differentiated, and through collectives of one rank"
    for layer in (layers.ColumnParallelLinear, layers.RowParallelLinear):
        multiply = forward_without_gradients(layer._forward_impl)
        yield NamePatch(f"{_LINEARS}:{layer.__name__}._forward_impl", multiply, why)
    yield NamePatch(f"{_LINEARS}:reduce_from_tensor_model_parallel_region", reduce_over_tp, why)
    yield NamePatch(f"{_LINEARS}:copy_to_tensor_model_parallel_region", copy_to_tp, why)
    why = "its own takes as long as the modules of a layer where each row has one new token"
    forward = forward_new_tokens(TransformerLayer.forward)
    yield NamePatch(f"{_LAYER}:TransformerLayer.forward", forward, why)
    yield NamePatch(f"{_ROTATION}:_apply_rotary_pos_emb_thd", rotate_documents, "its own asks the host twice a layer")
    why = "its own copies an index from the host to a CUDA device in every pass"
    for module in ("rotary_pos_embedding", "yarn_rotary_pos_embedding"):
        yield NamePatch(f"{_EMBEDDINGS}.{module}:get_pos_emb_on_this_cp_rank", angles_of_this_rank, why)
    if is_fusing:
        rotate = compile_rotation()
        yield NamePatch(f"{_ROTATION}:_apply_rotary_pos_emb_bshd", rotate, "one kernel instead of seven passes")
    else:
        yield from _patches_for_fewer_passes()
    if has_fused_adam() is not None:
        return
    why = "its own counts steps by parameter, which cannot be resharded"
    yield NamePatch(f"{_OPTIMIZER}:Adam", GroupStepAdamW, why)
    yield NamePatch(f"{_OPTIMIZER}:USING_PYTORCH_OPTIMIZER", False, why)
    yield NamePatch(f"{_OPTIMIZER}.distrib_optimizer:HAVE_APEX_OR_TE", True, why)
    yield NamePatch(f"{_OPTIMIZER}.distrib_optimizer:USING_APEX_OPTIMIZER", True, why)
    norm = compute_l2_norm_at_once if is_fusing else compute_l2_norm
    why = "its own asks the host for every norm, and sums millions of squares in one fp32"
    yield NamePatch(f"{_OPTIMIZER}.clip_grads:l2_norm_impl", norm, why)
    yield NamePatch(f"{_OPTIMIZER}.clip_grads:multi_tensor_scale_impl", scale_tensors, why)


def _patches_for_fewer_passes() -> Iterator[NamePatch]:
    """Yield what saves passes over memory where the device gains nothing from compiled kernels; all bit for bit."""
    yield NamePatch(f"{_ROTATION}:_apply_rotary_pos_emb_bshd", rotate_rows, "its own joins halves four times")
    why = "its own keeps and joins the halves, and adds an offset of 0 to one of them"
    yield NamePatch(f"{_MLP}:bias_swiglu_impl", swiglu, why)
    yield NamePatch(f"{_MLP}:weighted_bias_swiglu_impl", weighted_swiglu, why)
    yield NamePatch("torch.nn.functional:rms_norm", rms_norm, "torch's own takes eleven passes backwards")
    why = "its own also looks where the largest logit lies"
    largest = staticmethod(find_largest_logits)
    yield NamePatch(f"{_LOSS}:VocabParallelCrossEntropy.calculate_logits_max", largest, why)

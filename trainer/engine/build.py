"""Config -> models with initial weights: the trained one with its optimizer, frozen ones without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from configs.fp8 import resolve_backend, uses_te_layers
from configs.roles import POLICY, HeadKind
from configs.stages import Config
from parallel.mesh import Mesh
from parallel.platform import has_transformer_engine
from parallel.replicate import replicate
from parallel.seeding import get_rng_state, seed_everything, set_rng_state
from trainer.engine.engine import Engine
from trainer.engine.kernels import replace_kernels
from trainer.engine.sharded_model import ShardedModel
from trainer.engine.sharded_state import key_prefix
from trainer.model.build import build_model_chunks
from trainer.model.fp8.attach import Fp8State, attach_fp8
from trainer.model.lora.attach import attach_lora
from trainer.optim.update import build_optimizer


@dataclass(frozen=True)
class ModelPlan:
    """One model of a stage, on the run's mesh."""

    config: Config
    """Its architecture and number formats, and the adapters of a trained one; the layout is the run's."""
    is_trained: bool
    head: HeadKind = "vocabulary"
    """Whether its output layer gives logits or, as a reward model's or a critic's, one value a token
    (`trainer.engine.forward.forward_values`)."""
    start: str | None = None
    """Where the weights come from: a checkpoint, or a Hugging Face model. The policy's start is the run's own
    (`checkpoint`)."""
    is_start_critic: bool = False
    """Whether it is the critic of that checkpoint that is meant, not the run's own model."""
    num_start_ids: int | None = None
    """How many ids there are at the start, where the model may be given the first of them alone."""


def build_models(plans: Mapping[str, ModelPlan], mesh: Mesh) -> dict[str, ShardedModel]:
    """Return the models by role; each draws its random weights as if it were alone, and so does what follows the first.

    Collective: all ranks of the world must call this.
    """
    replace_kernels(mesh.platform)
    models: dict[str, ShardedModel] = {}
    after_first = None
    for role, plan in plans.items():
        seed_everything(plan.config.run.seed, mesh.pp_rank, mesh.ep_size)
        models[role] = _build(plan, mesh, role)
        if plan.config.parallel.offload_models:
            models[role].rest_on_host(with_weights=role != POLICY)
        after_first = after_first or get_rng_state(mesh.platform)
    assert after_first is not None  # there is a policy
    set_rng_state(mesh.platform, after_first)
    return models


@contextmanager
def open_models(plans: Mapping[str, ModelPlan], mesh: Mesh) -> Iterator[dict[str, ShardedModel]]:
    """Yield the models by role within the context, and let go of them. Collective: all ranks of the world."""
    models = build_models(plans, mesh)
    try:
        yield models
    finally:
        for model in models.values():
            model.close()


def build_engine(config: Config, mesh: Mesh) -> Engine:
    """Return the one trained model of a config. Collective: all ranks of the world must call this."""
    engine = build_models({POLICY: ModelPlan(config, is_trained=True, head=config.head)}, mesh)[POLICY]
    assert isinstance(engine, Engine)
    return engine


def _build(plan: ModelPlan, mesh: Mesh, role: str) -> ShardedModel:
    config, head = plan.config, plan.head
    use_te = uses_te_layers(config, has_te=has_transformer_engine())
    chunks: list[Any] = build_model_chunks(config, mesh, use_te=use_te, head=head)
    fp8 = _attach_fp8(config, mesh, chunks)
    if not plan.is_trained:
        for chunk in chunks:
            chunk.requires_grad_(False)
        return ShardedModel(config, mesh, chunks, fp8, head=head)
    adapter = None
    if config.lora is not None:  # before the replicas, which hold gradients of what is trained alone
        adapter = attach_lora(chunks, config.lora, config.model, mesh, config.run.seed)
    replicas = replicate(chunks, config, is_overlapping=mesh.platform.overlaps_communication)
    optimizer = build_optimizer(config, replicas, mesh.platform)
    return Engine(config, mesh, replicas, optimizer, fp8, adapter, head, key_prefix(role))


def _attach_fp8(config: Config, mesh: Mesh, chunks: list[Any]) -> Fp8State | None:
    """Give the layers FP8 multiplications of our own, unless there are to be none or Transformer Engine has them."""
    fp8 = config.precision.fp8
    if fp8 is None:
        return None
    backend = resolve_backend(fp8, has_te=has_transformer_engine())
    return None if backend == "te" else attach_fp8(chunks, fp8, config.model, mesh, backend)

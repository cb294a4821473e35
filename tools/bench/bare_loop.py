"""The least a loop on megatron-core can do: same model, data, layout and kernels, nothing around the step.

No hooks, log, schedule, finiteness checks or reduction of the loss; batches lie on the device before the clock starts.
Exempt from the rule that each entry point of megatron-core has one caller, since this is megatron-core without us.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from configs.stages import Config
from parallel.environment import Environment
from parallel.platform import PlatformName, has_transformer_engine

if TYPE_CHECKING:
    from parallel.platform.base import Platform
    from tools.bench.clock import StepClock


def run_bare(config: Config, environment: Environment, platform_name: PlatformName, clock: StepClock) -> float:
    """Train and return the last step's loss; layouts without virtual pipeline stages. Collective: all ranks."""
    import torch.distributed as dist

    from parallel.collectives import sum_over_microbatch_ranks
    from parallel.mesh import build_mesh, destroy_mesh, init_world
    from parallel.platform import load_platform
    from parallel.seeding import seed_everything
    from trainer.data.corpus import open_corpus

    platform = load_platform(platform_name)
    device = platform.activate(environment.local_rank)
    from trainer.engine.kernels import replace_kernels
    from trainer.model.build import build_model_chunks  # imports megatron-core, which the platform prepares first

    replace_kernels(platform)
    init_world(platform, config, rank=environment.rank, world_size=environment.world_size, init_method="env://")
    mesh = build_mesh(platform, device, config)
    seed_everything(config.run.seed, mesh.pp_rank, mesh.ep_size)
    chunk = build_model_chunks(config, mesh, use_te=has_transformer_engine())[0]
    model, optimizer = _wrap(chunk, config, platform)
    reader = open_corpus(config).build_reader(dp_rank=mesh.dp_rank, dp_size=mesh.dp_size)
    assert reader is not None
    steps = [[batch.to(device) for batch in reader.read_step()] for _ in range(clock.total_steps)]
    reader.close()
    total, num_tokens = sum_over_microbatch_ranks(_train(model, optimizer, steps, config, clock), mesh).tolist()
    loss = total / num_tokens
    destroy_mesh()
    dist.destroy_process_group()
    return loss


def _wrap(chunk: Any, config: Config, platform: Platform) -> tuple[Any, Any]:
    """Return the chunk in DDP and its optimizer, with the settings and the Adam and norm kernels `fit` has."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from parallel.precision import optimizer_precision

    is_overlapping = platform.overlaps_communication
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=is_overlapping,
        overlap_param_gather=is_overlapping,
    )
    model = DistributedDataParallel(config=chunk.config, ddp_config=ddp, module=chunk)
    settings = config.optimizer
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.eps,
            clip_grad=settings.clip_grad,
            use_distributed_optimizer=True,
            overlap_param_gather=is_overlapping,
            **optimizer_precision(config.precision),
        ),
        [model],
        use_gloo_process_groups=False,
    )
    for group in optimizer.param_groups:  # what megatron-core leaves to its scheduler
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
    chunk.config.grad_scale_func = optimizer.scale_loss
    chunk.config.finalize_model_grads_func = finalize_model_grads
    if is_overlapping:
        chunk.config.no_sync_func = model.no_sync
    return model, optimizer


def _train(model: Any, optimizer: Any, steps: list[Any], config: Config, clock: StepClock) -> Any:
    """Take every step and return the last one's loss and tokens, fp64 `[2]`: 0 where another stage has them."""
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(batches: Iterator[Any], chunk: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(batches)

        def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            total = (output.float() * batch.loss_mask).sum()
            num_tokens = batch.loss_mask.sum().int()
            return total, num_tokens, torch.stack([total.detach(), num_tokens]).double()

        return chunk(batch.tokens, batch.position_ids, None, labels=batch.labels), loss

    forward_backward = get_forward_backward_func()
    sums: list[torch.Tensor] = []
    model.train()
    for batches in steps:
        clock.tick()
        model.zero_grad_buffer()
        optimizer.zero_grad()
        sums = forward_backward(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=model,
            num_microbatches=len(batches),
            seq_length=config.train.seq_len,
            micro_batch_size=config.train.micro_batch_size,
            forward_only=False,
        )
        _update(optimizer, config.optimizer.clip_grad)
    return sum(sums, torch.zeros(2, dtype=torch.float64, device=steps[0][0].tokens.device))


def _update(optimizer: Any, clip_grad: float) -> None:
    """Do what `optimizer.step()` does in one norm group; itself it asks for a CUDA tensor, which CPU ranks lack."""
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    optimizer.prepare_grads()
    norm = optimizer.get_grad_norm()
    for part in optimizer.chained_optimizers:
        clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm=clip_grad, total_norm=norm)
    optimizer.step_with_ready_grads()

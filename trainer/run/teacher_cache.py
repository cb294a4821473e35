"""Writes what the run's model says of its conversations, for students of any layout to learn from; trains nothing.

The directory appears when it is whole: a kill leaves nothing but what the next attempt removes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import BadInput, ExitCode
from configs.roles import POLICY
from configs.stages import TeacherCacheConfig
from parallel.collectives import gather_objects, on_all_ranks, on_rank_zero
from parallel.environment import Environment
from parallel.mesh import Mesh
from parallel.platform import has_transformer_engine
from parallel.watch.reports import WATCH
from parallel.watch.watch import Watch
from trainer.checkpoint.base_weights import BaseWeights, identify_base
from trainer.data.batch import Batch
from trainer.data.corpus import Corpus
from trainer.data.indexed import TokenDataset
from trainer.data.reader import ValidationReader
from trainer.disk.growing import check_target, growing_directory
from trainer.disk.space import find_space_problem
from trainer.hf.directories import find_model_directory
from trainer.run.directory import RunLock, describe_environment, start_rank_log, write_run_files
from trainer.run.start import Start, find_start
from trainer.run.weights import load_weights

if TYPE_CHECKING:
    from trainer.engine.sharded_model import ShardedModel
    from trainer.rl.teacher_cache import CacheInfo, CachePart

log = logging.getLogger(__name__)
_ALL = 2**62


def write_teacher_cache(corpus: Corpus, environment: Environment, mesh: Mesh, lock: RunLock, watch: Watch) -> ExitCode:
    """Score every source, training and validation, and write the teacher's likeliest ids to `distill.cache`.

    Raises BadInput for what cannot be, before anything is written. Collective: all ranks of the world must call this.
    """
    config = corpus.config
    assert isinstance(config, TeacherCacheConfig) and corpus.tokenizer is not None
    run_dir, target = Path(str(config.run.dir)), Path(str(config.distill.cache))
    start = on_rank_zero(lambda: find_start(config, "teacher_cache"))
    on_all_ranks(partial(start.wait_until_visible, config.parallel.timeout_seconds))
    datasets = [*(source.dataset for source in (corpus.blend.sources if corpus.blend else ()))]
    datasets += corpus.validation.values()
    base = on_rank_zero(lambda: identify_base(_place(start)))
    info = _describe(config, corpus, base, datasets, mesh)
    if on_rank_zero(lambda: _is_written(target, info)):
        log.info("%s is written already: of this teacher, these data and these settings", target)
        return ExitCode.DONE
    on_rank_zero(lambda: _check_room(config, target, datasets))
    # These import Megatron-Core, which must happen after the platform is active.
    from trainer.engine.build import ModelPlan, open_models

    with open_models({POLICY: ModelPlan(config, is_trained=False)}, mesh) as models:
        model = models[POLICY]
        load_weights(model, base.path)
        details = describe_environment(config, mesh, has_te=has_transformer_engine())
        watch.start(start_rank_log(run_dir, mesh).parent / WATCH)
        on_rank_zero(lambda: write_run_files(config, details, run_dir, launcher=environment.launcher))
        with growing_directory(target, rank=mesh.rank) as directory:
            _write(config, model, datasets, directory, info, lock)
    return ExitCode.DONE


def _write(
    config: TeacherCacheConfig,
    model: ShardedModel,
    datasets: Sequence[TokenDataset],
    directory: Path,
    info: CacheInfo,
    lock: RunLock,
) -> None:
    """Score the sources in turn; each data-parallel rank's first rank of the last pipeline stage writes its part."""
    from trainer.rl.teacher import LiveTeacher
    from trainer.rl.teacher_cache import CachePart

    mesh = model.mesh
    teacher = LiveTeacher(model, config.distill.temperature, info.top_k)
    is_writing = mesh.is_last_pp_stage and mesh.tp_rank == 0 and mesh.cp_rank == 0
    part = CachePart(directory, mesh.dp_rank, info.top_k) if is_writing else None
    for dataset in datasets:
        reader = _reader(config, dataset, mesh)
        num_done, log_at = 0, 0.0
        for some in batched(reader.batches(), 8 * mesh.pp_size):
            _add(part, teacher.annotate(model, some))
            num_done += len(some)
            on_rank_zero(lock.check)
            if num_done / reader.num_microbatches >= log_at:
                log.info("%s: %.0f %% is written", dataset.origin, 100 * num_done / reader.num_microbatches)
                log_at += 0.1
    if part is not None:
        part.close()
    written = gather_objects((0, 0) if part is None else (part.num_records, part.num_documents))
    num_records, num_documents = (sum(numbers) for numbers in zip(*written, strict=True))
    whole = replace(info, num_records=num_records, num_documents=num_documents)
    on_rank_zero(lambda: whole.write(directory))
    log.info("%s: %d ids of each of %d tokens", config.distill.cache, info.top_k, num_records)


def _add(part: CachePart | None, batches: Sequence[Batch]) -> None:
    from trainer.model.divergence import TopK
    from trainer.rl.teacher import TOP_K

    for batch in batches if part is not None else ():
        assert part is not None
        part.add(batch, TopK(*(batch.columns[name] for name in TOP_K)))


def _reader(config: TeacherCacheConfig, dataset: TokenDataset, mesh: Mesh) -> ValidationReader:
    """Return what reads all of a source once."""
    return ValidationReader(
        dataset,
        seq_len=config.train.seq_len,
        num_samples=_ALL,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        vocab_size=config.model.vocab_size,
        packing=config.packing,
    )


def _is_written(target: Path, info: CacheInfo) -> bool:
    """Return whether a cache lies there that such a run wrote, on whatever ranks. Raises BadInput for a damaged one."""
    from trainer.rl.teacher_cache import INFO, CachedTeacher

    if not (target / INFO).is_file():
        return False
    found = CachedTeacher(target, is_last_pp_stage=True).info
    return replace(found, num_parts=info.num_parts, num_records=0, num_documents=0) == info


def _check_room(config: TeacherCacheConfig, target: Path, datasets: Sequence[TokenDataset]) -> None:
    """Raise BadInput where the directory cannot be made, or the disk does not take it."""
    problem = check_target(target)
    if problem is not None:
        raise BadInput(f"distill.cache: {problem}")
    num_tokens = sum(_count_trained(dataset) for dataset in datasets)
    num_bytes = num_tokens * (8 * int(config.distill.top_k or 0) + 4) + 16 * sum(one.num_documents for one in datasets)
    problem = find_space_problem(target, num_bytes, 0)
    if problem is not None:
        raise BadInput(f"distill.cache: {target} has no room: {problem}; make room, or lower distill.top_k")
    log.info("%s takes at most %.2f GB", target, num_bytes / 1e9)


def _count_trained(dataset: TokenDataset) -> int:
    masks = (dataset.read_mask(number, 0, int(length)) for number, length in enumerate(dataset.lengths))
    return sum(
        int(length) if mask is None else int(mask.sum()) for mask, length in zip(masks, dataset.lengths, strict=True)
    )


def _place(start: Start) -> Path:
    return start.init_from or find_model_directory(Path(str(start.init_from_hf)))


def _describe(
    config: TeacherCacheConfig, corpus: Corpus, base: BaseWeights, datasets: Sequence[TokenDataset], mesh: Mesh
) -> CacheInfo:
    """Return what the cache is of."""
    from trainer.rl.teacher_cache import CacheInfo

    assert config.distill.top_k is not None and corpus.tokenizer is not None
    return CacheInfo(
        top_k=config.distill.top_k,
        temperature=config.distill.temperature,
        vocab_size=config.model.vocab_size,
        seq_len=config.train.seq_len,
        tokenizer=corpus.tokenizer.vocabulary_hash,
        teacher=base.as_dict(),
        sources={dataset.origin: dataset.identity for dataset in datasets},
        num_parts=mesh.dp_size,
    )

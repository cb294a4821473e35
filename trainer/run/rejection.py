"""Rejection sampling: a model's answers to every prompt, in rounds that are written whole, and the chats they make.

A run directory keeps all answers under `rollouts/`, a file a round, so that a kill loses the round under way alone.
`accepted.jsonl` is made of them anew whenever the command ends. An answer depends on its prompt's place alone.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import BadInput, ExitCode
from configs.load import resolved_dict
from configs.stages import RftConfig
from parallel.collectives import any_rank, on_all_ranks, on_rank_zero
from parallel.environment import Environment
from parallel.mesh import Mesh
from parallel.platform import has_transformer_engine
from parallel.watch.reports import WATCH
from parallel.watch.watch import Watch
from trainer.checkpoint.base_weights import identify_base
from trainer.checkpoint.manifest import read_manifest
from trainer.data.chat.prompts import Prompt, PromptFile
from trainer.data.corpus import Corpus
from trainer.hf.directories import find_model_directory
from trainer.report.live import format_duration
from trainer.report.rollouts import FOLDER, list_rollouts, read_rollouts, write_rollouts
from trainer.rl.acceptance import ACCEPTED, as_chat, choose
from trainer.run.directory import RunLock, describe_environment, start_rank_log, write_run_files
from trainer.run.second_models import FoundModel, find_second_models, load_second_models, plan_models
from trainer.run.signals import StopSignals
from trainer.run.start import Start, describe_changes, find_start
from trainer.run.weights import load_weights

if TYPE_CHECKING:
    from trainer.rl.collect import Collector

log = logging.getLogger(__name__)
OUT, SAMPLING = "accepted.jsonl", "sampling.json"
_COMPARED = ("run", "model", "precision", "data", "train", "grpo", "rollout")

Record = Mapping[str, Any]
"""A rollout as it is written."""


def sample_answers(corpus: Corpus, environment: Environment, mesh: Mesh, lock: RunLock, watch: Watch) -> ExitCode:
    """Answer the prompts that have no answers yet, and write what is accepted of all.

    Raises BadInput for what cannot be, before anything is written. Collective: all ranks of the world must call this.
    """
    config = corpus.config
    assert isinstance(config, RftConfig)
    run_dir = Path(str(config.run.dir))
    start = on_rank_zero(lambda: find_start(config, "rft"))
    on_all_ranks(partial(start.wait_until_visible, config.parallel.timeout_seconds))
    signals = StopSignals()
    # This imports Megatron-Core, which must happen after the platform is active.
    from trainer.stages.grpo import open_encoder, open_prompts

    encoder = on_all_ranks(lambda: open_encoder(config, corpus))
    files = on_all_ranks(lambda: open_prompts(config, "train", encoder, None))
    found = on_rank_zero(lambda: find_second_models(config, mesh.world_size, mesh.platform.name))
    sampling = on_rank_zero(lambda: _describe_sampling(config, start, files, found))
    last = on_rank_zero(lambda: _find_last(run_dir, sampling))
    rounds = _Rounds(config, files, last, run_dir, lock)
    is_done = True
    if not rounds.is_over:
        is_done = _sample(config, encoder, rounds, environment, mesh, sampling, found, signals, watch)
    on_rank_zero(lambda: _accept(config, run_dir, files, sampling))
    if not is_done:
        log.info("stopped by signal after a whole round; the same command goes on behind it")
    return ExitCode.DONE if is_done else ExitCode.STOPPED_AFTER_SAVING


def _sample(
    config: RftConfig,
    encoder: Any,
    rounds: _Rounds,
    environment: Environment,
    mesh: Mesh,
    sampling: Mapping[str, Any],
    found: Mapping[str, FoundModel],
    signals: StopSignals,
    watch: Watch,
) -> bool:
    """Load the models and answer all prompts that are left; return False where a signal came before the last."""
    from trainer.engine.build import POLICY, ModelPlan, open_models
    from trainer.stages.grpo import open_collector

    run_dir = Path(str(config.run.dir))
    plans = {**plan_models(config, found), POLICY: ModelPlan(config, is_trained=False)}
    with open_models(plans, mesh) as models:
        collector = on_all_ranks(lambda: open_collector(config, models, encoder, rounds.files))
        try:
            load_weights(models[POLICY], sampling["weights"]["path"])
            load_second_models(models, plans)
            details = describe_environment(config, mesh, has_te=has_transformer_engine())
            watch.start(start_rank_log(run_dir, mesh).parent / WATCH)
            log.info("%s: answers of %s", config.run.name, sampling["weights"]["path"])
            on_rank_zero(lambda: _begin(config, run_dir, details, environment.launcher, sampling))
            while not rounds.is_over:
                rounds.answer(collector)
                if any_rank(signals.is_received, mesh.device):
                    return rounds.is_over
            return True
        finally:
            collector.close()


class _Rounds:
    """The prompts that have no answers yet, and their answers a round at a time; the same on every rank."""

    def __init__(
        self, config: RftConfig, files: Sequence[PromptFile], last: Record | None, run_dir: Path, lock: RunLock
    ) -> None:
        """Go on behind the prompt of the `last` rollout that is there."""
        self._config, self.files, self._run_dir, self._lock = config, files, run_dir, lock
        self._num_done = self._first = 0 if last is None else last["group"] + 1
        self._number = 0 if last is None else last["step"]
        num_rows = sum(len(file.rows) for file in files)
        self._wanted = min(config.rft.num_prompts or num_rows, num_rows)
        self._prompts = islice(_prompts_behind(files, last), max(0, self._wanted - self._num_done))
        self._next = self._read()
        self._started = time.perf_counter()

    @property
    def is_over(self) -> bool:
        """Whether every prompt has its answers."""
        return not self._next

    def answer(self, collector: Collector) -> None:
        """Answer and score the prompts of the next round, and write that down. Collective: all ranks of the world."""
        from trainer.rl.collect import Seconds

        prompts, seconds = self._next, Seconds()
        rollouts = collector.collect(prompts, 0, self._num_done, seconds)
        self._number += 1
        records = [one.record(self._number, collector.spell, None) for one in rollouts]
        on_rank_zero(lambda: self._write(records))
        self._num_done += len(prompts)
        self._next = self._read()
        self._log(records, seconds.generate)

    def _read(self) -> list[Prompt]:
        return list(islice(self._prompts, self._config.prompts_per_step))

    def _write(self, records: Sequence[Record]) -> None:
        self._lock.check()
        write_rollouts(self._run_dir, self._number, records)

    def _log(self, records: Sequence[Record], seconds: float) -> None:
        done, least = self._num_done, self._config.rft.min_score
        enough = sum(one["score"] is not None and one["score"] >= least for one in records) / len(records)
        rate = sum(one["num_sampled_tokens"] for one in records) / seconds
        left = (time.perf_counter() - self._started) / (done - self._first) * (self._wanted - done)
        log.info(
            f"{done:,} of {self._wanted:,} prompts  {enough:.0%} of the answers have {least:g} or more  "
            f"{rate:,.0f} tokens/s  {format_duration(0 if self.is_over else left)} left"
        )
        if self.is_over and done < self._wanted:
            log.info(
                f"{sum(len(file.rows) for file in self.files) - done:,} prompts are longer than the "
                f"{self._config.longest_prompt:,} tokens that train.seq_len less rollout.max_new_tokens leaves"
            )


def _prompts_behind(files: Sequence[PromptFile], last: Record | None) -> Iterator[Prompt]:
    """Yield the prompts that are not too long, in the order of the files, behind that of a rollout."""
    is_behind = last is None
    for file in files:
        for row in range(len(file.rows)):
            if not is_behind:
                is_behind = last is not None and (file.name, row) == (last["source"], last["row"])
            elif (prompt := file.read(row)) is not None:
                yield prompt


def _describe_sampling(
    config: RftConfig, start: Start, files: Sequence[PromptFile], found: Mapping[str, FoundModel]
) -> dict[str, Any]:
    """Return everything that answers depend on: weights and prompts by their hashes, and the config."""
    if start.init_from is not None:
        place, step = start.init_from, read_manifest(start.init_from).step
    else:
        place, step = find_model_directory(Path(str(start.init_from_hf))), None
    base = identify_base(place)
    return {
        "weights": {"path": base.path, "step": step, "sha256": base.fingerprint},
        "prompts": {file.name: file.identity for file in files},
        "config": resolved_dict(config),
        "models": {role: one.record["fingerprint"] for role, one in found.items()},
    }


def _find_last(run_dir: Path, sampling: Mapping[str, Any]) -> Record | None:
    """Return the last rollout that the directory has, None for none.

    Raises BadInput where its answers are of other weights, prompts or settings, or some are missing.
    """
    paths = list_rollouts(run_dir)
    if not paths:
        return None
    advice = "name another run, such as run.name=rft-2"
    try:
        saved = json.loads((run_dir / SAMPLING).read_text(encoding="utf-8"))
        weights, prompts, config = saved["weights"], saved["prompts"], _steering(saved["config"])
        path, fingerprint = weights["path"], weights["sha256"]
    except FileNotFoundError:
        raise BadInput(f"run.dir: {run_dir} holds rollouts that are not of this command; {advice}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{run_dir / SAMPLING}: unreadable ({error}); {advice}") from error
    if fingerprint != sampling["weights"]["sha256"]:
        raise BadInput(
            f"checkpoint.init_from: the answers in {run_dir} are of {path}, and these are other weights, "
            f"{sampling['weights']['path']}; name the former, or {advice}"
        )
    changes = describe_changes(config, _steering(sampling["config"]), _COMPARED)
    if changes:
        raise BadInput(f"run.dir: {run_dir} holds answers that were sampled otherwise: {'; '.join(changes)}; {advice}")
    for role, other in saved.get("models", {}).items():
        if sampling["models"].get(role) != other:
            raise BadInput(
                f"grpo.reward_model.init_from: the answers in {run_dir} were scored by another one; {advice}"
            )
    for name, identity in prompts.items():
        if sampling["prompts"].get(name) != identity:
            raise BadInput(f"grpo.prompts: the rows of {name} are not those that {run_dir} has answers to; {advice}")
    return _check_rounds(run_dir, paths)


def _steering(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return of a config what answers depend on; where prompts lie is not among it."""
    run, train = {"seed": config["run"]["seed"]}, {"seq_len": config["train"]["seq_len"]}
    prompts = [{**source, "path": None} for source in config["grpo"]["prompts"]]
    return {**config, "run": run, "train": train, "grpo": {**config["grpo"], "prompts": prompts}}


def _check_rounds(run_dir: Path, paths: Sequence[Path]) -> Record:
    """Return the last rollout of rounds that have each prompt once, in order. Raises BadInput where they have not."""
    wanted = 0
    last: Record = {}
    for path in paths:
        for group, answers in groupby(read_rollouts(path), key=lambda one: one["group"]):
            *_, last = answers
            if group != wanted:
                raise BadInput(
                    f"{path}: has the answers to prompt {group} where those to prompt {wanted} are expected; put back "
                    f"the file that is missing, or remove {run_dir / FOLDER} to begin anew"
                )
            wanted += 1
    if not last:
        raise BadInput(f"{paths[-1]}: is empty; remove it")
    return last


def _begin(
    config: RftConfig, run_dir: Path, details: Mapping[str, Any], launcher: str, sampling: Mapping[str, Any]
) -> None:
    """Write what describes the run."""
    write_run_files(config, details, run_dir, launcher=launcher)
    temporary = run_dir / f".{SAMPLING}.new"
    temporary.write_text(json.dumps(sampling, indent=1), encoding="utf-8")
    os.replace(temporary, run_dir / SAMPLING)


def _accept(config: RftConfig, run_dir: Path, files: Sequence[PromptFile], sampling: Mapping[str, Any]) -> None:
    """Write the accepted answers of all rounds, in order, and log what became of the others."""
    ends: Counter[str] = Counter()
    num_prompts = num_answered = 0
    by_name = {file.name: file for file in files}
    temporary = run_dir / f".{OUT}.new"
    with temporary.open("w", encoding="utf-8") as out:
        for answers in islice(_groups(run_dir), config.rft.num_prompts):
            chosen, met = choose(answers, config.rft.min_score, config.rft.max_per_prompt)
            ends += met
            num_prompts, num_answered = num_prompts + 1, num_answered + bool(chosen)
            for answer in chosen:
                file = by_name[answer["source"]]
                conversation, _ = file.rows[answer["row"]]
                row = as_chat(conversation, answer["answers"][-1], _provenance(config, sampling, file, answer))
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(temporary, run_dir / OUT)
    rest = ", ".join(f"{count:,} {end}" for end, count in ends.items() if end != ACCEPTED)
    log.info(
        f"{run_dir / OUT}: {ends[ACCEPTED]:,} answers to {num_answered:,} of {num_prompts:,} prompts"
        + (f"; not accepted: {rest}" if rest else "")
    )


def _groups(run_dir: Path) -> Iterator[list[Record]]:
    for path in list_rollouts(run_dir):
        for _, answers in groupby(read_rollouts(path), key=lambda one: one["group"]):
            yield list(answers)


def _provenance(config: RftConfig, sampling: Mapping[str, Any], file: PromptFile, answer: Record) -> dict[str, Any]:
    weights = sampling["weights"]
    return {
        "checkpoint": weights["path"],
        "step": weights["step"],
        "sha256": weights["sha256"],
        "source": file.prefix,
        **{name: answer[name] for name in ("row", "sample", "score", "rewards")},
        "seed": config.run.seed,
        "sampling": config.rollout.model_dump(mode="json", exclude={"max_rows", "cache_gib"}),
    }

"""Log-probabilities of answers by the weights of one moment: computed once, kept by what the answers are."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import batched
from typing import Any, Protocol

import torch

from configs.errors import BadInput
from parallel.collectives import gather_objects
from parallel.mesh import Mesh
from trainer.data.batch import Batch
from trainer.data.sequences import sequence_keys, sum_by_sequence
from trainer.engine.engine import Engine
from trainer.engine.forward import forward_language_model
from trainer.engine.parts import SavedState
from trainer.engine.sharded_state import share_state

log = logging.getLogger(__name__)
_NAMES = ("reference_scores.keys", "reference_scores.log_probs")
_OLD_NAMES = ("reference.keys", "reference.log_probs")
"""In checkpoints of before online DPO, which has the weights of a reference too."""
_AT_ONCE = 32  # microbatches whose log-probabilities are in memory together


class _Reader(Protocol):
    def batches(self) -> Iterator[Batch]:
        """Yield this rank's microbatches, as many as every other rank's."""
        ...


class ReferenceScores:
    """What the reference says of every answer that a run reads: 12 bytes an answer on each rank.

    As a part of checkpoints it makes a run whole by itself, and no second model is ever needed.
    """

    def __init__(self, mesh: Mesh, field: str = "preference.loss") -> None:
        """`field` is the one that chooses the loss, for messages."""
        self._mesh, self._field = mesh, field
        self._values: dict[int, float] = {}

    @property
    def is_known(self) -> bool:
        """Whether there are any."""
        return bool(self._values)

    def remember(self, engine: Engine, readers: Iterable[_Reader]) -> None:
        """Score all answers of the readers by the present weights, an adapter among them.

        An adapter that was just drawn changes nothing, so that of a run that begins with one the reference is the
        model, and of one that goes on with `lora.init_from` it is what that makes of it. Collective: all ranks of the
        world must call this.
        """
        for reader in readers:
            for some in batched(reader.batches(), _AT_ONCE * self._mesh.pp_size):
                self._remember(some, score_answers(engine, some))
        log.info("the reference's log-probabilities of %d answers are known", len(self._values))

    def forget(self) -> None:
        """Let go of all answers."""
        self._values = {}

    def look_up(self, batch: Batch) -> torch.Tensor:
        """Return the log-probabilities of a batch's answers, fp32 `[num_sequences]`.

        Raises BadInput where one is not among those that were scored when the run began.
        """
        try:
            keys = sequence_keys(batch)
            return torch.tensor([self._values[keys[number]] for number in sorted(keys)], dtype=torch.float32)
        except KeyError as error:
            raise BadInput(
                "preference.train: it, or preference.validation, holds answers that were not there when this run "
                "began, and whose log-probabilities by the reference are not known; give the data of then, or begin "
                "under another run.name with checkpoint.init_from"
            ) from error

    def sharded_state(self, saved: SavedState | None) -> dict[str, Any]:
        """Return keys and log-probabilities. Raises BadInput where the checkpoint to load has none."""
        names = _NAMES if saved is None or _OLD_NAMES[0] not in saved.shapes else _OLD_NAMES
        if saved is None:
            keys = sorted(self._values)
            values = [self._values[key] for key in keys]
            tensors = torch.tensor(keys, dtype=torch.int64), torch.tensor(values, dtype=torch.float32)
        elif names[0] not in saved.shapes:
            raise BadInput(
                f"{self._field}: the checkpoint that is resumed has no reference, as its run needed none; values that "
                "would work: orpo, simpo (or begin under another run.name from its weights with checkpoint.init_from)"
            )
        else:
            (count,) = saved.shapes[names[0]]
            tensors = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.float32)
        return share_state(dict(zip(names, tensors, strict=True)), self._mesh)

    def load(self, loaded: dict[str, Any]) -> None:
        """Take what was saved."""
        keys, log_probs = (loaded[name].tolist() for name in (_NAMES if _NAMES[0] in loaded else _OLD_NAMES))
        self._values = dict(zip(keys, log_probs, strict=True))

    def _remember(self, batches: Sequence[Batch], scores: Sequence[torch.Tensor] | None) -> None:
        mine: dict[int, float] = {}
        for batch, own in zip(batches, scores or (), strict=scores is not None):
            mine |= {key: float(own[number]) for number, key in sequence_keys(batch).items()}
        for found in gather_objects(mine):
            self._values |= found


def forward_log_probs(model: Any, batch: Batch) -> torch.Tensor:
    """Return log-probabilities of the labels `[batch, seq]` from the last chunk, hidden states from the others."""
    output = forward_language_model(model, batch)
    return -output if output.shape == batch.labels.shape else output


def score_answers(engine: Engine, batches: Sequence[Batch]) -> list[torch.Tensor] | None:
    """Return the log-probabilities of the answers of each microbatch, fp64 `[num_sequences]`, on one rank of a replica.

    That is the first tp and cp rank of the last pipeline stage; elsewhere None. Collective: all ranks of the world.
    """
    mesh = engine.mesh
    multiple = mesh.pp_size if mesh.vpp_size > 1 else 1
    filled = [*batches, *[batches[-1]] * (-len(batches) % multiple)]
    outputs = engine.score(filled, forward_log_probs)
    if not (mesh.is_last_pp_stage and mesh.tp_rank == 0 and mesh.cp_rank == 0):
        return None
    scores = []
    for batch, output in zip(batches, outputs, strict=False):
        values = torch.where(batch.loss_mask > 0, output.cpu().double(), 0.0)
        scores.append(sum_by_sequence(values, batch.columns["sequence"], len(batch.sequences["side"])))
    return scores

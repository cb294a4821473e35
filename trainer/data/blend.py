"""A weighted blend of sources and the ledger of what was read of each.

Which source the next sample comes from depends on the ledger alone, never on ranks or batch sizes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import BadInput
from configs.fields import value_text
from configs.sections.data import SourceConfig
from trainer.data.indexed import TokenDataset
from trainer.data.packed_source import SOURCES, PackedSource
from trainer.data.source import Source
from trainer.data.upsampling import split_by_length, whole_and_threshold

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assignment:
    """Where a run of consecutive global samples comes from."""

    first_sample: int  # global number of the first
    source: NDArray[np.int64]  # [n] place of the source in the blend
    sample: NDArray[np.int64]  # [n] number of the sample in that source


class Blend:
    """Sources drawn in proportion to their weights, each read in its own order."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], field: str = "data.train") -> None:
        """Blend `sources` with relative `weights`. Raises BadInput, naming `field`, where data is given twice."""
        if not sources:
            raise BadInput(f"{field}: no source is given; a value that would work: [{{path: data/stdlib/train}}]")
        self.sources = list(sources)
        self.weights = np.array(weights, dtype=np.float64) / np.sum(weights)
        self.consumed_samples = 0
        self._consumed = np.zeros(len(sources), dtype=np.int64)  # of each source since the run began
        self._drawn = np.zeros(len(sources), dtype=np.int64)  # of each source since this blend began
        self._retired: dict[str, dict[str, Any]] = {}  # sources of earlier blends, so that they can come back
        seen: dict[str, str] = {}
        for source in sources:
            path = source.dataset.prefix
            if source.dataset.identity in seen:
                other = seen[source.dataset.identity]
                raise BadInput(f"{field}: {path} and {other} hold the same data; give one of them both weights")
            seen[source.dataset.identity] = path

    def take(self, num_samples: int) -> Assignment:
        """Draw the next `num_samples` and enter them in the ledger.

        Draw k of a source falls due at (k + 1/2) / weight; the earliest due comes next (Webster's method), which
        keeps every source within about one sample of its share at any time.
        """
        reach = np.minimum(np.ceil(self.weights * (num_samples + len(self.sources))).astype(np.int64) + 2, num_samples)
        source = np.repeat(np.arange(len(self.sources)), reach)
        within = np.arange(source.size) - np.repeat(np.cumsum(reach) - reach, reach)
        due = (self._drawn[source] + within + 0.5) / self.weights[source]
        chosen = np.lexsort((source, due))[:num_samples]
        source, within = source[chosen], within[chosen]
        assignment = Assignment(self.consumed_samples, source, self._consumed[source] + within)
        counts = np.bincount(source, minlength=len(self.sources))
        self._consumed += counts
        self._drawn += counts
        self.consumed_samples += num_samples
        return assignment

    def read(self, assignment: Assignment, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Read these rows of an assignment as their sources give them: int64 [len(rows), ...]."""
        chosen = assignment.source[rows]
        if (chosen == chosen[0]).all():
            return self.sources[chosen[0]].read(assignment.sample[rows])
        parts = [(np.flatnonzero(chosen == number), source) for number, source in enumerate(self.sources)]
        read = [(mine, source.read(assignment.sample[rows[mine]])) for mine, source in parts if mine.size]
        samples = np.empty((len(rows), *read[0][1].shape[1:]), dtype=np.int64)
        for mine, own in read:
            samples[mine] = own
        return samples

    def describe_order(self, num_samples: int) -> Iterator[str]:
        """Yield a sentence for each source that is packed or part of one, on a run of so many samples of the blend."""
        for source, weight in zip(self.sources, self.weights, strict=True):
            data = source.dataset
            is_part = whole_and_threshold(data.identity)[1] is not None
            if not is_part and not isinstance(source, PackedSource):
                continue
            epochs = weight * num_samples / source.num_samples
            text = f"{data.origin}: {data.num_documents:,} documents of {data.num_tokens:,} tokens, {weight:.1%} of "
            text += f"all samples, read {epochs:.3g} times in this run"
            if isinstance(source, PackedSource):
                text += f"; packed into {source.num_samples:,} rows, {source.padding_share:.2%} of them padding, "
                text += f"{source.num_split:,} documents are longer than a row and split"
            yield text

    def state_dict(self) -> dict[str, Any]:
        """Return the ledger as plain data: samples in all, and per source its data, weight and samples.

        A source's key is what the user named: the prefix of a dataset, or a file of conversations.
        """
        return {
            "consumed_samples": self.consumed_samples,
            "seq_len": self.sources[0].seq_len,
            "packing": self.sources[0].packing,
            "sources": {
                source.dataset.origin: {
                    "identity": source.dataset.identity,
                    "weight": float(weight),
                    "consumed_samples": int(consumed),
                    "drawn_in_blend": int(drawn),
                }
                for source, weight, consumed, drawn in zip(
                    self.sources, self.weights, self._consumed, self._drawn, strict=True
                )
            },
            "retired": dict(self._retired),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a ledger. A source goes on where it was, though weights change, others come or go, or it moves.

        Raises BadInput when the data behind a path is no longer what it was, or the length or packing of samples or the
        bound of long documents has changed: samples are cut anew then, and what was read before could not be told from
        what was not. A ledger that says nothing of packing is of an older version, which laid documents end to end.
        """
        seq_len = self.sources[0].seq_len
        if state["seq_len"] != seq_len:
            raise BadInput(
                f"train.seq_len: {seq_len} differs from the {state['seq_len']} of the checkpoint, whose data order "
                f"cannot go on; use {state['seq_len']}, or begin under another run.name from its weights with "
                "checkpoint.init_from"
            )
        packing, packed = self.sources[0].packing, state.get("packing", "concat")
        if packed != packing:
            raise BadInput(
                f"data.packing: {packing} differs from the {packed} of the checkpoint, whose data order cannot go on; "
                f"use {packed}, or begin under another run.name from its weights with checkpoint.init_from"
            )
        known = {**state["retired"], **state["sources"]}
        before = {entry["identity"]: entry for entry in known.values()}
        self._check_thresholds(before)
        for number, source in enumerate(self.sources):
            path, identity = source.dataset.origin, source.dataset.identity
            if identity not in before and path in known:
                made = path != source.dataset.prefix  # of conversations
                rules = " (its rows, or the template, tokenizer or rules that make samples of them)" if made else ""
                raise BadInput(
                    f"{path} is not what the checkpoint read there{rules}; put new data elsewhere, or begin under "
                    "another run.name from its weights with checkpoint.init_from"
                )
            self._consumed[number] = before.get(identity, {"consumed_samples": 0})["consumed_samples"]
        self.consumed_samples = state["consumed_samples"]
        present = {source.dataset.identity for source in self.sources}
        self._retired = {path: entry for path, entry in known.items() if entry["identity"] not in present}
        self._tell_changes(state["sources"])
        blend = [(source.dataset.identity, float(w)) for source, w in zip(self.sources, self.weights, strict=True)]
        if [(entry["identity"], entry["weight"]) for entry in state["sources"].values()] == blend:
            self._drawn[:] = [before[identity]["drawn_in_blend"] for identity, _ in blend]
        else:  # another blend begins now: a new source gets its share from here on, not a burst to catch up
            self._drawn[:] = 0

    def _tell_changes(self, before: Mapping[str, Any]) -> None:
        """Say which sources come and go where a run goes on with others."""
        identities = {entry["identity"] for entry in before.values()}
        for source in self.sources:
            if source.dataset.identity not in identities:
                log.warning("%s is other data than the checkpoint's run read last", source.dataset.origin)
        present = {source.dataset.identity for source in self.sources}
        for path, entry in before.items():
            if entry["identity"] not in present:
                log.warning("%s, of which %d samples were read, is no longer read", path, entry["consumed_samples"])

    def _check_thresholds(self, identities: Iterable[str]) -> None:
        """Refuse a source whose long documents were told from the others by another length."""
        before = dict(map(whole_and_threshold, identities))
        for source in self.sources:
            whole, threshold = whole_and_threshold(source.dataset.identity)
            was = before.get(whole, threshold)
            if was != threshold:
                here, there = value_text(threshold), value_text(was)
                raise BadInput(
                    f"data.train: long_document_tokens={here} of {source.dataset.prefix} differs from the {there} of "
                    f"the checkpoint, whose data order cannot go on; use {there}, or begin under another "
                    "run.name from its weights with checkpoint.init_from"
                )


def open_blend(sources: Sequence[SourceConfig], seq_len: int, seed: int, packing: str = "concat") -> Blend:
    """Open the sources of `data.train` as one blend. Raises BadInput, also when their tokenizers differ.

    A source with `long_document_share` becomes two, its long documents and the others.
    """
    datasets = [TokenDataset(source.path, source.origin) for source in sources]
    made_with = {dataset.meta.vocabulary_hash: dataset.prefix for dataset in datasets if dataset.meta}
    if len(made_with) > 1:
        first, second = list(made_with.values())[:2]
        raise BadInput(f"data.train: {first} and {second} were made with different tokenizers; make one of them again")
    parts = [part for pair in zip(datasets, sources, strict=True) for part in split_by_length(*pair)]
    return Blend([SOURCES[packing](dataset, seq_len, seed) for dataset, _ in parts], [weight for _, weight in parts])

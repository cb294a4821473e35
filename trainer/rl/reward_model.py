"""A frozen reward model: conversations with the policy's answers -> its value where each answer's end is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.stages import GrpoConfig
from trainer.data.chat.conversation import BadRow, Conversation
from trainer.data.chat.encode import ChatEncoder, Sample
from trainer.engine.forward import forward_values
from trainer.engine.sharded_model import ShardedModel
from trainer.rl.placement import Placement
from trainer.rl.update import score_placed

_ROW_UNIT = 32  # tokens of a row for each tp and cp rank, of which every number format makes whole tiles


@dataclass(frozen=True)
class _Text:
    """A conversation as it lies in a row, which takes all tokens but the last as inputs: so the last is there twice."""

    token_ids: tuple[int, ...]

    def trained(self) -> NDArray[np.bool_]:
        """Return that nothing of it is trained."""
        return np.zeros(len(self.token_ids) - 1, dtype=np.bool_)


def _up_to_end(sample: Sample) -> _Text:
    """Return a sample up to its last trained token, which ends the answer."""
    end = len(sample.loss_mask) - sample.loss_mask[::-1].index(1)
    return _Text((*sample.input_ids[:end], sample.input_ids[end - 1]))


class RewardModel:
    """Scores conversations as its stage trains it: rendered by the template, at the token that ends the last turn."""

    def __init__(self, config: GrpoConfig, model: ShardedModel, encoder: ChatEncoder) -> None:
        self._config, self._model = config, model
        self._encoder = ChatEncoder(encoder.template, encoder.tokenizer, "last", "grpo.template")

    def score(self, conversations: Sequence[Conversation | BadRow]) -> list[float | str]:
        """Return the value of each, or why there is none: what is no conversation has none.

        Equal ones are read once and have one value, bit for bit.
        Collective: all ranks of the world must call this.
        """
        encoded = iter(self._encoder.encode_batch([one for one in conversations if not isinstance(one, BadRow)]))
        found = [one if isinstance(one, BadRow) else next(encoded) for one in conversations]
        texts = [str(one) if isinstance(one, BadRow) else _up_to_end(one[-1]) for one in found]
        different = list(dict.fromkeys(text for text in texts if isinstance(text, _Text)))
        values = dict(zip(different, self._values(different), strict=True))
        return [text if isinstance(text, str) else values[text] for text in texts]

    def _values(self, texts: Sequence[_Text]) -> list[float | str]:
        if not texts:
            return []
        train, mesh = self._config.train, self._model.mesh
        lengths = [len(text.token_ids) - 1 for text in texts]
        unit = _ROW_UNIT * mesh.tp_size * mesh.cp_size
        row_len = train.seq_len + max(0, -(-(max(lengths) - train.seq_len) // unit)) * unit
        placement = Placement(lengths, row_len, train.micro_batch_size, mesh)
        [values] = score_placed(self._model, [(placement, placement.build(texts))], forward_values)
        return [float(own[-1]) if np.isfinite(own[-1]) else "its value is not finite" for own in values]

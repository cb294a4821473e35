"""The cache of tokenised conversations: what lies in it side by side, and what is told of it."""

from __future__ import annotations

import json
import logging

import pytest

from configs.errors import BadInput
from configs.load import load_config
from tests.end_to_end.conftest import write_text
from tools.train_tokenizer import train_tokenizer
from trainer.data.chat.cache import prepare_conversations
from trainer.data.indexed import TokenDataset


@pytest.fixture
def prepare(tmp_path, caplog):
    """Return a function of sources by split that gives the prefixes in the cache; of a dataset with two splits."""
    special = ("<|im_start|>", "<|im_end|>")
    train_tokenizer([write_text(tmp_path / "text.jsonl", 0, 200)], str(tmp_path / "tok"), 320, special_tokens=special)
    row = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "two"}]}
    for split in ("train", "test"):
        (tmp_path / "both" / split).mkdir(parents=True)
        (tmp_path / "both" / split / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
model: {{num_layers: 1, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2, vocab_size: 320}}
data: {{tokenizer: {tmp_path / "tok"}}}
sft: {{template: chatml, cache: {tmp_path / "cache"}}}
train: {{num_steps: 1, seq_len: 64}}
"""
    )
    caplog.set_level(logging.INFO)

    def run(**splits: tuple[str, ...]):
        paths = {name: ", ".join(f"{{path: {tmp_path}/{one}}}" for one in some) for name, some in splits.items()}
        words = [f"sft.{name}=[{text}]" for name, text in paths.items()]
        return prepare_conversations(load_config(str(recipe), words, "sft"))  # type: ignore[arg-type]

    return run


def test_the_same_rows_under_two_names_lie_side_by_side(prepare, caplog):
    data = prepare(train=("both/train",), validation=("both",))
    for source in (data.train[0], data.validation[0]):
        assert TokenDataset(source.path).num_documents == 1
    assert "1 of the test split" in caplog.text, "what of a folder is not read is told"
    caplog.clear()
    assert prepare(train=("both/train",), validation=("both",)) == data
    told = [record.getMessage() for record in caplog.records if "is tokenised in" in record.getMessage()]
    assert len(told) == 2 and "1 rows, 1 samples" in told[0], "of what is known already too"


def test_equal_sources_are_refused_by_their_own_names(prepare, tmp_path):
    with pytest.raises(BadInput) as refusal:
        prepare(train=("both/train", "both/test"))
    sentence = str(refusal.value)
    assert sentence.startswith(
        f"sft.train[1]: {tmp_path}/both/test holds the same conversations as {tmp_path}/both/train;"
    )

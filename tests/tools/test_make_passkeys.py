"""Documents with passkeys: the key is hidden and asked for in each, and no document is longer than was said."""

from __future__ import annotations

import re

import pytest

from tools.make_passkeys import main
from tools.preprocess_data import preprocess
from trainer.data.indexed import TokenDataset
from trainer.data.making.documents import InputFile
from trainer.data.making.workers import Recipe
from trainer.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def text(tmp_path_factory, tokenizer_directory, jsonl) -> str:
    """Return the prefix of a dataset to hide keys in."""
    prefix = str(tmp_path_factory.mktemp("text") / "text")
    preprocess([InputFile(str(jsonl), "jsonl")], Recipe(tokenizer_directory), prefix)
    return prefix


@pytest.fixture
def make(text, tokenizer_directory, tmp_path):
    """Return a function that runs the command with further words: `make(*words) -> exit code`."""
    return lambda *words: main([text, "--tokenizer", tokenizer_directory, "--out", str(tmp_path / "keys"), *words])


def test_every_document_hides_a_key_and_ends_in_it(make, tmp_path, tokenizer_directory):
    assert make("--longest", "400", "--tokens", "20000", "--digits", "4") == 0
    dataset, tokenizer = TokenDataset(str(tmp_path / "keys")), load_tokenizer(tokenizer_directory)
    assert 20000 <= dataset.num_tokens < 20400 and int(dataset.lengths.max()) <= 400
    keys, places = [], []
    for document in range(dataset.num_documents):
        tokens = dataset.read(document, 0, int(dataset.lengths[document])).tolist()
        assert tokens.pop() == tokenizer.eod_id
        said = tokenizer.decode(tokens)
        found = re.findall(r"The pass key is (\d{4})(?!\d)", said)
        assert (
            len(found) == 2
            and found[0] == found[1]
            and said.endswith(f"What is the pass key? The pass key is {found[0]}")
        )
        keys.append(found[0])
        places.append(said.index("The pass key is") / len(said))
    assert len(set(keys)) > 0.9 * len(keys) and min(places) < 0.1 and max(places) > 0.5
    before = [path.read_bytes() for path in sorted(tmp_path.glob("keys.*"))]
    assert make("--longest", "400", "--tokens", "20000", "--digits", "4") == 0
    assert [path.read_bytes() for path in sorted(tmp_path.glob("keys.*"))] == before


@pytest.mark.parametrize(
    ("words", "named"),
    [(("--longest", "50"), "--longest: 50 tokens have no room"), (("--digits", "0"), "--digits: 0 make no passkey")],
)
def test_what_cannot_be_made_is_one_sentence_and_nothing_written(make, tmp_path, capsys, words, named):
    assert make(*words) == 2
    assert named in capsys.readouterr().err and not list(tmp_path.glob("keys*"))

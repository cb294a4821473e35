"""What stands around documents: BOS, another end, the words on both, and the trainer's use of what the data says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from configs.errors import BadInput
from configs.stages import Config
from tools.preprocess_data import main
from tools.train_tokenizer import train_tokenizer
from trainer.data.corpus import open_corpus
from trainer.data.indexed import TokenDataset
from trainer.data.making.around_documents import find_notes
from trainer.data.making.documents import InputFile
from trainer.data.making.workers import Recipe
from trainer.data.tokenizer import load_tokenizer

END = "<|endoftext|>"
SPECIAL = ["<s>", "<|im_end|>"]


@pytest.fixture(scope="module")
def instruct(tmp_path_factory) -> str:
    """A tokenizer like an instruct model's: a template that adds BOS, and an eos token that ends turns."""
    from tokenizers import Tokenizer, processors

    folder = tmp_path_factory.mktemp("instruct")
    (folder / "text.txt").write_text("a word and another word\n" * 20)
    train_tokenizer([InputFile(str(folder / "text.txt"), "text")], str(folder / "tokenizer"), 270)
    file = folder / "tokenizer" / "tokenizer.json"
    backend = Tokenizer.from_file(str(file))
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    backend.save(str(file))
    set_config(folder / "tokenizer", eos_token="<|im_end|>", bos_token={"content": "<s>"})
    (folder / "tokenizer" / "special_tokens_map.json").unlink()
    return str(folder / "tokenizer")


def set_config(tokenizer: Path, **config: object) -> None:
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    file.write_text("".join(json.dumps({"text": f"a word {number}"}) + "\n" for number in range(30)))
    return file


def make(text: Path, tokenizer: str, prefix: Path, *options: str) -> str:
    assert main([str(text), "--tokenizer", tokenizer, "--out", str(prefix), "--workers", "1", *options]) == 0
    return str(prefix)


def test_documents_begin_and_end_as_asked_and_the_meta_file_says_so(tmp_path, text, instruct, capsys):
    tokenizer = load_tokenizer(instruct)
    bos, turn, end = (tokenizer.backend.token_to_id(token) for token in (*SPECIAL, END))
    words = tokenizer.encode("a word 0")
    plain = TokenDataset(make(text, instruct, tmp_path / "plain"))
    told = capsys.readouterr().err
    assert "documents begin without BOS" in told and "in front of every text" in told and "--bos" in told
    assert "documents end in <|im_end|>" in told and f"--eod '{END}'" in told
    assert plain.read(0, 0, int(plain.lengths[0])).tolist() == [*words, turn]
    made = TokenDataset(make(text, instruct, tmp_path / "made", "--bos", "--eod", END, "--verify"))
    captured = capsys.readouterr()
    assert "note:" not in captured.err and "30 documents, 1 of them tokenized again; 1 of those decode" in captured.out
    assert made.read(0, 0, int(made.lengths[0])).tolist() == [bos, *words, end]
    assert made.meta is not None and plain.meta is not None
    assert (made.meta.bos_id, made.meta.eod_id, made.meta.eod_token) == (bos, end, END)
    assert (plain.meta.bos_id, plain.meta.eod_id, plain.meta.eod_token) == (None, turn, "<|im_end|>")
    assert main([str(text), "--tokenizer", instruct, "--out", str(tmp_path / "made"), "--bos"]) == 2
    assert "other inputs or settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--eod", "word"], "not a special token"),
        (["--eod", "a"], "an ordinary one, which text can hold"),
        (["--eod", "<|absent|>"], f"those begin: {END}, <s>, <|im_end|>"),
        (["--eod", ""], "not a special token"),
        (["--bos", "--eod", "<s>"], "<s> ends documents and would begin them too"),
    ],
)
def test_tokens_that_will_not_do_are_refused(tmp_path, text, instruct, capsys, options, sentence):
    words = [str(text), "--tokenizer", instruct, "--out", str(tmp_path / "data"), *options]
    assert main(words) == 2
    assert sentence in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_tokenizer_without_bos_is_told(tmp_path, text, instruct, tokenizer_directory):
    copy = tmp_path / "copy"
    shutil.copytree(tokenizer_directory, copy)
    (copy / "special_tokens_map.json").unlink()
    set_config(copy, eos_token=END)
    with pytest.raises(BadInput, match="--bos: tokenizer .*copy names no BOS token"):
        load_tokenizer(copy, bos=True)
    assert list(find_notes(Recipe(str(copy)), load_tokenizer(copy))) == []
    set_config(copy, eos_token=END, bos_token=END)  # as train_tokenizer writes it
    with pytest.raises(BadInput, match="would begin them too"):
        load_tokenizer(copy, bos=True)
    set_config(copy, eos_token=END, bos_token=END, add_bos_token=True)
    assert "its BOS token" in next(find_notes(Recipe(str(copy)), load_tokenizer(copy)))


def test_a_turn_is_known_by_the_chat_template_too(tmp_path, instruct):
    copy = tmp_path / "copy"
    shutil.copytree(instruct, copy)
    set_config(copy, eos_token="<s>")
    file = copy / "tokenizer.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_text().replace(END, "<|other|>").encode())
    assert not [note for note in find_notes(Recipe(str(copy)), load_tokenizer(copy)) if "end in" in note]
    (copy / "chat_template.jinja").write_text("{{ message }}<s>")
    assert (
        "--eod TOKEN" in [note for note in find_notes(Recipe(str(copy)), load_tokenizer(copy)) if "end in" in note][0]
    )


def config_of(
    tokenizer: str | None,
    *prefixes: str,
    validation: str | None = None,
    document_mask: bool = True,
    packing: str = "concat",
) -> Config:
    model = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1, "vocab_size": 400}
    data = {
        "tokenizer": tokenizer,
        "train": [{"path": prefix} for prefix in prefixes],
        "validation": [{"path": validation}] if validation else [],
        "document_mask": document_mask,
        "packing": packing,
    }
    train = {"num_steps": 1, "seq_len": 16, "micro_batch_size": 1, "global_batch_size": 1}
    return Config.model_validate({"model": model, "train": train, "data": data})


def test_document_masks_end_where_the_data_says(tmp_path, text, instruct):
    prefix = make(text, instruct, tmp_path / "data", "--bos", "--eod", END)
    other = make(text, instruct, tmp_path / "other")
    for tokenizer in (instruct, None):  # what the data says needs no tokenizer
        corpus = open_corpus(config_of(tokenizer, prefix, validation=other))
        reader = corpus.build_reader(dp_rank=0, dp_size=1)
        assert reader is not None
        batch = reader.read_step()[0]
        reader.close()
        assert batch.documents is not None and len(batch.documents.cu_seqlens) > 2
        end = load_tokenizer(instruct, eod=END).eod_id
        assert (batch.loss_mask == 0).equal(batch.tokens == end) and (batch.tokens == end).any()
        validation = corpus.build_validation_readers(dp_rank=0, dp_size=1)["other"]
        first = next(iter(validation.batches()))
        turn = load_tokenizer(instruct).eod_id
        assert (first.loss_mask == 0).equal(first.tokens == turn) and (first.tokens == turn).any()
    tokenizer = open_corpus(config_of(instruct, prefix)).tokenizer
    assert tokenizer is not None and (tokenizer.eod_token, tokenizer.bos_id) == (
        END,
        load_tokenizer(instruct, bos=True).bos_id,
    )


def test_a_blend_of_two_ends_and_data_that_says_nothing_are_refused(tmp_path, text, instruct):
    one = make(text, instruct, tmp_path / "one")
    text_too = tmp_path / "more.jsonl"
    text_too.write_text(text.read_text() * 2)
    two = make(text_too, instruct, tmp_path / "two", "--eod", END)
    with pytest.raises(BadInput, match="data.document_mask: documents end in token .* --eod"):
        open_corpus(config_of(instruct, one, two))
    assert open_corpus(config_of(instruct, one, two, document_mask=False)).blend is not None
    Path(one + ".meta.json").unlink()
    with pytest.raises(BadInput, match=r"data.document_mask: .*one has no .meta.json"):
        open_corpus(config_of(None, one))
    assert open_corpus(config_of(instruct, one)).build_reader(dp_rank=0, dp_size=1) is not None
    packed = open_corpus(config_of(None, one, two, validation=one, packing="best_fit"))  # rows know where they end
    reader = packed.build_reader(dp_rank=0, dp_size=1)
    assert reader is not None
    assert reader.read_step()[0].documents is not None
    reader.close()
    validation = packed.build_validation_readers(dp_rank=0, dp_size=1)["one"]
    counted = sum(float(batch.loss_mask.sum()) for batch in validation.batches())
    assert validation.source.packing == "best_fit" and counted == validation.source.dataset.num_tokens - 30

"""Long context from end to end: a run continued on longer samples, and what a model makes of long texts."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import numpy as np
import pytest

from configs.errors import ExitCode
from tests.end_to_end.conftest import SENTENCES
from tests.pool import Place

LENGTHS = (192, 256)


def run_evaluation(place: Place, argv: list[str], port: int) -> tuple[int, str]:
    """Run the command as one rank of a launcher; return its exit code and what it said."""
    import contextlib
    import io
    import os
    from unittest.mock import patch

    from parallel.environment import Environment
    from tools.eval_long_context import main

    variables = {}
    if place.world_size > 1:
        environment = Environment(rank=place.rank, world_size=place.world_size, master_port=port)
        variables = environment.as_variables()
    said = io.StringIO()
    with patch.dict(os.environ, variables), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(argv)
    return int(code), said.getvalue()


@pytest.fixture
def evaluate(ranks, long_documents, tmp_path):
    """Return a function that evaluates a model: `evaluate(model, world, *words) -> (code, what was said, results)`."""

    def run(model: object, world: int, *words: str) -> tuple[int, str, dict]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        out = tmp_path / f"evaluation_{world}"
        argv = [str(model), "--data", str(long_documents), "--out", str(out), "--documents", "3", "--depths", "2"]
        argv += ["--keys", "2", "--lengths", ",".join(map(str, LENGTHS)), *words]
        answers = ranks.run(run_evaluation, argv, port, world=world)
        assert len({code for code, _ in answers}) == 1, answers
        results = out / "long_context.json"
        return *answers[0], json.loads(results.read_text()) if results.exists() else {}

    return run


@pytest.fixture(scope="module")
def long_documents(corpus, tmp_path_factory) -> Path:
    """Return the prefix of five documents, four of them longer than the longest of `LENGTHS`."""
    from tools.preprocess_data import preprocess
    from trainer.data.making.documents import InputFile
    from trainer.data.making.workers import Recipe

    folder = tmp_path_factory.mktemp("long")
    texts = ["".join(SENTENCES[(n + k) % 3].replace("{n}", str(n * k)) for k in range(40)) for n in range(4)]
    file = folder / "long.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["short", *texts]), encoding="utf-8")
    preprocess([InputFile(str(file), "jsonl")], Recipe(str(corpus / "tokenizer")), str(folder / "long"))
    return folder / "long"


def test_a_run_is_continued_on_longer_samples_and_evaluated_on_any_layout(train, evaluate, tmp_path, caplog):
    short, long = tmp_path / "short", tmp_path / "long"
    assert train(1, f"run.dir={short}", "checkpoint.save_every=null") == (ExitCode.DONE, "")
    longer = (f"run.dir={long}", f"checkpoint.init_from={short}", "train.seq_len=64", "checkpoint.export_hf=true")
    with caplog.at_level("WARNING"):
        stretched = ("model.rope.base=40000", "model.max_position_embeddings=128", "parallel.cp=2")
        assert train(2, *longer, *stretched, stage="long_context") == (ExitCode.DONE, "")
    log = (long / "logs" / "attempt_1" / "rank_0.log").read_text()
    assert "warm start: model.rope.base is 40000.0, it was 10000.0" in log
    assert json.loads((long / "checkpoints" / "latest" / "checkpoint.json").read_text())["stage"]["name"] == (
        "long_context"
    )
    code, said, one = evaluate(long, 1)
    assert code == 0, said
    assert "192 to 255" in said and "long_context.json" in said
    folder = tmp_path / "evaluation_1"
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in ("passkeys.png", "perplexity.png"))
    assert list((folder / "tensorboard").glob("events*"))
    for world, layout in ((2, "parallel.cp=2"), (4, "parallel.tp=2 parallel.pp=2"), (3, "parallel.tp=1")):
        code, said, found = evaluate(long, world, *layout.split())
        assert code == 0, said
        assert_equal_results(found, one)
    assert_transformers_agrees(one, long, tmp_path)


def assert_equal_results(found: dict, one: dict) -> None:
    for kind in ("perplexity", "passkeys"):
        assert len(found[kind]) == len(one[kind]) > 1
        for here, there in zip(found[kind], one[kind], strict=True):
            assert here == pytest.approx(there, rel=1e-5)


def assert_transformers_agrees(results: dict, run_dir: Path, tmp_path: Path) -> None:
    """Compare with the losses of the exported model in float64, over texts that are made again."""
    import torch
    from transformers import AutoModelForCausalLM

    from trainer.data.indexed import TokenDataset
    from trainer.data.tokenizer import load_tokenizer
    from trainer.evaluate.passkey import PasskeyMaker

    exported = (run_dir / "checkpoints" / "latest" / "hf").resolve()
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float64, attn_implementation="eager")
    dataset = TokenDataset(results["data"])

    def losses_of(tokens: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens[None, :-1])).logits[0]
        return torch.nn.functional.cross_entropy(logits, torch.from_numpy(tokens[1:]), reduction="none").numpy()

    documents = [number for number, length in enumerate(dataset.lengths) if length > LENGTHS[-1]][:3]
    losses = np.stack([losses_of(dataset.read(one, 0, LENGTHS[-1] + 1).astype(np.int64)) for one in documents])
    for bucket, (first, end) in zip(results["perplexity"], [(0, 192), (192, 256)], strict=True):
        assert (bucket["first"], bucket["end"], bucket["num_tokens"]) == (first, end, 3 * (end - first))
        assert bucket["loss"] == pytest.approx(losses[:, first:end].mean(), rel=1e-5)
        assert bucket["perplexity"] == pytest.approx(np.exp(losses[:, first:end].mean()), rel=1e-4)
    maker = PasskeyMaker(load_tokenizer(exported), dataset)
    for cell in results["passkeys"]:
        random = np.random.default_rng([0, cell["length"], round(cell["depth"] * 1e6)])
        texts = [maker.make(cell["length"], cell["depth"], random) for _ in range(2)]
        answers = np.concatenate([losses_of(text.tokens)[-text.num_answer_tokens :] for text in texts])
        assert cell["loss"] == pytest.approx(answers.mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--lengths", "60"), "--lengths: 60 tokens are too few"),
        (("--lengths", "5000"), "no document has more than 5000 tokens"),
        (("parallel.cp=2",), "parallel"),
        (
            ("model.max_position_embeddings=224",),
            "--lengths: 256 exceeds model.max_position_embeddings=224; a value that",
        ),
        (("train.seq_len=64",), "train.seq_len: 64 would have no effect here"),
        (("model.num_layers=3",), "holds another architecture"),
        (("train.nothing=1",), "train.nothing"),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(train, evaluate, tmp_path, words, named):
    assert train(1, f"run.dir={tmp_path}/short", "train.num_steps=0", "train.eval_every=null") == (ExitCode.DONE, "")
    code, said, results = evaluate(tmp_path / "short", 1, *words)
    assert code == ExitCode.BAD_INPUT and named in said and said.count("\n") == 1 and not results

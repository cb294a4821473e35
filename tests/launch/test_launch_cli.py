"""The shared command line: what is understood, and the sentence for what is not."""

import pytest

from configs.errors import BadInput
from launch.cli import Arguments, parse_arguments, usage


def test_config_overrides_and_options_in_any_order():
    words = ["train.num_steps=3", "--dry-run", "configs/a.yaml", "data.train=[{path: x}]", "--world-size", "8"]
    assert parse_arguments(words, "pretrain") == Arguments(
        "configs/a.yaml", ("train.num_steps=3", "data.train=[{path: x}]"), dry_run=True, world_size=8
    )
    assert parse_arguments(["c.yaml", "--dry-run", "--world-size=2"], "pretrain").world_size == 2


def test_a_value_that_ends_like_a_config_is_no_second_config():
    words = ["configs/a=b.yaml", "run.dir=/somewhere/a.yaml", "checkpoint.init_from=x.yml"]
    assert parse_arguments(words, "pretrain") == Arguments(words[0], tuple(words[1:]))


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["c.yaml", "--help", "--nonsense"]])
def test_help_wins_over_everything(words):
    assert parse_arguments(words, "pretrain").help


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "no config given; for example: pretrain.py configs/demo/pretrain.yaml"),
        (["a=1"], "no config given"),
        (["a.yaml", "b.yaml"], "b.yaml: a second config"),
        (["a.yaml", "--dryrun"], "did you mean --dry-run?"),
        (["a.yaml", "--train.num_steps=3"], "without dashes: train.num_steps=3"),
        (["a.yaml", "--dry-run", "--world-size"], "--world-size: ''"),
        (["a.yaml", "--dry-run", "--world-size", "0"], "--world-size: '0'"),
        (["a.yaml", "--dry-run", "--world-size", "²"], "--world-size: '²'"),  # a digit, and no number
        (["a.yaml", "--world-size", "4"], "goes with --dry-run"),
    ],
)
def test_refusals_name_the_word_and_what_would_work(words, sentence):
    with pytest.raises(BadInput) as refused:
        parse_arguments(words, "pretrain")
    assert sentence in str(refused.value)


def test_usage_lists_every_documented_exit_code():
    text = usage("sft")
    assert "configs/demo/sft.yaml" in text
    assert all(f"{code} " in text for code in (0, 2, 3, 4, 5))

"""Sources of conversations in the cache: what a changed file, two alike and an epoch over several of them become."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np
import pytest

from configs.errors import BadInput, PeerLost
from configs.stages import SftConfig
from trainer.data.chat import cache
from trainer.data.chat.cache import prepare_conversations
from trainer.data.chat.template import load_template
from trainer.data.corpus import open_corpus
from trainer.data.indexed import TokenDataset

MODEL = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2, "vocab_size": 1000}


def write_chats(path, words: list[str]) -> str:
    """Write a chat of one question for each of the answers given."""
    turns = ([{"role": "user", "content": "?"}, {"role": "assistant", "content": text}] for text in words)
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in turns))
    return str(path)


@pytest.fixture
def make_config(directory, tmp_path):
    def make(*paths: str, **sections: Any) -> SftConfig:
        sft = {"template": sections.pop("template", "chatml"), "cache": str(tmp_path / "cache"), "num_workers": 1}
        fields = {
            "model": MODEL,
            "data": {"tokenizer": str(directory)},
            "train": {"seq_len": 64, "global_batch_size": 1} | sections.get("train", {"num_steps": 1}),
            "sft": sft | {"train": [{"path": path} for path in paths]},
            "schedule": sections.get("schedule", {}),
        }
        return SftConfig.model_validate(fields)

    return make


def test_an_epoch_reads_every_row_of_every_source_once(make_config, tmp_path):
    # The first source's rows are half empty, so that it has fewer tokens than the second and as many rows.
    half, short = (
        write_chats(tmp_path / "half.jsonl", ["abcde " * 6] * 7),
        write_chats(tmp_path / "s.jsonl", ["a"] * 21),
    )
    config = make_config(half, short, train={"num_epochs": 2})
    corpus = open_corpus(config, prepare_conversations(config))
    rows = [source.num_samples for source in corpus.blend.sources]
    tokens = [source.dataset.num_tokens for source in corpus.blend.sources]
    assert tokens[0] / rows[0] < 0.8 * tokens[1] / rows[1], "one fills its rows worse than the other"
    drawn = corpus.blend.take(corpus.config.train.num_steps)
    for number, num_rows in enumerate(rows):
        read = drawn.sample[drawn.source == number] % num_rows
        assert np.bincount(read, minlength=num_rows).tolist() == [2] * num_rows


@pytest.mark.parametrize(("num_epochs", "num_steps"), [(2.2, 55), (0.001, 1), (3, 75)])
def test_epochs_are_the_fewest_steps_that_read_them(make_config, tmp_path, num_epochs, num_steps):
    config = make_config(write_chats(tmp_path / "a.jsonl", ["ab " * 20] * 25), train={"num_epochs": num_epochs})
    assert open_corpus(config, prepare_conversations(config)).config.train.num_steps == num_steps


@pytest.mark.parametrize(
    ("train", "schedule", "sentence"),
    [
        ({"num_epochs": 1}, {"warmup_steps": 5}, "schedule.warmup_steps: 5 is not below the 2 steps of train.num_ep"),
        ({"num_epochs": 1}, {"kind": "wsd", "wsd_decay_steps": 3}, "schedule.wsd_decay_steps: 3 do not fit"),
        ({"num_epochs": 1e300}, {}, "train.num_epochs: 1e.300 times the 2 samples"),
    ],
)
def test_epochs_too_few_or_too_many_are_refused(make_config, tmp_path, train, schedule, sentence):
    config = make_config(write_chats(tmp_path / "a.jsonl", ["ab " * 20] * 2), train=train, schedule=schedule)
    with pytest.raises(BadInput, match=f"^{sentence}.*would work"):
        open_corpus(config, prepare_conversations(config))


def test_on_resume_new_data_is_read_beside_the_old_and_refused_in_its_place(make_config, tmp_path):
    first, other = write_chats(tmp_path / "a.jsonl", ["yes"] * 9), write_chats(tmp_path / "b.jsonl", ["no"] * 9)

    def open_one(path, **sections):
        config = make_config(path, **sections)
        return open_corpus(config, prepare_conversations(config)).blend

    blend = open_one(first)
    blend.take(2)
    state = blend.state_dict()
    assert list(state["sources"]) == [first]
    again, beside = open_one(first), open_one(other)
    again.load_state_dict(state)
    assert again.take(1).sample.tolist() == [2]
    beside.load_state_dict(state)
    assert beside.take(1).sample.tolist() == [0]
    for changed in (open_one(first, template="gemma"), open_one(write_chats(tmp_path / "a.jsonl", ["yes"] * 8))):
        with pytest.raises(
            BadInput, match=r"a.jsonl is not what the checkpoint read there \(its rows, or the template"
        ):
            changed.load_state_dict(state)


def test_a_file_with_its_old_size_and_time_and_other_content_is_tokenised_anew(make_config, tmp_path):
    config = make_config(write_chats(tmp_path / "a.jsonl", ["yes"]))
    before, old = os.stat(tmp_path / "a.jsonl"), prepare_conversations(config).train[0].path
    write_chats(tmp_path / "a.jsonl", ["noo"])
    os.utime(tmp_path / "a.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))
    after = os.stat(tmp_path / "a.jsonl")
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert prepare_conversations(config).train[0].path != old


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".mask", ".meta.json", ".summary.json"])
def test_what_is_missing_in_the_cache_is_made_again(make_config, tmp_path, suffix):
    config = make_config(write_chats(tmp_path / "a.jsonl", ["yes"]))
    prefix = prepare_conversations(config).train[0].path
    os.remove(prefix + suffix)
    dataset = TokenDataset(prepare_conversations(config).train[0].path)
    assert 0 < dataset.read_mask(0, 0, dataset.num_tokens).sum() < dataset.num_tokens


@pytest.mark.parametrize("suffix", [".bin", ".mask"])
def test_damage_that_leaves_the_size_is_refused(make_config, tmp_path, suffix):
    config = make_config(write_chats(tmp_path / "a.jsonl", ["yes"]))
    prefix = prepare_conversations(config).train[0].path
    with open(prefix + suffix, "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last ^ 1]))
    with pytest.raises(
        BadInput, match=rf"^sft.cache: .*a\{suffix} has changed since .* delete {tmp_path}/cache/\w+, and"
    ):
        prepare_conversations(config)
    shutil.rmtree(os.path.dirname(prefix))
    assert prepare_conversations(config).train[0].path == prefix


def test_a_template_that_writes_the_date_does_not_tokenise_anew_each_day(make_config, tmp_path, monkeypatch):
    chatml = load_template("chatml", tmp_path).text
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + chatml)
    config = make_config(write_chats(tmp_path / "a.jsonl", ["yes"]), template=str(tmp_path / "dated.jinja"))
    today = prepare_conversations(config).train[0].path
    monkeypatch.setattr(cache, "load_template", lambda *args: replace(load_template(*args), now=datetime(2040, 1, 1)))
    assert prepare_conversations(config).train[0].path == today


def test_a_file_that_changes_while_it_is_read_is_refused(make_config, tmp_path, monkeypatch):
    path, tokenise = write_chats(tmp_path / "a.jsonl", ["yes"]), cache._tokenise

    def grow(*args):
        tokenise(*args)
        with open(path, "a") as stream:
            stream.write("{}\n")

    monkeypatch.setattr(cache, "_tokenise", grow)
    with pytest.raises(BadInput, match=r"^sft.train\[0\]: .*a.jsonl has changed while it was read"):
        prepare_conversations(make_config(path))
    assert not list((tmp_path / "cache").glob("*/a*")) and not list((tmp_path / "cache").glob(".*.making"))


def test_a_file_that_is_not_there_is_told_with_those_that_are(make_config, tmp_path):
    write_chats(tmp_path / "chats.jsonl", ["yes"])
    sentence = (
        rf"^sft.train\[0\].path: input .*chat.jsonl: no such file or directory; in {tmp_path} there is chats.jsonl"
    )
    with pytest.raises(BadInput, match=sentence):
        prepare_conversations(make_config(str(tmp_path / "chat.jsonl")))


def test_a_file_that_cannot_be_read_is_one_sentence(make_config, tmp_path):
    (tmp_path / "a.jsonl").symlink_to("/proc/self/mem")
    with pytest.raises(BadInput, match=r"^sft.train\[0\].path: .*a.jsonl cannot be read \("):
        prepare_conversations(make_config(str(tmp_path / "a.jsonl")))


def test_ranks_that_wait_for_the_cache_end_with_the_rank_that_makes_it(make_config, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n')
    config = make_config(str(tmp_path / "a.jsonl"))

    def fail_meanwhile(seconds):
        with pytest.raises(BadInput):
            prepare_conversations(config)

    monkeypatch.setattr(cache.time, "sleep", fail_meanwhile)
    reason = r"a.jsonl could not be tokenised by another rank: sft.train\[0\]: row 0 of "
    with pytest.raises(BadInput, match=reason):
        prepare_conversations(config, is_maker=False)
    now = time.monotonic()
    monkeypatch.setattr(cache.time, "sleep", lambda seconds: monkeypatch.setattr(time, "monotonic", lambda: now + 125))
    with pytest.raises(PeerLost, match=r"^sft.train\[0\]: the rank that tokenises .*a.jsonl .* for 120 seconds"):
        prepare_conversations(config, is_maker=False)


def test_two_sources_of_the_same_conversations_are_refused(make_config, tmp_path):
    paths = [write_chats(tmp_path / name, ["yes", "no"]) for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(BadInput, match=r"^sft.train\[1\]: .*b.jsonl holds the same conversations as .*a.jsonl"):
        prepare_conversations(make_config(*paths))

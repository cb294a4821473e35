"""Which checkpoints stay, which are set aside, whatever their numbers say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainer.checkpoint.layout import (
    apply_retention,
    checkpoint_name,
    checkpoints_dir,
    delete_rest,
    latest_checkpoint,
    name_best,
    publish,
    remove_leftovers,
    resolve_checkpoint,
    set_aside_after,
)


@pytest.fixture
def make(tmp_path):
    """Return a function that publishes a checkpoint of a step in the run directory `tmp_path`."""

    def make_checkpoint(step):
        partial = checkpoints_dir(tmp_path) / ".partial-new"
        partial.mkdir(parents=True)
        (partial / "checkpoint.json").write_text("{}")
        return publish(partial, step)

    return make_checkpoint


def retain(published, keep_last, keep_every):
    for doomed in apply_retention(published, keep_last, keep_every):
        delete_rest(doomed)


def names(run_dir):
    return sorted(path.name for path in checkpoints_dir(run_dir).iterdir() if not path.is_symlink())


def test_what_was_just_published_stays_beside_higher_numbers(make, tmp_path):
    for step in (20, 30):
        make(step)
    published = make(6)
    retain(published, 1, None)
    assert published.is_dir() and (checkpoints_dir(tmp_path) / "latest").resolve() == published.resolve()
    assert names(tmp_path) == [checkpoint_name(6), checkpoint_name(30)]


def test_a_link_that_a_kill_left_goes_with_the_next(make, tmp_path, monkeypatch):
    make(10)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("os.getpid", lambda: 1)
        patched.setattr("pathlib.Path.symlink_to", killed_after(Path.symlink_to))
        make(20)
    assert latest_checkpoint(tmp_path).name == checkpoint_name(10)
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in checkpoints_dir(tmp_path).iterdir() if path.is_symlink()) == ["latest"]
    make(30)
    assert sorted(path.name for path in checkpoints_dir(tmp_path).iterdir() if path.is_symlink()) == ["latest"]


def test_a_kill_between_the_two_renamings_loses_no_checkpoint(make, tmp_path, monkeypatch):
    """It is whole, under its name, and where the run goes on: else it would be set aside as given up."""
    make(10)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("os.replace", killed_after(os.replace))
        make(20)
    assert latest_checkpoint(tmp_path).name == checkpoint_name(20)
    remove_leftovers(tmp_path)
    links = {path.name: path.readlink().name for path in checkpoints_dir(tmp_path).iterdir() if path.is_symlink()}
    assert links == {"latest": checkpoint_name(20)}


def killed_after(call):
    def call_and_die(*args):
        call(*args)
        raise KeyboardInterrupt

    return call_and_die


def test_what_latest_names_stays(make, tmp_path):
    older, newest = make(10), make(20)
    latest = checkpoints_dir(tmp_path) / "latest"
    latest.unlink()
    latest.symlink_to(older.name)
    retain(newest, 1, None)
    assert names(tmp_path) == [older.name, newest.name]


def test_what_best_names_stays_until_another_is_better(make, tmp_path):
    best = make(10)
    name_best(tmp_path, 10)
    for step in (20, 30):
        published = make(step)
        retain(published, 1, None)
    assert names(tmp_path) == [checkpoint_name(10), checkpoint_name(30)]
    assert resolve_checkpoint(checkpoints_dir(tmp_path) / "best") == best.resolve()
    name_best(tmp_path, 30)
    retain(published, 1, None)
    assert names(tmp_path) == [checkpoint_name(30)]
    name_best(tmp_path, 10)  # which is gone
    assert not (checkpoints_dir(tmp_path) / "best").is_symlink()


def test_retention_keeps_the_newest_and_every_nth(make, tmp_path):
    for step in (10, 20, 30, 40):
        published = make(step)
    retain(published, 1, 20)
    assert names(tmp_path) == [checkpoint_name(step) for step in (20, 40)]


def test_a_checkpoint_set_aside_twice_is_there_twice(make, tmp_path):
    for content in "ab":
        (make(20) / "content").write_text(content)
        make(5)
        set_aside_after(tmp_path, 5)
    aside = [path for path in checkpoints_dir(tmp_path).iterdir() if path.name.startswith("abandoned_")]
    assert sorted((path / "content").read_text() for path in aside) == ["a", "b"]

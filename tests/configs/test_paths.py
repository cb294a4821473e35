"""Typed paths: what is expanded, what can be none, what may not be entered; for every path field of every stage."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from configs.errors import BadInput
from configs.fields import path_values, schema_fields
from configs.load import load_config
from configs.paths import clean_path, find_access_problem, find_special_file
from configs.rules.paths import check_paths
from configs.stages import STAGE_CONFIGS

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "models" / "tiny.yaml")
NOBODY = 65534


def overrides_of_all_paths(value: str) -> list[str]:
    """Return overrides that set every path field of a config, one each."""
    fields = [field for field in schema_fields(STAGE_CONFIGS["pretrain"]) if field.path_kind is not None]
    names = [field.path for field in fields]
    assert {"run.dir", "data.tokenizer", "checkpoint.resume", "checkpoint.init_from_hf"} <= set(names)
    lists = [f"data.{name}=[{{path: {value}}}]" for name in ("train", "validation")]
    return [f"{name}={value}" for name in names] + lists


def test_home_directories_are_expanded_in_every_path_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/a/home")
    for override in overrides_of_all_paths("~/x"):
        values = [path for _, path, _ in path_values(load_config(TINY, ["train.num_steps=0", override]))]
        assert "/a/home/x" in values, override
    assert clean_path("a/~/b") == "a/~/b" and clean_path("./~x") == "./~x"
    assert clean_path(f"~{'root'}/x").endswith("/x") and not clean_path(f"~{'root'}/x").startswith("~")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("'  '", "is empty"),
        ('"a\\0b"', "holds a NUL character"),
        ("x" * 256, "has a name of 256 bytes, and file systems take 255 at most"),
        ("é" * 128, "has a name of 256 bytes"),
        ("abc/" * 1100, "a path has 4095 at most"),
        ("~nobody-of-that-name/x", "there is no such user"),
    ],
)
def test_text_that_can_be_no_path_is_one_sentence_for_every_field(value: str, words: str) -> None:
    for override in overrides_of_all_paths(value):
        field = override.partition("=")[0]
        with pytest.raises(BadInput) as refused:
            load_config(TINY, ["train.num_steps=0", override])
        sentence = str(refused.value)
        assert sentence.startswith(field) and words in sentence and "; a value that would work: " in sentence
        assert "\n" not in sentence and len(sentence) < 300


@pytest.mark.parametrize(
    "override",
    [r'run.name="\ud83d"', r'run.name="\ude00 x"', "run.name=\udcff", r'sample.prompts=["\ud83d"]', "run.dir=\udcff/x"],
)
def test_half_a_character_is_one_sentence_wherever_it_stands(tmp_path: Path, override: str) -> None:
    with pytest.raises(BadInput) as refused:
        load_config(TINY, ["train.num_steps=0", override])
    assert "half a character" in str(refused.value) and "\n" not in str(refused.value)
    field, _, value = override.partition("=")
    section, name = field.split(".")
    file = tmp_path / "a.yaml"
    file.write_text(f"base: {TINY}\n{section}:\n  {name}: {value}\n", encoding="utf-8", errors="surrogateescape")
    with pytest.raises(BadInput) as refused:
        load_config(str(file), ["train.num_steps=0"])
    assert "a.yaml" in str(refused.value)


def test_jsons_escape_of_an_emoji_is_the_emoji(tmp_path: Path) -> None:
    assert load_config(TINY, ["train.num_steps=0", r'run.name="\ud83d\ude00"']).run.name == "\N{GRINNING FACE}"
    file = tmp_path / "config.json"
    file.write_text(f'{{"base": "{TINY}", "run": {{"name": "\\ud83d\\ude00"}}, "train": {{"num_steps": 0}}}}')
    assert load_config(str(file)).run.name == "\N{GRINNING FACE}"


def test_the_configs_own_path_is_cleaned_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text(f"base: {TINY}\ntrain: {{num_steps: 0}}\n")
    (tmp_path / "b.yaml").write_text("base: ~/a.yaml\n")
    assert load_config("~/b.yaml").train.num_steps == 0
    with pytest.raises(BadInput, match="the path of the config .* has a name of 300 bytes"):
        load_config("x" * 300)


@pytest.mark.parametrize("name", ["../../x", "..", ".", "/etc/x", "a/../../x", "x" * 256])
def test_a_runs_name_makes_no_directory_outside_runs(name: str) -> None:
    with pytest.raises(BadInput, match=r"^run\.name: .*; a value that would work: run"):
        load_config(TINY, ["train.num_steps=0", f"run.name={name}"])
    assert load_config(TINY, ["train.num_steps=0", f"run.name={name}", "run.dir=elsewhere"]).run.dir == "elsewhere"


def test_a_runs_name_may_have_folders_below_runs() -> None:
    assert load_config(TINY, ["train.num_steps=0", "run.name=team/first"]).run.dir == "runs/team/first"


AS_NOBODY = """
import os, sys
from configs.load import load_config
from configs.rules.paths import check_paths

config = load_config(sys.argv[1], sys.argv[2:])
os.setgid({nobody}); os.setuid({nobody})
print("\\n".join(check_paths(config)))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user whom a directory is closed to")
def test_what_this_user_may_not_enter_or_read_is_named(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    (closed / "inner").mkdir(parents=True)
    closed.chmod(0o700)
    own = [parent for parent in tmp_path.parents if parent.is_relative_to(Path(tempfile.gettempdir()).resolve())][:-1]
    for parent in (tmp_path, *own):  # pytest's, which it closes to others
        parent.chmod(parent.stat().st_mode | 0o011)
    (tmp_path / "data.bin").write_bytes(b"")
    (tmp_path / "data.bin").chmod(0o600)
    overrides = [
        "train.num_steps=0",
        f"data.tokenizer={closed}/inner",
        f"checkpoint.init_from={closed}",
        f"data.train=[{{path: {tmp_path}/data}}, {{path: {tmp_path}/nowhere}}]",
    ]
    code = AS_NOBODY.replace("{nobody}", str(NOBODY))
    done = subprocess.run([sys.executable, "-c", code, TINY, *overrides], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"data.tokenizer: {closed} may not be entered by this user; give it the permissions, or name another path",
        f"data.train[0].path: {tmp_path}/data.bin may not be read by this user; give it the permissions, or name "
        "another path",
        f"checkpoint.init_from: {closed} may not be read by this user; give it the permissions, or name another path",
    ]
    assert list(check_paths(load_config(TINY, overrides))) == [], "root may"


def test_a_link_that_leads_to_itself_is_named(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert "cannot be looked at" in str(find_access_problem(str(tmp_path / "loop")))
    assert find_access_problem(str(tmp_path / "nowhere" / "x")) is None


def test_what_is_neither_a_file_nor_a_directory_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "socket"))
    (tmp_path / "link").symlink_to("pipe")
    kinds = {"pipe": "a pipe", "link": "a pipe", "socket": "a socket", "/dev/null": "a device", "no": None, ".": None}
    assert {name: find_special_file(str(tmp_path / name)) for name in kinds} == kinds
    with pytest.raises(BadInput, match="/dev/null is a device, and every rank reads the config"):
        load_config("/dev/null")
    (tmp_path / "run.yaml").write_text("base: /dev/null\n")
    with pytest.raises(BadInput, match="/dev/null, which .*run.yaml names as its base, is a device"):
        load_config(str(tmp_path / "run.yaml"))

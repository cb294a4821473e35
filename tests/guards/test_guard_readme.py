"""What README, CONTRIBUTING and the Makefile tell people to type exists: paths, targets, options, fields."""

import re

import pytest
from pydantic import BaseModel

from configs.stages import Config

PATH = re.compile(r"(?<![\w/.-])((?:configs|parallel|trainer|launch|tools|tests|\.ci)/[\w./-]*)(?![\w<*{$])")
MAKE = re.compile(r"\bmake ([a-z][a-z-]*)")
FIELD = re.compile(r"(?<![\w./])((?:" + "|".join(Config.model_fields) + r")(?:\.[a-z_]\w*)+)=")
OPTION = re.compile(r"(?<=\s)--[a-z][a-z-]*")
TORCHRUN_OPTIONS = {"--nproc-per-node", "--nnodes", "--node-rank", "--rdzv-backend", "--rdzv-endpoint", "--standalone"}


@pytest.fixture(scope="module", params=["README.md", "CONTRIBUTING.md"])
def document(request, root):
    path = root / request.param
    assert path.is_file(), f"{request.param} is missing"
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def readme(root):
    return (root / "README.md").read_text(encoding="utf-8")


def code_of(text):
    """Return the fenced blocks and inline code of a Markdown text, lines continued by a backslash joined."""
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.S | re.M)
    rest = re.sub(r"^```[^\n]*\n.*?^```", "", text, flags=re.S | re.M)
    return re.sub(r"\\\n\s*", "", "\n".join([*fenced, *re.findall(r"`([^`\n]+)`", rest)]))


def test_paths_exist(document, root):
    paths = {match.rstrip(".") for match in PATH.findall(code_of(document))}
    assert len(paths) >= 5
    assert not (missing := sorted(path for path in paths if not (root / path).exists())), missing


def test_links_lead_somewhere(document, root):
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", document) if "://" not in link]
    assert not (missing := [link for link in links if link and not (root / link).exists()]), missing


def test_make_targets_exist(document, root):
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), flags=re.M))
    named = set(MAKE.findall(code_of(document)))
    assert {"test"} <= named and {"help", "setup", "pretrain", "test", "test-fast", "bench"} <= targets
    assert not named - targets, named - targets


def test_options_exist_in_the_command_they_follow(readme, root):
    commands = [line for line in code_of(readme).splitlines() if re.search(r"(?:launch|tools)/\w+\.py", line)]
    assert any("launch/pretrain.py" in line for line in commands)
    for line in commands:
        script = re.findall(r"(?:launch|tools)/[\w/]+\.py", line)[-1]
        before, after = line.split(script, 1)
        source = (root / ("launch/cli.py" if script.startswith("launch/") else script)).read_text(encoding="utf-8")
        unknown = {option for option in OPTION.findall(after) if f'"{option}"' not in source}
        assert not unknown, f"{line}: {unknown}"
        assert set(OPTION.findall(before)) <= TORCHRUN_OPTIONS, line


def test_overrides_name_fields_that_exist(readme):
    fields = {field for field in FIELD.findall(code_of(readme))}
    assert fields
    for dotted in fields:
        section: type[BaseModel] = Config
        *parents, leaf = dotted.split(".")
        for name in parents:
            annotation = section.model_fields[name].annotation
            choices = [annotation, *getattr(annotation, "__args__", ())]
            section = next(one for one in choices if isinstance(one, type) and issubclass(one, BaseModel))
        assert leaf in section.model_fields, f"{dotted}: no such field"


def test_what_the_makefile_runs_exists(root):
    paths = set(PATH.findall((root / "Makefile").read_text()))
    assert {"launch/pretrain.py", "tools/prepare_corpus.py", "configs/demo/pretrain.yaml"} <= paths
    assert not (missing := sorted(path for path in paths if not (root / path).exists())), missing


def test_ci_runs_the_documented_commands(root, readme):
    commands = re.findall(r"^make [a-z-]+", (root / ".ci" / "run").read_text(), flags=re.M)
    assert {"make test", "make lint"} <= set(commands)
    assert not [command for command in commands if command not in readme]

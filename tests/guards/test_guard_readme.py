"""What the READMEs, CONTRIBUTING and the Makefile tell people to type exists: paths, targets, options, fields, links.

Each package has a README, and what a reader looks up there is listed in it: folders, commands, sections, exit codes.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import BaseModel

from configs.errors import ExitCode
from configs.sections.cluster import ClusterConfig
from configs.stages import STAGE_CONFIGS

PACKAGES = ("configs", "parallel", "trainer", "launch", "tools")
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(f"{package}/README.md" for package in PACKAGES)]
MAX_README_LINES = 250

SECTIONS = {name for schema in STAGE_CONFIGS.values() for name in schema.model_fields}
PATH = re.compile(r"(?<![\w/.-])((?:configs|parallel|trainer|launch|tools|tests|\.ci)/[\w./-]*)(?![\w<*{$])")
MAKE = re.compile(r"\bmake ([a-z][a-z-]*)")
DOTTED = r"(?:" + "|".join(sorted(SECTIONS)) + r")(?:\.[a-z_]\w*)+"
OVERRIDE = re.compile(rf"(?<![\w./])({DOTTED})=")
FIELD = re.compile(rf"`({DOTTED})`")
FILE_NAME = re.compile(r"\.(?:json|py|yaml)$")
OPTION = re.compile(r"(?<=\s)--[a-z][a-z-]*")
SCRIPT = re.compile(r"(?:launch|tools)/[\w/]+\.py")
TORCHRUN_OPTIONS = {"--nproc-per-node", "--nnodes", "--node-rank", "--rdzv-backend", "--rdzv-endpoint", "--standalone"}
# Of other programs, and so of no source of ours.
FOREIGN_OPTIONS = {"--ckpt-format", "--local-dir", "--python", "--no-build-isolation", "--config-settings"}


@dataclass(frozen=True)
class Document:
    """A Markdown file; paths in its code count from the repository's root, links from its own folder."""

    name: str
    folder: Path
    text: str

    @property
    def code(self):
        return code_of(self.text)


def read_document(root, name):
    path = root / name
    assert path.is_file(), f"{name} is missing"
    return Document(name, path.parent, path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=DOCUMENTS)
def document(request, root):
    return read_document(root, request.param)


@pytest.fixture(scope="module")
def readme(root):
    return read_document(root, "README.md")


def code_of(text):
    """Return the fenced blocks and inline code of a Markdown text, lines continued by a backslash joined."""
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.S | re.M)
    rest = re.sub(r"^```[^\n]*\n.*?^```", "", text, flags=re.S | re.M)
    return re.sub(r"\\\n\s*", "", "\n".join([*fenced, *re.findall(r"`([^`\n]+)`", rest)]))


def find_field(dotted):
    """Return whether a stage's config has the field, in whatever section of a section."""
    for schema in STAGE_CONFIGS.values():
        section: type[BaseModel] | None = schema
        *parents, leaf = dotted.split(".")
        for name in parents:
            field = section.model_fields.get(name) if section is not None else None
            choices = [field.annotation, *getattr(field.annotation, "__args__", ())] if field is not None else []
            section = next((one for one in choices if isinstance(one, type) and issubclass(one, BaseModel)), None)
        if section is not None and leaf in section.model_fields:
            return True
    return False


def options_in(root, script):
    """Return the text in which the options of a command stand."""
    cli = {"launch/slurm.py": "launch/slurm_cli.py"}.get(script, "launch/cli.py")
    return (root / (cli if script.startswith("launch/") else script)).read_text(encoding="utf-8")


def test_paths_exist(document, root):
    paths = {match.rstrip(".") for match in PATH.findall(document.code)}
    assert len(paths) >= 5
    assert not (missing := sorted(path for path in paths if not (root / path).exists())), missing


def test_links_lead_somewhere(document):
    links = [link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", document.text) if "://" not in link]
    assert not (missing := [file for file, _, _ in links if not (document.folder / file).exists()]), missing
    for file, _, anchor in links:
        if anchor:
            text = (document.folder / file).read_text(encoding="utf-8") if file else document.text
            headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
            assert anchor in {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings}, anchor


def test_make_targets_exist(document, root):
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), flags=re.M))
    assert {"help", "setup", "pretrain", "test", "test-fast", "bench"} <= targets
    named = set(MAKE.findall(document.code))
    assert "test" in named or document.name not in ("README.md", "CONTRIBUTING.md")
    assert not named - targets, named - targets


def test_options_exist_in_the_command_they_follow(document, root):
    commands = [line.split(" #")[0] for line in document.code.splitlines() if SCRIPT.search(line)]
    has_commands = any(line.startswith(("python", "torchrun")) for line in commands)
    assert has_commands or document.name not in ("README.md", "launch/README.md", "tools/README.md")
    for line in commands:
        script = SCRIPT.findall(line)[-1]
        if not (root / script).is_file():
            continue  # test_paths_exist says so
        before, after = line.split(script, 1)
        source = options_in(root, script)
        unknown = {option for option in OPTION.findall(after) if f'"{option}"' not in source}
        assert not unknown, f"{line}: {unknown}"
        assert set(OPTION.findall(before)) <= TORCHRUN_OPTIONS, line


def test_options_named_alone_exist_somewhere(document, root):
    """An option in the running text may belong to any command; it must not belong to none."""
    sources = [options_in(root, script) for script in ("launch/pretrain.py", "launch/slurm.py")]
    sources += [path.read_text(encoding="utf-8") for path in (root / "tools").rglob("*.py")]
    options = set(re.findall(r"`(--[a-z][a-z-]*)", document.text)) - FOREIGN_OPTIONS
    assert not (unknown := {one for one in options if not any(f'"{one}"' in source for source in sources)}), unknown


def test_fields_exist(document):
    fields = set(OVERRIDE.findall(document.code)) | set(FIELD.findall(document.text))
    fields = {field for field in fields if not FILE_NAME.search(field)}
    assert fields or document.name in ("CONTRIBUTING.md", "tools/README.md")
    assert not (unknown := sorted(field for field in fields if not find_field(field))), unknown


def test_the_patterns_find_what_they_look_for():
    assert find_field("train.num_steps") and find_field("model.moe.num_experts") and find_field("precision.fp8.recipe")
    assert not find_field("train.steps") and not find_field("trian.num_steps") and not find_field("run.name.x")
    text = "`train.steps` and `checkpoint.json`\n```\nx.py model.rope.base=1 \\\n  --flag\n```\n"
    assert FIELD.findall(text) == ["train.steps", "checkpoint.json"]
    assert OVERRIDE.findall(code_of(text)) == ["model.rope.base"] and OPTION.findall(code_of(text)) == ["--flag"]


def test_readme_is_short(readme):
    assert len(readme.text.splitlines()) <= MAX_README_LINES, "move the reference into a package's README"


def test_readme_leads_to_every_package_and_folder_of_trainer(readme, root):
    assert not (missing := [name for name in PACKAGES if f"({name}/README.md)" not in readme.text]), missing
    folders = [path.parent.name for path in (root / "trainer").glob("*/__init__.py")]
    assert len(folders) > 10
    assert not (missing := [name for name in folders if f"`trainer/{name}/`" not in readme.text]), missing


def test_the_picture_of_trainer_has_the_levels_of_the_import_guard(root):
    tree = ast.parse((root / "tests/guards/test_guard_imports.py").read_text(encoding="utf-8"))
    levels = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TRAINER_LEVELS"
    )
    text = read_document(root, "trainer/README.md").text
    rows = {name: int(level) for level, name in re.findall(r"^\| (\d) \| `(\w+)` \|", text, flags=re.M)}
    assert rows == levels
    boxes = re.findall(r'subgraph L\d\["(\d)"\]\n\s+([\w; ]+)\n', text)
    assert {name: int(level) for level, names in boxes for name in names.split("; ")} == levels


def test_readmes_list_what_is_looked_up_there(root):
    def lacking(package, names):
        text = read_document(root, f"{package}/README.md").text
        assert names
        return [f"{package}/README.md: {name}" for name in names if name not in text]

    commands = [
        path.relative_to(root).as_posix()
        for path in (root / "tools").rglob("*.py")
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    ]
    configs = [path.relative_to(root).as_posix() for path in (root / "configs/plan").glob("*.py")]
    parallel = [path.relative_to(root).as_posix() for path in (root / "parallel").glob("*.py")]
    missing = [
        *lacking("tools", [f"| `{name}` |" for name in commands]),
        *lacking("configs", [f"`{name}`" for name in configs if "__init__" not in name]),
        *lacking("configs", [f"`{name}`" for name in SECTIONS]),
        *lacking("parallel", [f"`{name}`" for name in parallel if "__init__" not in name]),
        *lacking("launch", [f"| {code.value} |" for code in ExitCode]),
        *lacking("launch", [f"launch/{stage}.py" for stage in STAGE_CONFIGS]),
        *lacking("launch", [f"`{field}`" for field in ClusterConfig.model_fields]),
    ]
    assert not missing, "\n".join(missing)


def test_what_the_makefile_runs_exists(root):
    paths = set(PATH.findall((root / "Makefile").read_text()))
    assert {"launch/pretrain.py", "tools/prepare_corpus.py", "configs/demo/pretrain.yaml"} <= paths
    assert not (missing := sorted(path for path in paths if not (root / path).exists())), missing


def test_ci_runs_the_documented_commands(root, readme):
    commands = re.findall(r"^make [a-z-]+", (root / ".ci" / "run").read_text(), flags=re.M)
    assert {"make test", "make lint"} <= set(commands)
    assert not [command for command in commands if command not in readme.text]

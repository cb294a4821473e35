"""Nothing in the repository ties it to one machine or one package registry."""

import re
import tomllib

# Written in pieces so that this file does not find itself.
MACHINE_PATH = re.compile(
    r"(?<![\w.$}*-])/(?:"
    + "|".join(["ro" + "ot", "ho" + r"me/\w+", "wo" + "rk", "Us" + r"ers/\w+", "t" + "mp"])
    + r")/\w"
)
REGISTRY = re.compile(
    "|".join(
        [
            "py" + r"pi\.org",
            "python" + "hosted",
            "download" + r"\.pytorch",
            "index" + "-url",
            "find" + "-links",
            r"/sim" + "ple/",
        ]
    )
)
PIN = re.compile(r"^[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+(  # .+)?$")


def lines_of_text_files(files):
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            yield path, number, line


def test_no_machine_path_and_no_registry_address(project_files, root):
    wrong, seen = [], 0
    for path, number, line in lines_of_text_files(project_files):
        seen += 1
        if MACHINE_PATH.search(line) or REGISTRY.search(line):
            wrong.append(f"{path.relative_to(root)}:{number}: {line.strip()[:120]}")
    assert seen > 1000
    assert not wrong, "\n".join(wrong)


def test_the_patterns_find_what_they_look_for():
    assert MACHINE_PATH.search("see /wo" + "rk/shared/x") and MACHINE_PATH.search('"/ho' + 'me/me/data"')
    assert not MACHINE_PATH.search("data/wo" + "rk/shared") and not MACHINE_PATH.search("/usr/bin/python3")
    assert REGISTRY.search("pip install --index" + "-url=x")


def test_constraints_are_exact_versions_and_cover_every_dependency(root):
    lines = (root / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert len(pins) > 30
    assert not [line for line in pins if not PIN.match(line)]
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in pins}
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    direct = project["dependencies"] + extras["dev"] + extras["rewards"]
    assert len(direct) > 10
    names = {re.match(r"[\w.-]+", requirement).group().lower() for requirement in direct}
    assert names <= pinned, f"not pinned: {names - pinned}"


def test_no_dependency_that_must_never_be_listed(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    listed = project["dependencies"] + [one for extra in project["optional-dependencies"].values() for one in extra]
    listed += [line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    names = {re.match(r"[\w.-]+(\[[^\]]*\])?", one).group().lower() for one in listed}
    assert "megatron-core" in names
    assert not names & {"apex", "hydra", "hydra-core", "submitit", "megatron-core[dev]"}

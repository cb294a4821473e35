"""Imports go one way, commands start without torch, and what is called torch-free is."""

import subprocess
import sys

ALLOWED = {
    "configs": {"configs"},
    "parallel": {"configs", "parallel"},
    "trainer": {"configs", "parallel", "trainer"},
    "launch": {"configs", "parallel", "trainer", "launch"},
    "tools": {"configs", "parallel", "trainer", "tools"},
}

# The order inside trainer: a folder may import its own level and those below, and every folder is listed.
TRAINER_LEVELS = {
    "disk": 0, "losses": 0, "environments": 0, "data": 0, "model": 0, "optim": 0,
    "engine": 1, "generate": 2, "report": 2, "evaluate": 2, "rl": 3, "stages": 4, "rehearse": 5, "checkpoint": 5,
    "hf": 6, "run": 7,
}  # fmt: skip
STRANGERS = {"losses", "environments", "data", "model", "optim"}
SLOW_TO_IMPORT = {"torch", "megatron", "trainer", "transformers", "tensorboard"}

IMPORT_WITHOUT_TORCH = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "megatron", "transformers", "trainer"):
            raise ImportError(f"{name} must not be imported here")

sys.meta_path.insert(0, Refuse())
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        sys.exit(f"{name}: {error}")
"""


def part_of_trainer(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_packages_import_one_way(product_files):
    wrong, seen = [], 0
    for file in product_files:
        for one in file.imports:
            target = one.module.split(".")[0]
            if target in ALLOWED:
                seen += 1
                if target not in ALLOWED[file.package]:
                    wrong.append(f"{file.name}:{one.line} imports {one.module}")
    assert seen > 50
    assert not wrong, "against configs <- parallel <- trainer <- launch | tools:\n" + "\n".join(wrong)


def test_every_folder_of_trainer_has_a_level_and_nothing_lies_loose(product_files):
    parts = {part_of_trainer(file.module) for file in product_files if file.package == "trainer"} - {""}
    loose = [file.name for file in product_files if file.name.count("/") == 1 and file.name.startswith("trainer/")]
    assert loose == ["trainer/__init__.py"]
    assert parts == TRAINER_LEVELS.keys(), "list the folder in TRAINER_LEVELS: at which level may it be imported?"


def test_trainer_imports_in_its_inner_order(product_files):
    wrong, seen = [], 0
    for file in (file for file in product_files if file.package == "trainer"):
        source = part_of_trainer(file.module)
        for one in (one for one in file.imports if one.module.startswith("trainer.")):
            target = part_of_trainer(one.module)
            seen += 1
            if source != target and {source, target} <= STRANGERS:
                wrong.append(f"{file.name}:{one.line}: {source} and {target} are strangers to each other")
            if TRAINER_LEVELS[target] > TRAINER_LEVELS[source]:
                wrong.append(f"{file.name}:{one.line}: {source} comes before {target}")
    assert seen > 20
    assert not wrong, "\n".join(wrong)


def test_commands_import_slow_packages_only_inside_functions(product_files):
    commands = [file for file in product_files if file.package in ("launch", "tools")]
    assert len(commands) > 8
    wrong = [
        f"{file.name}:{one.line} imports {one.module}"
        for file in commands
        for one in file.imports
        if one.module.split(".")[0] in SLOW_TO_IMPORT and not one.in_function and not one.for_types_only
    ]
    assert not wrong, "--help would take seconds:\n" + "\n".join(wrong)


def test_torch_free_modules_import_where_torch_cannot_be(product_files, root):
    free = [file.module for file in product_files if file.package in ("configs", "launch", "tools")]
    free += ["parallel.topology", "parallel.environment", "parallel.launcher_variables", "parallel.platform"]
    assert {"configs.rules.check", "launch.main", "tools.compare_runs"} <= set(free)
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT_TORCH, *free], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr

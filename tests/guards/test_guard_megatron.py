"""Each entry point of megatron-core has one caller of ours, so that an upgrade has a reading list."""

import ast
import re

import pytest

# The benchmark's bare loop is megatron-core without us, so it calls the entry points itself.
EXEMPT = "tools/bench/"


@pytest.mark.parametrize(
    ("module", "home"),
    [
        (r"megatron\.core(\.parallel_state)\b", r"parallel/mesh\.py"),
        (r"megatron\.core\.pipeline_parallel(\.schedules|\.get_forward_backward_func)\b", r"parallel/schedule\.py"),
        (r"megatron\.core\.models\.gpt(\.gpt_model)?\.GPTModel\b", r"trainer/model/build\.py"),
        (r"megatron\.core\.dist_checkpointing(?!\.mapping|\.dict_utils)\b", r"trainer/checkpoint/\w+\.py"),
        # the words in which models, optimizers and converters say which shard they hold
        (
            r"megatron\.core\.dist_checkpointing\.(mapping|dict_utils)\b",
            r"trainer/(checkpoint/\w+|engine/(fp8_history|optimizer_state|sharded_state)|hf/shards)\.py",
        ),
        (r"megatron\.core\.distributed\.\w*DistributedDataParallel\b", r"parallel/replicate\.py"),
    ],
)
def test_one_caller_each(product_files, module, home):
    users = [
        f"{file.name}:{one.line}"
        for file in product_files
        for one in file.imports
        if re.match(module, one.module) and not one.for_types_only and not file.name.startswith(EXEMPT)
    ]
    assert any(re.match(home, user) for user in users), f"nobody in {home} imports {module}"
    assert not [user for user in users if not re.match(home, user)], f"{module} belongs to {home} alone: {users}"


def replaced_names(tree):
    """Yield the line of every assignment to an attribute of something imported from megatron, or to its `vars`."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import)]
    names = {
        alias.asname or alias.name.split(".")[0]
        for node in imports
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).split(".")[0] == "megatron"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in names:
                yield node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("vars", "setattr"):
            if node.args and ast.unparse(node.args[0]).split(".")[0] in names:
                yield node.lineno


def test_names_of_megatron_are_replaced_in_tables_alone(product_files):
    bad = (
        "from megatron.core import a\nimport megatron.core.b as c\na.x = 1\nvars(c)\nsetattr(a.d, 'e', 2)\nself.a = a.x"
    )
    assert list(replaced_names(ast.parse(bad))) == [3, 4, 5]
    wrong = [f"{file.name}:{line}" for file in product_files for line in replaced_names(file.tree)]
    assert not wrong, f"put it into trainer/engine/kernels.py: {wrong}"

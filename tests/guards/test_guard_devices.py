"""No device is named outside parallel/platform/."""

import ast

NAMES = ("cuda", "nccl", "gloo")
HOME = "parallel/platform/"


def device_mentions(tree):
    """Yield (line, text) of device names in code; a `Literal[...]` that lists the platforms chooses none."""
    annotations = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("Literal")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in annotations:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.lower().split(":")[0] in NAMES:
                yield node.lineno, repr(node.value)
        elif isinstance(node, ast.Attribute) and node.attr in NAMES:
            yield node.lineno, ast.unparse(node)


def test_the_guard_sees_what_it_looks_for():
    code = "torch.cuda.synchronize(); x = 'cuda:0'; t.cuda(); init('nccl')\ny: Literal['cpu', 'cuda']\n'a gloo world'"
    assert [line for line, _ in device_mentions(ast.parse(code))] == [1, 1, 1, 1]


def test_devices_are_named_only_by_the_platforms(product_files):
    inside = [file for file in product_files if file.name.startswith(HOME)]
    assert any(list(device_mentions(file.tree)) for file in inside)
    wrong = [
        f"{file.name}:{line}: {text}"
        for file in product_files
        if not file.name.startswith(HOME)
        for line, text in device_mentions(file.tree)
    ]
    assert not wrong, f"ask the platform instead ({HOME}):\n" + "\n".join(wrong)

"""Files and functions stay short, say what they are, and are named for what they own."""

import ast
import re

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_DOCSTRING_LINES = 5
BANNED_FILES = {"utils", "util", "misc", "common", "helpers", "helper"}
BANNED_CLASS = re.compile(r"(Manager|Handler|Helper)$")


def functions(file):
    return [node for node in ast.walk(file.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_files_are_short(product_files, test_files):
    long = [f"{file.name}: {len(file.text.splitlines())}" for file in product_files + test_files]
    long = [line for line in long if int(line.rsplit(" ", 1)[1]) > MAX_FILE_LINES]
    assert not long, f"over {MAX_FILE_LINES} lines:\n" + "\n".join(long)


def test_functions_are_short(product_files, test_files):
    sizes = [
        (f"{file.name}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1)
        for file in product_files + test_files
        for node in functions(file)
    ]
    assert len(sizes) > 200
    long = [f"{name}: {size}" for name, size in sizes if size > MAX_FUNCTION_LINES]
    assert not long, f"over {MAX_FUNCTION_LINES} lines:\n" + "\n".join(long)


def test_every_file_begins_by_saying_what_it_owns(product_files, test_files):
    wrong = []
    for file in product_files + test_files:
        if file.path.name == "__init__.py" and not file.text.strip():
            continue
        lines = [line for line in (ast.get_docstring(file.tree) or "").splitlines() if line.strip()]
        if not 1 <= len(lines) <= MAX_DOCSTRING_LINES:
            wrong.append(f"{file.name}: {len(lines)} lines")
    assert not wrong, f"one to {MAX_DOCSTRING_LINES} lines wanted:\n" + "\n".join(wrong)


def test_every_command_says_how_to_run_it(product_files):
    commands = [file for file in product_files if '__name__ == "__main__"' in file.text]
    assert len(commands) > 4
    wrong = [
        file.name
        for file in commands
        if file.path.name not in (text := ast.get_docstring(file.tree) or "") and file.module not in text
    ]
    assert not wrong, "the docstring lacks the line to run: " + ", ".join(wrong)


def test_public_functions_have_a_docstring(product_files):
    public = [
        (file, node)
        for file in product_files
        for node in file.tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    assert len(public) > 50
    wrong = [f"{file.name}:{node.lineno} {node.name}" for file, node in public if not ast.get_docstring(node)]
    assert not wrong, "\n".join(wrong)


def test_names_say_what_is_owned(product_files, test_files):
    files = [
        file.name
        for file in product_files + test_files
        if BANNED_FILES & {part.removesuffix(".py") for part in file.name.split("/")}
    ]
    classes = [
        f"{file.name}:{node.lineno} {node.name}"
        for file in product_files
        for node in ast.walk(file.tree)
        if isinstance(node, ast.ClassDef) and BANNED_CLASS.search(node.name)
    ]
    assert not files + classes, "\n".join(files + classes)


def test_tests_are_no_package_and_have_names_of_their_own(test_files):
    assert not [file.name for file in test_files if file.path.name == "__init__.py"]
    names = [file.path.name for file in test_files if file.path.name.startswith("test_")]
    assert len(names) > 10
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)

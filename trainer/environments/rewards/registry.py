"""Reward functions by name or `module:function`, with their options converted to the types of their parameters.

Runs in the worker processes alone: what a function imports is never imported by the trainer. They start in a fraction
of a second, so pydantic is imported only where there are options to convert.
"""

from __future__ import annotations

import importlib
import inspect
import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import BadInput, in_one_line

_HOME = "trainer.environments.rewards"
BUILT_IN: Mapping[str, str] = {
    "exact_match": f"{_HOME}.exact:exact_match",
    "numeric": f"{_HOME}.numeric:numeric",
    "math": f"{_HOME}.mathematics:equal_mathematics",
    "regex": f"{_HOME}.patterns:regex",
    "format": f"{_HOME}.patterns:tags",
    "json": f"{_HOME}.json_form:valid_json",
    "length": f"{_HOME}.overlong:length",
    "code": f"{_HOME}.unit_tests:passes_tests",
    "reasoning_gym": f"{_HOME}.gym:gym_score",
    "small_tasks": f"{_HOME}.small_answers:right_small_answer",
}
_OF_OTHERS = ("completions", "solution_str")
"""Parameters that rewards of TRL and verl have."""
_PACKAGES = {"math_verify": "math-verify[antlr4_13_2]", "reasoning_gym": "reasoning-gym"}


@dataclass(frozen=True)
class LoadedReward:
    """A function that is imported, and the options it is called with."""

    function: Callable[..., Any]
    options: Mapping[str, Any]
    column: str | None
    """The column that it reads: the value of its parameter of that name; None where it has none."""
    seconds: float | None
    """What it may take by its own parameter of that name; None where it has none."""


def load_reward(name: str, options: Mapping[str, Any], place: str) -> LoadedReward:
    """Import a function and convert its options; `place` is where the config has both, such as grpo.rewards[0].

    Raises BadInput.
    """
    function = _import(name, f"{place}.function={name}")
    options = _convert_options(function, options, place)
    given = {name: one.default for name, one in inspect.signature(function).parameters.items()} | dict(options)
    column, seconds = given.get("column"), given.get("seconds")
    return LoadedReward(
        function,
        options,
        column if isinstance(column, str) else None,
        float(seconds) if isinstance(seconds, int | float) else None,
    )


def _import(name: str, field: str) -> Callable[..., Any]:
    module_name, colon, attribute = BUILT_IN.get(name, name).partition(":")
    if not colon or not module_name or not attribute:
        raise BadInput(f"{field}: must be one of {', '.join(BUILT_IN)}, or module:function, such as mine:is_polite")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if name in BUILT_IN and error.name in _PACKAGES:
            package = _PACKAGES[error.name]
            raise BadInput(f"{field}: needs a package that is not installed; run pip install '{package}'") from error
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            advice = _advise_module(module_name, attribute)
            raise BadInput(f"{field}: there is no module {error.name}; {advice}") from error
        raise BadInput(f"{field}: its module does not import ({in_one_line(error)}); install what it needs") from error
    except BaseException as error:  # whatever a user's module does when it is imported, also SystemExit
        kind = type(error).__name__
        raise BadInput(f"{field}: its module does not import ({kind}: {in_one_line(error)}); mend it") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        known = ", ".join(key for key, one in vars(module).items() if inspect.isfunction(one)) or "none"
        raise BadInput(f"{field}: module {module_name} has no function {attribute}; its functions are: {known}")
    return function


def _advise_module(module_name: str, attribute: str) -> str:
    """Return where a module that is not there is looked for; of the path of a file, what to write in its stead."""
    if "/" not in module_name and not module_name.endswith(".py"):
        return "it is looked for where the command runs and in PYTHONPATH"
    path = Path(module_name)
    return f"it is a path; put its folder {path.parent} into PYTHONPATH, and write {path.stem}:{attribute}"


def _convert_options(function: Callable[..., Any], options: Mapping[str, Any], place: str) -> dict[str, Any]:
    parameters = dict(list(inspect.signature(function).parameters.items())[1:])  # the first one is the reply
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = [name for name, one in parameters.items() if one.kind in kinds]
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    for name in options:
        if name not in taken and not takes_all:
            known = f"it takes {', '.join(taken)}" if taken else "it takes none; leave it out"
            raise BadInput(f"{place}.options.{name}: the function has no such parameter; {known}")
    foreign = [name for name in _OF_OTHERS if name in inspect.signature(function).parameters]
    if foreign:
        raise BadInput(
            f"{place}.function: takes {foreign[0]}, as rewards of TRL and verl do; here it must be function(reply, "
            "**options), where reply.text is one answer and reply.row its row of the data, and return a number"
        )
    missing = [name for name in taken if name not in options and parameters[name].default is inspect.Parameter.empty]
    if missing:
        raise BadInput(f"{place}.options: lacks {missing[0]}, which it needs; try options: {{{missing[0]}: ...}}")
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception:  # a user's annotations may name what does not exist when the program runs
        hints = {}
    return {name: _convert(value, name, parameters, hints, place) for name, value in options.items()}


def _convert(value: Any, name: str, parameters: Mapping[str, Any], hints: Mapping[str, Any], place: str) -> Any:
    """Return an option, text as it was typed in YAML, as its parameter's annotation, or else its default, has it."""
    hint = hints.get(name)
    if hint is None and name in parameters and isinstance(parameters[name].default, bool | int | float | str):
        hint = type(parameters[name].default)
    if hint is None or "Any" in str(hint):
        return _leaves(value)
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, coerce_numbers_to_str=True))
        return adapter.validate_python(value)
    except ValidationError as error:
        what = error.errors()[0]["msg"]
        default = parameters[name].default if name in parameters else inspect.Parameter.empty
        works = "" if default is inspect.Parameter.empty else f"; a value that would work: {default}"
        raise BadInput(f"{place}.options.{name}={value}: {what[0].lower()}{what[1:]}{works}") from error


def _leaves(value: Any) -> Any:
    """Return a value of no stated type with text that spells a number, true, false or null as that."""
    if isinstance(value, Mapping):
        return {key: _leaves(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_leaves(item) for item in value]
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return value if isinstance(found, dict | list | str) else found

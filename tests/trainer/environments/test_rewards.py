"""Each reward that needs no other package, against cases worked out by hand."""

import pytest

from configs.errors import BadInput
from trainer.environments.rewards.exact import exact_match
from trainer.environments.rewards.json_form import valid_json
from trainer.environments.rewards.numeric import numeric
from trainer.environments.rewards.overlong import length
from trainer.environments.rewards.patterns import regex, tags
from trainer.environments.rewards.registry import BUILT_IN, load_reward
from trainer.environments.rewards.reply import Reply
from trainer.environments.rewards.small_answers import right_small_answer

GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = <<48+24=72>>72.\n#### 72"
SCHEMA = {
    "type": "object", "required": ["a"], "additionalProperties": False,
    "properties": {"a": {"type": "array", "items": {"type": "integer"}}, "b": {"enum": ["x", 1]}},
}  # fmt: skip


def reply(text, num_tokens=0, max_new_tokens=100, **row):
    return Reply(text, row, [{"role": "user", "content": "?"}], num_tokens, max_new_tokens, False)


@pytest.mark.parametrize(
    ("text", "answer", "options", "value"),
    [
        (" Paris\n", "Paris", {}, 1.0),
        ("paris", "Paris", {}, 0.0),
        ("paris", "Paris", {"ignore_case": True}, 1.0),
        (" Paris", "Paris", {"strip": False}, 0.0),
        ("It is 4. The answer is 5", 5, {"after": "The answer is"}, 1.0),
        ("The answer is 5. No: 6", 5, {"after": "The answer is"}, 0.0),
        ("5", 5, {"after": "The answer is"}, 0.0),
        ("<think>4</think><answer> 5 </answer> bye", "5", {"after": "<answer>"}, 1.0),
        ("<answer>5", "5", {"after": "<answer>"}, 0.0),
        ("b", ["a", "b"], {}, 1.0),
        ("", "x", {}, 0.0),
        ("x", None, {}, None),
    ],
)
def test_exact_match(text, answer, options, value):
    assert exact_match(reply(text, answer=answer), **options) == value


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        ("48 + 24 = 72", GSM8K, 1.0),
        ("So 72 clips, not 73.", GSM8K, 0.0),
        ("It costs $1,234.50.", 1234.5, 1.0),
        ("1{,}234", "1234", 1.0),
        ("72.0", "72", 1.0),
        ("10-3", "3", 1.0),
        ("x = -3", "-3", 1.0),
        ("minus \u22123", -3, 1.0),
        ("-$5", -5, 1.0),
        ("f(x2)", "2", 0.0),
        ("a total of...42.", "42", 1.0),
        ("it is .5", 0.5, 1.0),
        ("6.02e23 of them", 6.02e23, 1.0),
        ("1, 2, 3", 3, 1.0),
        ("1,2345", 2345, 1.0),
        ("0.1", 0.1, 1.0),
        ("9007199254740993", "9007199254740992", 0.0),
        ("none at all", "1", 0.0),
        ("1", None, None),
    ],
)
def test_numeric(text, answer, value):
    assert numeric(reply(text, answer=answer)) == value


def test_numeric_has_a_tolerance_and_a_column_without_a_number_is_a_failure():
    assert numeric(reply("3.1416", pi="3.14159"), column="pi", tolerance=1e-4) == 1.0
    assert numeric(reply("3.1418", pi="3.14159"), column="pi", tolerance=1e-4) == 0.0
    assert numeric(reply("The answer is 4, I said 5 before", answer=4), after="The answer is") == 0.0
    with pytest.raises(ValueError, match="holds no number"):
        numeric(reply("1", answer="many"))
    with pytest.raises(BadInput, match="options.tolerance=-1"):
        numeric(reply("1", answer="1"), tolerance=-1)


@pytest.mark.parametrize("num_tokens", [0, 79, 80, 81, 85, 99, 100, 101, 500])
def test_soft_overlong_punishment_is_equation_13(num_tokens):
    most, cache = 100, 20
    if num_tokens <= most - cache:
        expected = 0.0
    elif num_tokens <= most:
        expected = ((most - cache) - num_tokens) / cache
    else:
        expected = -1.0
    assert length(reply("x", num_tokens, most), buffer=cache) == expected
    assert length(reply("x", num_tokens, 10**6), buffer=cache, maximum=most) == expected


def test_a_buffer_longer_than_an_answer_is_refused():
    with pytest.raises(BadInput, match="options.buffer=101: must be from 1 to the 100 tokens"):
        length(reply("x"), buffer=101)


def test_regex_and_tags():
    assert regex(reply("so 12."), pattern=r"\d+") == 1.0
    assert regex(reply("so 12."), pattern=r"\d+", full=True) == 0.0
    with pytest.raises(BadInput, match="options.pattern='\\('.*does not compile"):
        regex(reply("x"), pattern="(")
    assert tags(reply("<think>a\n</think>\n<answer>4</answer>\n")) == 1.0
    for text in (
        "<think>a</think><answer>4</answer> bye", "<answer>4</answer><think>a</think>",
        "<think>a<answer>4</answer></think>",
        "<think>a</think><answer>4", "<think>a</think><answer>4</answer><answer>5</answer>", "",
    ):  # fmt: skip
        assert tags(reply(text)) == 0.0, text
    assert tags(reply("a</think><answer>4</answer>"), is_open=True) == 1.0
    assert tags(reply("<think>a</think><answer>4</answer>"), is_open=True) == 0.0
    with pytest.raises(BadInput, match="try \\[think, answer\\]"):
        tags(reply(""), names=("a b",))


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        (' {"a": [1, 2.0]}\n', SCHEMA, 1.0),
        ('{"a": [1.5]}', SCHEMA, 0.0),
        ('{"a": [true]}', SCHEMA, 0.0),
        ('{"a": [], "b": 1}', SCHEMA, 1.0),
        ('{"a": [], "b": true}', SCHEMA, 0.0),
        ('{"a": [], "c": 1}', SCHEMA, 0.0),
        ('{"b": 1}', SCHEMA, 0.0),
        ("[1]", SCHEMA, 0.0),
        ("[1]", None, 1.0),
        ("NaN", None, 0.0),
        ("[1] done", None, 0.0),
        ("[" * 100_000, None, 0.0),
    ],
)
def test_json(text, schema, value):
    assert valid_json(reply(text), schema=schema) == value


def test_json_in_a_fence_and_schemas_that_would_be_ignored():
    assert valid_json(reply('So:\n```json\n{"a": 1}\n```\nDone.'), fenced=True) == 1.0
    assert valid_json(reply('{"a": 1}'), fenced=True) == 0.0
    for schema, message in (
        ({"minimum": 1}, "options.schema.minimum: is no keyword"),
        ({"properties": {"a": {"type": "int"}}}, "options.schema.properties.a.type=int: must be one of"),
        ({"required": "a"}, "options.schema.required: must be a list"),
    ):
        with pytest.raises(BadInput, match=message):
            valid_json(reply("1"), schema=schema)


def test_small_tasks():
    assert right_small_answer(reply("3 + 4 = 7. The answer is 7.", answer="7")) == 1.0
    assert right_small_answer(reply("The answer is 8.", answer="7")) == 0.0
    assert right_small_answer(reply("7", answer=None)) is None


def test_options_are_text_until_the_function_says_what_they_are():
    """YAML is read as text, so that a pattern of digits stays one and a tolerance becomes a number."""
    numbers = load_reward("numeric", {"tolerance": "1e-6", "column": "pi"}, "r[0]")
    assert (numbers.options, numbers.column) == ({"tolerance": 1e-6, "column": "pi"}, "pi")
    assert load_reward("regex", {"pattern": "042", "full": "true"}, "r").options == {
        "pattern": "042", "full": True,
    }  # fmt: skip
    schema = {"type": "object", "properties": {"a": {"enum": ["1", "null"]}}}
    loaded = load_reward("json", {"schema": schema}, "r")
    assert loaded.options["schema"]["properties"]["a"]["enum"] == [1, None]


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("exact", {}, r"r\[1\].function=exact: must be one of exact_match, .* or module:function"),
        ("no_such_module:f", {}, "there is no module no_such_module"),
        ("tests.trainer.environments.odd_rewards:odds", {}, "has no function odds; its functions are: odd, "),
        ("tests.trainer.environments.odd_rewards:text", {}, "has no function text"),
        ("numeric", {"tol": 1}, r"r\[1\].options.tol: .*no such parameter; it takes column, tolerance, after"),
        ("numeric", {"tolerance": "small"}, r"r\[1\].options.tolerance=small: .* valid number.*; a value that would"),
        ("rewards/mine.py:polite", {}, "put its folder rewards into PYTHONPATH, and write mine:polite"),
        ("tests.trainer.environments.odd_rewards:trl", {}, "takes completions, as rewards of TRL and verl do"),
        ("length", {}, r"r\[1\].options: lacks buffer"),
    ],
)
def test_what_cannot_be_called_is_refused(function, options, message):
    with pytest.raises(BadInput, match=message):
        load_reward(function, options, "r[1]")


def test_every_name_leads_to_a_function():
    options = {"length": {"buffer": 1}, "regex": {"pattern": "x"}}
    for name in BUILT_IN:
        try:
            load_reward(name, options.get(name, {}), "r")
        except BadInput as error:
            assert name in ("math", "reasoning_gym") and "pip install" in str(error)

"""Rows of every form that data sets of chats have, and the sentence for what is no conversation."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from configs.sections.sft import ConversationSource
from trainer.data.chat.conversation import BadRow, Conversation, Message, ToolCall
from trainer.data.chat.forms import parse_conversation

ADD = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
WRAPPED = {"type": "function", "function": ADD}
USER, ANSWER = Message("user", "Hi"), Message("assistant", "Yes")


def parse(row, columns=None, roles=None) -> Conversation:
    return parse_conversation(row, ConversationSource(path="x.json", columns=columns or {}, roles=roles or {}))


def turns(*messages, columns=None, roles=None) -> tuple[Message, ...]:
    return parse({"messages": list(messages)}, columns, roles).messages


def user(content="Hi", **more) -> dict:
    return {"role": "user", "content": content, **more}


def assistant(content="Yes", **more) -> dict:
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user(), assistant()]},
        {"messages": [user([{"type": "text", "text": "Hi"}]), assistant([{"type": "text", "value": "Yes"}])]},
        {"messages": [user(["H", {"type": "text", "text": "i"}]), assistant(["Yes"])]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]},
        {"conversations": [{"from": "user", "value": "Hi"}, {"role": "model", "content": "Yes"}]},
        {"instruction": "Hi", "input": "", "output": "Yes"},
        {"instruction": "Hi", "output": "Yes", "input": None, "history": None, "system": None, "tools": None},
        {"instruction": "", "input": "Hi", "output": "Yes", "history": [], "system": "", "tools": ""},
        {"input": "Hi", "output": "Yes"},
        {"prompt": "Hi", "completion": "Yes"},
        {"prompt": "Of another form", "prompt_id": 1, "messages": [user(), assistant()], "images": []},
    ],
)
def test_each_form_is_recognised_by_its_columns(row):
    assert parse(row) == Conversation((USER, ANSWER))


def test_where_a_row_comes_from_is_kept():
    found = parse_conversation({"prompt": "Hi", "completion": "Yes"}, ConversationSource(path="x"), "x/a.json", 7)
    assert (found.source, found.row) == ("x/a.json", 7)


def test_instruction_and_input_are_lines_and_history_comes_before_them():
    row = {"instruction": "Add", "input": "1 2", "output": "3", "history": [["a", "b"], ("c", "d")], "system": "S"}
    expected = [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    expected += [("user", "Add\n1 2"), ("assistant", "3")]
    found = parse(row).messages
    assert [(message.role, message.content) for message in found] == expected
    assert all(message.is_trained for message in found)


def test_a_list_as_prompt_is_context_and_its_completion_is_trained():
    row = {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")], "tools": [ADD]}
    found = parse(row)
    assert [message.is_trained for message in found.messages] == [False, False, False, True]
    assert [message.content for message in found.messages] == ["a", "b", "c", "d"] and found.tools == (WRAPPED,)


def test_the_system_column_stands_first_unless_a_turn_does():
    row = {"messages": [user(), assistant()], "system": "S"}
    assert parse(row).messages == (Message("system", "S"), USER, ANSWER)
    row["messages"].insert(0, {"role": "developer", "content": ""})
    assert parse(row).messages == (Message("system", ""), USER, ANSWER)


@pytest.mark.parametrize(
    "tools",
    [
        json.dumps([ADD]), [ADD], ADD, [WRAPPED], [json.dumps(ADD)], [{"function": ADD}],
        json.dumps([{"type": "function", **ADD}]),
    ],
)  # fmt: skip
def test_definitions_of_tools_get_one_spelling(tools):
    assert parse({"messages": [user(), assistant()], "tools": tools}).tools == (WRAPPED,)


@pytest.mark.parametrize("tools", ["", " ", "[]", "null", [], None])
def test_no_tools_are_none(tools):
    assert parse({"messages": [user(), assistant()], "tools": tools}).tools == ()


@pytest.mark.parametrize(
    ("tools", "sentence"),
    [
        ("[{", "tools is no JSON; write a list like"),
        (["add"], r"tools\[0\] is no JSON"),
        ([1], r"tools\[0\] is a number, not a definition"),
        ("7", r"tools\[0\] is a number"),
        ([{"description": "x"}], r"tools\[0\] has no name"),
        ([{"name": "f", "parameters": float("nan")}], "tools holds what JSON cannot"),
    ],
)
def test_what_is_no_definition_is_told(tools, sentence):
    with pytest.raises(BadRow, match=sentence):
        parse({"messages": [user(), assistant()], "tools": tools})


CALL = ToolCall("add", {"a": 1})
CALLED = {"name": "add", "arguments": {}, "id": "a"}


@pytest.mark.parametrize(
    "call",
    [
        assistant(None, tool_calls=[{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]),
        assistant("", tool_calls=[{"function": {"name": "add", "arguments": {"a": 1}}}]),
        assistant("", tool_calls='[{"name": "add", "arguments": {"a": 1}}]'),
        {"role": "assistant", "function_call": {"name": "add", "arguments": '{"a": 1}'}},
        {"role": "assistant", "tool_calls": [{"name": "add", "parameters": {"a": 1}}]},
        assistant([{"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 1}}'}]),
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "tool_call", "value": [{"name": "add", "arguments": {"a": 1}}]},
    ],
)
def test_each_spelling_of_a_call_is_one(call):
    result = {"from": "observation", "value": "1"}
    found = turns(user(), call, result, assistant())
    assert found == (USER, Message("assistant", "", None, (CALL,)), Message("tool", "1"), ANSWER)
    assert type(found[1].tool_calls[0].arguments["a"]) is int


@pytest.mark.parametrize("role", ["tool", "function", "observation", "ipython"])
def test_results_keep_their_id_and_name(role):
    calls = [{"id": "c1", "function": {"name": "add", "arguments": "{}"}}, {"id": "c2", "function": {"name": "now"}}]
    results = [{"role": role, "content": text, "tool_call_id": text, "name": "add"} for text in ("c2", "c1")]
    found = turns(user(), assistant("So:", tool_calls=calls), *results, {"role": role, "content": None})
    assert found[1] == Message("assistant", "So:", None, (ToolCall("add", {}, "c1"), ToolCall("now", {}, "c2")))
    assert found[2:4] == tuple(Message("tool", text, tool_call_id=text, name="add") for text in ("c2", "c1"))
    assert found[4] == Message("tool", "")


@pytest.mark.parametrize("text", ["a=1", "[1]", '{"a": NaN}', ""])
def test_arguments_that_are_no_object_stay_text(text):
    found = turns(user(), assistant("", tool_calls=[{"name": "add", "arguments": text}]))
    assert found[1].tool_calls == (ToolCall("add", text),)


def test_several_calls_in_a_turn_follow_reasoning_and_text():
    call = {"type": "tool_call", "value": {"name": "add", "arguments": {"a": 1}}}
    parts = [{"type": "reasoning", "value": "Think"}, {"type": "text", "value": "So:"}, call, call]
    assert turns(user(), assistant(parts))[1] == Message("assistant", "So:", "Think", (CALL, CALL))
    value = '<think>\nThink\n</think>\n[{"name": "add", "arguments": {"a": 1}}]'
    assert turns(user(), {"from": "function_call", "value": value})[1] == Message("assistant", "", "Think", (CALL,))


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_several_names_and_marks_in_text_stay_text(key):
    assert turns(user(), assistant("Yes", **{key: "Think"}))[1] == Message("assistant", "Yes", "Think")
    assert turns(user(), assistant("", **{key: "Think"}))[1] == Message("assistant", "", "Think")
    assert turns(user(), assistant([{"type": "thinking", "thinking": "Think"}, "Yes"]))[1].reasoning == "Think"
    text = "<think>Think</think>Yes {{name}}"
    assert turns(user(), assistant(text)) == (USER, Message("assistant", text))


@pytest.mark.parametrize(
    ("more", "is_trained"),
    [
        ({"train": False}, False),
        ({"loss_weight": 0}, False),
        ({"loss_weight": 0.0}, False),
        ({"weight": 0}, False),
        ({"train": True, "loss_weight": 0}, False),
        ({"train": True}, True),
        ({"loss_weight": 1.0}, True),
        ({"train": None, "loss_weight": None, "weight": 1}, True),
    ],
)
def test_a_turn_says_whether_it_is_trained(more, is_trained):
    assert turns(user(), assistant(**more))[1].is_trained is is_trained
    call = {"from": "function_call", "value": '{"name": "add"}', **more}
    assert turns(user(), call)[1].is_trained is is_trained


@pytest.mark.parametrize(
    "roles",
    ["uuaa", "au", "usua", "aua", "ufoa", "uf", "ufu"],
)
def test_unusual_orders_are_left_to_the_template(roles):
    content = {"u": user(), "a": assistant(), "s": {"role": "system", "content": "S"}}
    content["f"] = {"role": "function_call", "content": '{"name": "add"}'}
    content["o"] = {"role": "observation", "content": "1"}
    assert len(turns(*(content[role] for role in roles))) == len(roles)


def test_a_result_may_follow_a_call_that_is_plain_text():
    found = turns(user(), assistant('<tool_call>\n{"name": "add"}\n</tool_call>'), {"role": "tool", "content": "1"})
    assert found[2] == Message("tool", "1")


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "messages: no turn, and so nothing to learn"),
        ("Hi", "messages is a string, not a list of turns"),
        ([user(), user()], "messages: only user, and so nothing to learn"),
        ([user(), {"role": "narrator", "content": "x"}], r"\[1\]: unknown role 'narrator'; .*narrator: assistant"),
        ([user(), {"role": ["user"], "content": "x"}], r"messages\[1\]: a role that is a list"),
        ([{"speaker": "x", "text": "y"}], r"no role among its keys \['speaker', 'text'\]; .*columns: {role: speaker"),
        (["Hi"], r"messages\[0\]: a string, not a turn like"),
        ([user(None), assistant()], r"messages\[0\]: no content among its keys"),
        ([{"role": "user"}, assistant()], r"messages\[0\]: no content among its keys \['role'\]"),
        ([user(7), assistant()], "the content is a number; give a string, or a list of parts"),
        ([user({"a": 1}), assistant()], "the content is an object"),
        ([user("\ud800"), assistant()], "the content holds half a surrogate pair"),
        ([user(), assistant("")], r"messages\[1\]: an assistant's turn that says nothing and calls nothing"),
        ([user(), assistant(None)], "says nothing and calls nothing"),
        ([user(), assistant(" \n")], "says nothing and calls nothing"),
        ([user(), assistant("", tool_calls=[])], "says nothing and calls nothing"),
        ([user([{"type": "image_url", "image_url": {}}]), assistant()], "a part of type 'image_url' in the content"),
        ([user([{"type": "audio"}]), assistant()], "a part of type 'audio'.* not images, audio or video"),
        ([user([7]), assistant()], "a part of type 'a number'"),
        ([user([{"text": "x"}]), assistant()], "a part of type None"),
        ([user([{"type": "text", "text": None}]), assistant()], "a text part is null, not text"),
        ([user([{"type": "reasoning", "value": "x"}]), assistant()], "a reasoning part in a turn of role user"),
        ([user(images=["a.png"]), assistant()], r"messages\[0\]: images in the turn"),
        ([user(thinking="x"), assistant()], "reasoning in a turn of role user"),
        ([user(tool_calls=[{"name": "f"}]), assistant()], "tool_calls in a turn of role user"),
        ([user(), assistant(["x", {"type": "reasoning", "value": "y"}])], "a reasoning part behind one of text"),
        ([user(), assistant([{"type": "reasoning", "value": "x"}], thinking="y")], "two different texts of reasoning"),
        ([user(), assistant([{"type": "tool_call", "value": ""}])], "a tool_call part without a call"),
        ([user(), assistant([{"type": "tool_call", "value": CALLED}], tool_calls=[CALLED])], "calls both as parts"),
        ([user(), assistant(tool_calls="[{")], "a call that is no JSON"),
        ([user(), assistant(tool_calls=[{"name": "f", "id": 3}])], "a call of 'f' whose id is a number"),
        ([user(), assistant(tool_calls=[3])], "a call that is a number, not an object"),
        ([user(), assistant(tool_calls=[{"arguments": {}}])], "a call without the name of a tool"),
        ([user(), assistant(tool_calls=[{"name": "f", "arguments": [1]}])], "a call of 'f' whose arguments are a list"),
        ([user(), {"from": "function_call", "value": "add 1"}], r"messages\[1\]: a call that is no JSON"),
        ([user(), {"from": "function_call", "value": ""}], "a function_call without a call"),
        ([user(), assistant(loss_weight=0.5)], "loss_weight is 0.5; give 0"),
        ([user(), assistant(loss_weight=float("nan"))], "loss_weight is nan; give 0"),
        ([user(), assistant(train="no")], "train is a string; give true or false"),
        ([user(), {"role": "tool", "content": "1"}, assistant()], r"messages\[1\]: a tool's result without a call"),
        ([user(), assistant(), {"role": "tool", "content": "1"}], r"messages\[2\]: a tool's result without a call"),
        (
            [user(), {"from": "function_call", "value": '{"name": "f"}'}, user(), {"role": "tool", "content": "1"}],
            r"messages\[3\]: a tool's result without a call",
        ),
        (
            [user(), assistant(tool_calls=[CALLED]), {"role": "tool", "content": "1", "tool_call_id": "b"}],
            r"messages\[2\]: a tool's result without a call with the id 'b'",
        ),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_told(messages, sentence):
    with pytest.raises(BadRow, match=sentence):
        parse({"messages": messages})


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"instruction": "Hi", "output": ""}, "output is empty, an assistant's turn that says nothing"),
        ({"instruction": "Hi", "output": None}, r"no conversation in its columns instruction, output \(null\)"),
        ({"instruction": 3, "output": "x"}, "instruction is a number, not text"),
        ({"instruction": "Hi", "input": ["x"], "output": "x"}, "input is a list, not text"),
        ({"instruction": "Hi", "output": "x", "history": ["ab"]}, "history holds a string where a pair"),
        ({"instruction": "Hi", "output": "x", "history": [["a", None]]}, "an answer in history is null"),
        ({"prompt": "Hi", "completion": [assistant()]}, "prompt is a string and completion a list; give both as text"),
        ({"prompt": [user(), assistant()], "completion": [user()]}, "completion: no turn of the assistant in it"),
        ({"messages": [user(), assistant()], "system": 3}, "the system prompt is a number"),
        ({"messages": [user(), assistant()], "images": ["a.png"]}, "column 'images' is not empty"),
        ({"question": "1+1", "answer": "2"}, r"columns question, answer; .*{prompt: question, completion: answer}"),
        ({"dialog": [user(), assistant()], "id": 3}, "name yours, e.g. columns: {messages: dialog}"),
        ({"data": [{"instruction": "Hi", "output": "x"}]}, "if its rows are in 'data', write that list alone"),
        ({}, "no conversation in its columns none; expected are messages, or"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "columns: {prompt: prompt, completion: chosen}"),
    ],
)  # fmt: skip
def test_what_is_no_form_is_told(row, sentence):
    with pytest.raises(BadRow, match=sentence):
        parse(row)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"question": "Hi", "answer": "Yes"}, {"prompt": "question", "completion": "answer"}),
        ({"question": "Hi", "answer": "Yes"}, {"prompt": "question", "response": "answer"}),
        ({"ask": "", "text": "Hi", "answer": "Yes"}, {"prompt": "ask", "query": "text", "response": "answer"}),
        ({"instruction": "", "context": "Hi", "response": "Yes"}, {"input": "context", "output": "response"}),
        ({"messages": [assistant("No")], "dialog": [user(), assistant()]}, {"messages": "dialog"}),
        ({"messages": [assistant("No")], "prompt": "Hi", "done": "Yes"}, {"completion": "done"}),
        ({"chat": [{"by": "user", "text": "Hi"}, {"by": "gpt", "text": "Yes"}]},
         {"messages": "chat", "role": "by", "content": "text"}),
        ({"conversations": [{"from": "human", "value": "Hi"}], "chosen": assistant(), "rejected": assistant("No")},
         {"prompt": "conversations", "completion": "chosen"}),
    ],
)  # fmt: skip
def test_columns_are_named_as_llama_factory_names_them(row, columns):
    found = parse(row, columns).messages
    assert [(message.role, message.content) for message in found] == [("user", "Hi"), ("assistant", "Yes")]


def test_system_history_and_tools_can_be_named():
    row = {"instruction": "Hi", "output": "Yes", "sys": "S", "before": [["a", "b"]], "functions": json.dumps([ADD])}
    found = parse(row, {"system": "sys", "history": "before", "tools": "functions"})
    assert [message.content for message in found.messages] == ["S", "a", "b", "Hi", "Yes"] and found.tools == (WRAPPED,)


def test_a_named_column_that_is_not_there_is_told():
    with pytest.raises(BadRow, match=r"no column 'chat', which columns.messages names; there are messages"):
        parse({"messages": [user(), assistant()]}, {"messages": "chat"})


def test_roles_can_be_named():
    roles = {"Kunde": "user", "Hilfe": "assistant", "function": "function_call"}
    call = {"role": "function", "content": '{"name": "add", "arguments": {"a": 1}}'}
    found = turns({"role": "Kunde", "content": "Hi"}, call, {"role": "Hilfe", "content": "Yes"}, roles=roles)
    assert found == (USER, Message("assistant", "", None, (CALL,)), ANSWER)


@pytest.mark.parametrize("wrong", [{"columns": {"question": "q"}}, {"roles": {"bot": "helper"}}])
def test_names_that_nothing_has_are_refused(wrong):
    with pytest.raises(ValidationError, match="Input should be 'messages'|Input should be 'system'"):
        ConversationSource(path="x", **wrong)


def test_reading_needs_no_torch(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "Hi", "completion": "Yes"}')
    code = (
        "import sys; from configs.sections.sft import ConversationSource as S; from trainer.data.chat.forms import *\n"
        "from trainer.data.chat.rows import open_rows; s = S(path=sys.argv[1])\n"
        "assert [parse_conversation(row, s) for _, _, row in open_rows(s, 'f')] and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)

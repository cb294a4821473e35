"""Prompts: what of a row is asked, in which order prompts are drawn, and that a cursor goes on exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs.errors import BadInput
from configs.sections.sft import ConversationSource
from trainer.data.chat.conversation import BadRow
from trainer.data.chat.forms import parse_prompt
from trainer.data.chat.prompts import PromptFile, PromptReader

ASKED = [("user", "Me?")]
TURN, ANSWER = {"role": "user", "content": "Me?"}, {"role": "assistant", "content": "You."}
NUM_ROWS = 7


def parse(row: dict, **source: Any) -> list[tuple[str, str | None]]:
    messages = parse_prompt(row, ConversationSource(path="x.json", **source), "x.json", 3)[0].messages
    return [(message.role, message.content) for message in messages]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Me?"},
        {"prompt": "Me?", "completion": "You.", "answer": 3},
        {"prompt": [TURN]},
        {"prompt": [TURN, ANSWER], "completion": None},
        {"messages": [TURN]},
        {"messages": [TURN, ANSWER], "answer": "You."},
        {"prompt": None, "messages": [TURN]},
        {"conversations": [{"from": "human", "value": "Me?"}, {"from": "gpt", "value": "You."}]},
        {"instruction": "Me?", "output": "You."},
        {"instruction": "Me?", "input": "", "output": None},
        {"instruction": "", "input": "Me?"},
    ],
)
def test_every_form_of_a_row_is_a_question(row):
    assert parse(row) == ASKED


def test_names_of_columns_and_roles_are_the_users():
    assert parse({"question": "Me?", "prompt": "No"}, columns={"prompt": "question"}) == ASKED
    assert parse({"talk": [TURN, ANSWER]}, columns={"messages": "talk"}) == ASKED
    turns = [{"who": "asker", "said": "Me?"}]
    assert parse({"messages": turns}, columns={"role": "who", "content": "said"}, roles={"asker": "user"}) == ASKED


def test_earlier_answers_system_and_tools_stay():
    row = {"messages": [TURN, ANSWER, TURN, ANSWER], "system": "Ask"}
    assert parse(row) == [("system", "Ask"), *ASKED, ("assistant", "You."), *ASKED]
    row = {"instruction": "Me?", "history": [["Who?", "You."]], "system": "Ask"}
    assert parse(row) == [("system", "Ask"), ("user", "Who?"), ("assistant", "You."), *ASKED]
    tool = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
    found, _ = parse_prompt({"prompt": "Me?", "tools": [tool]}, ConversationSource(path="x"), "x", 3)
    assert [one["function"]["name"] for one in found.tools] == ["add"] and (found.source, found.row) == ("x", 3)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"question": "Me?", "answer": 3}, "columns: {prompt: question}"),
        ({"messages": [ANSWER]}, "no turn to answer"),
        ({"messages": []}, "no turn to answer"),
        ({"prompt": 3}, "not a list of turns"),
        ({}, "nothing to answer in its columns none"),
    ],
)
def test_what_asks_nothing_says_what_would(row, sentence):
    with pytest.raises(BadRow) as refusal:
        parse(row)
    assert sentence in str(refusal.value)


def test_a_column_that_is_named_must_be_there():
    with pytest.raises(BadRow, match="columns.prompt names"):
        parse({"prompt": "Me?"}, columns={"prompt": "question"})


@pytest.fixture
def open_file(make_encoder, tmp_path):
    """Return a function that opens rows as prompts; the prompt of row n has n further words."""
    encoder = make_encoder("chatml")

    def run(name: str = "a", rows: list[dict] | None = None, longest: int = 1000, num_rows: int = NUM_ROWS):
        path = Path(tmp_path / f"{name}.jsonl")
        if rows is None:
            rows = [{"prompt": name + " Me" * n, "answer": n, "extra": {"n": [n]}} for n in range(num_rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return PromptFile(ConversationSource(path=str(path)), "grpo.prompts[0]", encoder, longest)

    return run


def read(files, seed: int = 1, weights: list[float | None] | None = None) -> PromptReader:
    return PromptReader(files, weights or [None] * len(files), seed)


def places(prompts) -> list[tuple[str, int]]:
    return [(prompt.source, prompt.row) for prompt in prompts]


def test_a_prompt_ends_where_the_answer_begins_and_keeps_its_row(open_file, apply_transformers):
    file = open_file()
    for number, prompt in enumerate(file.first(NUM_ROWS)):
        assert prompt.columns == {"prompt": "a" + " Me" * number, "answer": number, "extra": {"n": [number]}}
        assert (prompt.source, prompt.row) == ("a", number)
        turns = [{"role": "user", "content": prompt.columns["prompt"]}]
        judge = apply_transformers("chatml", turns, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert prompt.token_ids == judge
    assert [prompt.row for prompt in file.first(3)] == [0, 1, 2]


def test_each_epoch_has_every_prompt_once_in_an_order_of_its_own(open_file):
    reader = read([open_file()])
    epochs = [[prompt.row for prompt in reader.draw(NUM_ROWS)] for _ in range(6)]
    assert all(sorted(epoch) == list(range(NUM_ROWS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 4 and list(range(NUM_ROWS)) not in epochs[:1]
    again, other = read([open_file()]), read([open_file()], seed=2)
    assert [prompt.row for prompt in again.draw(2 * NUM_ROWS)] == epochs[0] + epochs[1]
    assert [prompt.row for prompt in other.draw(2 * NUM_ROWS)] != epochs[0] + epochs[1]


def test_a_cursor_goes_on_where_it_was(open_file):
    longest = len(open_file("a").first(5)[4].token_ids)
    files = [open_file("a", longest=longest), open_file("b", num_rows=4)]
    whole = places(read(files, weights=[3.0, 1.0]).draw(40))
    reader = read(files, weights=[3.0, 1.0])
    first = places(reader.draw(3)) + places(reader.draw(10))
    state = json.loads(json.dumps(reader.state_dict()))
    resumed = read(files, weights=[3.0, 1.0])
    resumed.load_state_dict(state)
    assert first + places(resumed.draw(27)) == whole
    reader.draw(27)
    assert resumed.num_too_long == reader.num_too_long > 0, "what was left out is counted on"
    with pytest.raises(BadInput, match=r"a\.jsonl is not what the checkpoint read there"):
        read([open_file("a", num_rows=5), files[1]], weights=[3.0, 1.0]).load_state_dict(state)


def test_sources_are_drawn_by_weight_or_by_size(open_file):
    files = [open_file("a", num_rows=30), open_file("b", num_rows=10)]
    assert [source for source, _ in places(read(files).draw(40))].count("a") == 30
    assert [source for source, _ in places(read(files, weights=[1.0, 4.0]).draw(40))].count("a") == 8


def test_what_is_too_long_is_left_out_told_and_counted(open_file, caplog):
    lengths = [len(prompt.token_ids) for prompt in open_file().first(NUM_ROWS)]
    assert sorted(set(lengths)) == lengths
    assert not caplog.messages
    reader = read([open_file(longest=lengths[3])])
    assert "grpo.prompts[0]: 3 of the first 7 prompts" in caplog.messages[0] and str(lengths[3]) in caplog.messages[0]
    assert {prompt.row for prompt in reader.draw(8)} == {0, 1, 2, 3}
    assert reader.num_too_long in (3, 4, 5, 6)
    assert [prompt.row for prompt in open_file(longest=lengths[1]).first(5)] == [0, 1]
    with pytest.raises(BadInput) as refusal:
        open_file(longest=lengths[0] - 1)
    for part in ("grpo.prompts[0]", "a.jsonl", str(lengths[0] - 1), f"the shortest has {lengths[0]}"):
        assert part in str(refusal.value)


def test_a_row_that_asks_nothing_names_field_file_and_row(open_file):
    with pytest.raises(BadInput, match=r"grpo\.prompts\[0\]: row 1 of .*a\.jsonl: nothing to answer in its columns"):
        open_file(rows=[{"prompt": "Me?"}, {"text": "Me?"}])
    with pytest.raises(BadInput, match=r"grpo\.prompts\[0\].*a\.jsonl: no row"):
        open_file(rows=[])

"""Which sampled answers are accepted, and the chats that are made of them."""

from __future__ import annotations

from configs.sections.sft import ConversationSource
from trainer.data.chat.conversation import Conversation, Message, ToolCall
from trainer.data.chat.forms import parse_conversation
from trainer.rl.acceptance import ACCEPTED, BEYOND, CUT, DOUBLE, EMPTY, FAILED, LOW, as_chat, choose


def answer(sample: int, score: float | None, text: str, finish: str = "stop_token") -> dict:
    return {"sample": sample, "score": score, "answers": [text], "finish": finish}


def test_right_whole_and_different_answers_are_accepted_the_best_first():
    answers = [
        answer(0, 0.5, "low"),
        answer(1, 1.0, "a  b\n"),
        answer(2, 1.5, "caf\u00e9"),
        answer(3, 1.0, "cut", "length"),
        answer(4, None, "failed"),
        answer(5, 1.0, " a b"),
        answer(6, 1.5, "cafe\u0301 "),
        answer(7, 1.0, " \n"),
        answer(8, 2.0, "c"),
        answer(9, 1.0, "A b"),
    ]
    chosen, ends = choose(answers, 1.0, None)
    assert [one["sample"] for one in chosen] == [1, 2, 8, 9]
    assert ends == {ACCEPTED: 4, LOW: 1, CUT: 1, FAILED: 1, DOUBLE: 2, EMPTY: 1}
    chosen, ends = choose(answers, 1.0, 2)
    assert [one["sample"] for one in chosen] == [2, 8] and ends[BEYOND] == 3
    assert choose([], 1.0, 4) == ([], {})


def test_a_chat_reads_back_with_the_answer_alone_to_be_trained():
    turns = (
        Message("system", "Be brief."),
        Message("user", "2 + 2?"),
        Message("assistant", "", "I add.", (ToolCall("add", {"a": 2, "b": 2}, "call1"),)),
        Message("tool", "4", tool_call_id="call1", name="add"),
        Message("user", "And?"),
    )
    tool = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}
    row = as_chat(Conversation(turns, (tool,)), "It is 4.", {"row": 3})
    assert row["provenance"] == {"row": 3}
    read = parse_conversation(row, ConversationSource(path="x.jsonl"))
    assert [(one.role, one.content, one.reasoning, one.tool_calls) for one in read.messages] == [
        (one.role, one.content, one.reasoning, one.tool_calls) for one in (*turns, Message("assistant", "It is 4."))
    ]
    assert [one.is_trained for one in read.messages if one.role == "assistant"] == [False, True]
    assert read.tools == (tool,)

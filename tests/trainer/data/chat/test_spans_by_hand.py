"""What is trained of a conversation, for twelve templates, written out by hand: [[ ]] stands around what is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.data.chat.conversation import BadRow, Message

TEMPLATES = Path(__file__).parent / "templates"
TWO = (("user", "Who?"), ("assistant", "Me."), ("user", "ask"), ("assistant", "You."))


def test_chatml(show):
    assert show("chatml", ("system", "Be."), *TWO) == [
        "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
        "[[Me.<|im_end|>]]\n<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\n[[You.<|im_end|>]]\n"
    ]


def test_llama3(show):
    assert show("llama3_like", *TWO) == [
        "<s><|head|>user<|/head|>\n\nWho?<|eot|><|head|>assistant<|/head|>\n\n[[Me.<|eot|>]]"
        "<|head|>user<|/head|>\n\nask<|eot|><|head|>assistant<|/head|>\n\n[[You.<|eot|>]]"
    ]


def test_qwen3_drops_reasoning_of_earlier_answers(show):
    first, second = Message("assistant", "Me.", reasoning="I think."), Message("assistant", "You.")
    assert show("qwen3_like", TWO[0], first, TWO[2], second) == [
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n[[<think>\nI think.\n</think>\n\nMe.<|im_end|>]]\n",
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMe.<|im_end|>\n<|im_start|>user\nask<|im_end|>\n"
        "<|im_start|>assistant\n[[<think>\n\n</think>\n\nYou.<|im_end|>]]\n",
    ]


def test_qwen3_keeps_reasoning_between_calls_in_one_sample(show, call_turn):
    turns = (TWO[0], call_turn(reasoning="Sum."), ("tool", "2"), Message("assistant", "Me.", reasoning="So."))
    assert show("qwen3_like", *turns) == [
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n[[<think>\nSum.\n</think>\n\n"
        '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>]]\n<|im_start|>tool\n2<|im_end|>\n'
        "<|im_start|>assistant\n[[<think>\nSo.\n</think>\n\nMe.<|im_end|>]]\n"
    ]


def test_mistral(show):
    assert show("mistral_like", *TWO) == ["<s>[INST] Who? [/INST][[ Me.</s>]][INST] ask [/INST][[ You.</s>]]"]


def test_gemma(show):
    assert show("gemma_like", *TWO) == [
        "<s><start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\n[[Me.<end_of_turn>]]\n"
        "<start_of_turn>user\nask<end_of_turn>\n<start_of_turn>model\n[[You.<end_of_turn>]]\n"
    ]


def test_alpaca_ends_answers_in_the_eos_token(show):
    assert show("alpaca", ("system", "Be."), *TWO) == [
        "<s>Be.\n\n### Instruction:\nWho?\n\n### Response:\n[[Me.</s>]]"
        "\n\n### Instruction:\nask\n\n### Response:\n[[You.</s>]]"
    ]


def test_deepseek_puts_reasoning_behind_its_prompt(show):
    first = Message("assistant", "Me.", reasoning="I think.")
    inline = ("assistant", "<think>\nAh.\n</think>\n\nYou.")
    assert show("deepseek_like", TWO[0], first, TWO[2], inline) == [
        "<s><｜User｜>Who?<｜Assistant｜><think>\n[[I think.\n</think>\n\nMe.<｜end▁of▁sentence｜>]]",
        "<s><｜User｜>Who?<｜Assistant｜>Me.<｜end▁of▁sentence｜><｜User｜>ask<｜Assistant｜><think>\n"
        "[[Ah.\n</think>\n\nYou.<｜end▁of▁sentence｜>]]",
    ]


def test_deepseek_without_reasoning_stays_as_rendered(show, make_encoder, make_chat):
    assert show("deepseek_like", *TWO) == [
        "<s><｜User｜>Who?<｜Assistant｜>[[Me.<｜end▁of▁sentence｜>]]<｜User｜>ask<｜Assistant｜>"
        "[[You.<｜end▁of▁sentence｜>]]"
    ]
    [sample] = make_encoder("deepseek_like").encode(make_chat(*TWO))
    assert sample.remarks == ("has no reasoning, which the generation prompt opens: trained without <think>",)


def test_gptoss_ends_each_answer_as_the_last(show):
    first = Message("assistant", "Me.", reasoning="I think.")
    assert show("gptoss_like", TWO[0], first, TWO[2], TWO[3]) == [
        "<|start|>user<|message|>Who?<|end|><|start|>assistant[[<|channel|>analysis<|message|>I think.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Me.<|return|>]]",
        "<|start|>user<|message|>Who?<|end|><|start|>assistant<|channel|>final<|message|>Me.<|end|>"
        "<|start|>user<|message|>ask<|end|><|start|>assistant[[<|channel|>final<|message|>You.<|return|>]]",
    ]


def test_gptoss_shows_the_answer_the_thoughts_that_it_will_see(show, call_turn):
    turns = (TWO[0], call_turn(reasoning="Sum."), ("tool", "2"), Message("assistant", "Me.", reasoning="So."))
    called = (
        "<|start|>user<|message|>Who?<|end|><|start|>assistant[[<|channel|>analysis<|message|>Sum.<|end|>"
        '<|start|>assistant to=add<|message|>{"a": 1}<|call|>]]'
    )
    assert show("gptoss_like", *turns) == [
        called + "<|start|>tool to=assistant<|message|>2<|end|><|start|>assistant"
        "[[<|channel|>analysis<|message|>So.<|end|><|start|>assistant<|channel|>final<|message|>Me.<|return|>]]"
    ]


def test_a_token_that_closes_the_conversation_is_no_end_of_turn(show):
    assert show("phi3_like", *TWO) == [
        "<|user|>\nWho?<|end|>\n<|assistant|>\n[[Me.<|end|>]]\n<|user|>\nask<|end|>\n<|assistant|>\n[[You.<|end|>]]\n</s>"
    ]


@pytest.mark.parametrize("name", ["tagged_too_much", "tagged_too_little"])
def test_generation_tags_are_corrected_by_the_rule(show, name):
    assert show(name, *TWO) == [
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n[[Me.<|im_end|>]]\n"
        "<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\n[[You.<|im_end|>]]\n"
    ]


def test_a_template_without_end_of_turn_gets_the_eos_token(show):
    assert show("no_end", *TWO) == ["Q: Who?\nA: [[Me.</s>]]", "Q: Who?\nA: Me.\nQ: ask\nA: [[You.</s>]]"]


def test_a_template_that_reorders_turns_is_refused(show):
    with pytest.raises(BadRow, match=r"reordering.jinja: message 2 \(assistant\) is not written behind its generation"):
        show("reordering", *TWO)


def test_an_answer_without_a_question_is_refused_where_no_prompt_can_be_written(show, tmp_path):
    assert show("chatml", TWO[1]) == ["<|im_start|>assistant\n[[Me.<|im_end|>]]\n"]
    first = "{% if messages[0].role %}{% endif %}"
    (tmp_path / "strict.jinja").write_text(first + (TEMPLATES / "llama3_like.jinja").read_text())
    with pytest.raises(BadRow, match=r"message 1 \(assistant\) opens the conversation"):
        show(str(tmp_path / "strict.jinja"), TWO[1])


def test_what_is_trained_follows_train_on_and_each_message(show):
    head = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    tail = "\n<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\n"
    untrained = Message("assistant", "Me.", is_trained=False)
    assert show("chatml", *TWO, train_on="last") == [f"{head}Me.<|im_end|>{tail}[[You.<|im_end|>]]\n"]
    assert show("chatml", *TWO, train_on="all") == [f"[[{head}Me.<|im_end|>{tail}You.<|im_end|>\n]]"]
    assert show("chatml", TWO[0], untrained, *TWO[2:]) == [f"{head}Me.<|im_end|>{tail}[[You.<|im_end|>]]\n"]
    mixed = show("chatml", TWO[0], untrained, *TWO[2:], train_on="all")
    assert mixed == [f"[[{head}]]Me.<|im_end|>[[{tail}You.<|im_end|>\n]]"]
    with pytest.raises(BadRow, match="nothing in it is trained"):
        show("chatml", TWO[0], untrained)


def test_empty_answers_and_turns_behind_the_last_answer(show):
    head = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert show("chatml", TWO[0], ("assistant", ""), TWO[2]) == [
        f"{head}[[<|im_end|>]]\n<|im_start|>user\nask<|im_end|>\n"
    ]

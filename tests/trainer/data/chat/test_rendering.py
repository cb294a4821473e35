"""Templates render as in `transformers`, in a sandbox; calls and tools are given in the form that a template reads."""

from __future__ import annotations

import pytest

from trainer.data.chat.conversation import BadRow, Message, ToolCall
from trainer.data.chat.template import ChatTemplate

MESSAGES = [
    {"role": "system", "content": " Be. "},
    {"role": "user", "content": "Wer? Ä <b>"},
    {"role": "assistant", "content": "Me."},
    {"role": "user", "content": "ask"},
]
TOOL = {"type": "function", "function": {"name": "add", "description": "Ä", "parameters": {"b": 1, "a": 2}}}


def render(text, messages=MESSAGES, tools=(), **options):
    return ChatTemplate("mine", text, variables={"eos_token": "</s>"}).render(messages, tools, **options)


@pytest.mark.parametrize(
    "text",
    [
        "{{ tools[0] | tojson }}|{{ tools[0] | tojson(indent=2) }}|{{ messages[1].content | tojson }}",
        "{% for m in messages %}\n  {% if loop.first %}{% continue %}{% endif %}\n{{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{% if loop.index0 == 2 %}{% break %}{% endif %}{{ m.content | trim }}{% endfor %}",
        "{%- set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{{ strftime_now('%Y') }}{{ eos_token }}{{ bos_token }}{{ messages[0].name }}",
        "{% generation %}{{ messages[2].content }}{% endgeneration %} {{ add_generation_prompt }}",
    ],
)
def test_text_is_that_of_transformers(text):
    from transformers.utils.chat_template_utils import render_jinja_template

    judge, _ = render_jinja_template([MESSAGES], [TOOL], chat_template=text, eos_token="</s>", bos_token="<s>")
    template = ChatTemplate("mine", text, variables={"eos_token": "</s>", "bos_token": "<s>"})
    assert template.render(MESSAGES, [TOOL]).text == judge[0]


def test_blocks_of_generation_are_located():
    rendered = render("a{% generation %}bc{% endgeneration %}d{% generation %}{% endgeneration %}")
    assert (rendered.text, rendered.generated) == ("abcd", [(1, 3), (4, 4)])


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[9].content }}",
        "{{ 'a' + messages[0] }}",
        "{{ namespace(x=1).__init__.__globals__ }}",
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_one_sentence(text):
    with pytest.raises(BadRow, match="template mine refuses it: ") as error:
        render(text)
    assert "\n" not in str(error.value)


def test_arguments_are_given_as_the_template_reads_them(show, tmp_path):
    (tmp_path / "text.jinja").write_text(
        "{% for m in messages %}{{ m.role + ' ' + m.content }}{% for call in m.tool_calls or [] %}"
        "{{ call.function.name + call.function.arguments }}{% endfor %}</s>{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    call = Message("assistant", tool_calls=(ToolCall("add", {"a": "Ä"}),))
    assert show(str(tmp_path / "text.jinja"), ("user", "Who?"), call) == [
        'user Who?</s>assistant [[add{"a": "Ä"}</s>]]'
    ]


def test_calls_are_numbered_where_a_template_asks_for_ids(show, tmp_path, call_turn):
    (tmp_path / "ids.jinja").write_text(
        "{% for m in messages %}{{ m.role + ' ' + m.content }}{% for call in m.tool_calls or [] %}"
        "{% if call.id | length != 9 %}{{ raise_exception('no id') }}{% endif %}"
        "{{ call.function.name + (call.function.arguments | tojson) + call.id }}{% endfor %}{{ m.tool_call_id }}</s>"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    turns = (("user", "Who?"), call_turn(), ("tool", "2"), ("assistant", "Me."))
    assert show(str(tmp_path / "ids.jinja"), *turns) == [
        'user Who?</s>assistant [[add{"a": 1}call00000</s>]]tool 2call00000</s>assistant [[Me.</s>]]'
    ]


def test_nothing_is_lost_in_silence(make_encoder, make_chat, call_turn):
    thought = Message("assistant", "Me.", reasoning="So.")
    [sample] = make_encoder("llama3_like").encode(make_chat(("user", "Who?"), thought, tools=[TOOL]))
    assert [remark.partition(" leaves ")[2] for remark in sample.remarks] == [
        "out the definitions of tools",
        "out the reasoning of turns",
    ]
    with pytest.raises(BadRow, match="llama3_like.jinja writes no calls of tools"):
        make_encoder("llama3_like").encode(make_chat(("user", "Who?"), call_turn()))
    two = Message("assistant", tool_calls=(ToolCall("add", {}), ToolCall("add_all", {})), reasoning="add_all")
    with pytest.raises(BadRow, match="makes 2 calls, of which the template writes 1"):
        make_encoder("gptoss_like").encode(make_chat(("user", "Who?"), two))


def test_a_batch_holds_errors_in_their_place(make_encoder, make_chat):
    good, bad = make_chat(("user", "Who?"), ("assistant", "Me.")), make_chat(("assistant", "Me."))
    results = make_encoder("gemma_like").encode_batch([good, bad, good])
    assert [type(result) for result in results] == [list, BadRow, list]
    assert "Conversation roles must alternate" in str(results[1])
    assert results[0] == results[2] and (results[0][0].source, results[0][0].row) == ("chats.jsonl", 7)


def test_the_named_templates_are_the_known_formats(show, directory):
    turns = (("system", "Be."), ("user", "Who?"), ("assistant", "Me."))
    by_name = {
        "qwen": "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
        "[[Me.<|im_end|>]]\n",
        "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe.<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nWho?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[[Me.<|eot_id|>]]",
        "mistral": "<s>[INST] Be.\n\nWho?[/INST][[ Me.</s>]]",
        "gemma": "<s><start_of_turn>user\nBe.\n\nWho?<end_of_turn>\n<start_of_turn>model\n[[Me.<end_of_turn>]]\n",
    }
    assert {name: show(name, *turns)[0] for name in by_name} == by_name


def test_calls_of_the_named_templates(show, call_turn):
    turns = (("user", "Who?"), call_turn(), ("tool", "2"), ("assistant", "Me."))
    assert show("chatml", *turns)[0].endswith(
        '[[<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>]]\n<|im_start|>user\n'
        "<tool_response>\n2\n</tool_response><|im_end|>\n<|im_start|>assistant\n[[Me.<|im_end|>]]\n"
    )
    assert show("llama3", *turns)[0].endswith(
        '[[{"name": "add", "parameters": {"a": 1}}<|eot_id|>]]<|start_header_id|>ipython<|end_header_id|>\n\n2'
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[[Me.<|eot_id|>]]"
    )
    assert show("mistral", *turns)[0].endswith(
        '[/INST][[[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]</s>]]'
        '[TOOL_RESULTS] {"content": 2}[/TOOL_RESULTS][[ Me.</s>]]'
    )

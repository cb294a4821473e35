"""Where a chat template comes from, and the sentence where there is none or it does not fit the tokenizer."""

from __future__ import annotations

import json
import shutil

import pytest

from configs.errors import BadInput
from trainer.data.chat.template import NAMED_TEMPLATES, load_template

TEXT = "{% for message in messages %}{{ message.role + ':' + message.content + eos_token }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "Who?"}]


@pytest.fixture
def own(directory, tmp_path):
    """A tokenizer directory of the test's own, and a function that gives it a template in tokenizer_config.json."""
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)

    def configure(template):
        file = tmp_path / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))

    return tmp_path, configure


def test_the_tokenizers_own_template_is_found_in_each_place(own):
    path, configure = own
    (path / "chat_template.json").write_text(json.dumps({"chat_template": TEXT}))
    assert load_template(None, path).render(MESSAGES).text == "user:Who?</s>"
    configure("config " + TEXT)
    assert load_template(None, path).text == "config " + TEXT
    configure([{"name": "default", "template": "list " + TEXT}, {"name": "tool_use", "template": "tools " + TEXT}])
    template = load_template(None, path)
    assert template.render(MESSAGES).text == "list user:Who?</s>"
    assert template.render(MESSAGES, [{"type": "function"}]).text == "tools user:Who?</s>"
    (path / "chat_template.jinja").write_text("file " + TEXT)
    assert load_template(None, path).text == "file " + TEXT


def test_a_template_is_read_from_a_file_or_by_name(own):
    path, _ = own
    (path / "mine.jinja").write_text(TEXT)
    assert load_template(str(path / "mine.jinja"), path).render(MESSAGES).text == "user:Who?</s>"
    for name in NAMED_TEMPLATES:
        assert "Who?" in load_template(name, path).render(MESSAGES).text


def test_refusals_name_the_field_and_a_value_that_works(own):
    path, configure = own
    with pytest.raises(BadInput, match=r"sft.template: the tokenizer in .* has no chat template and none is named"):
        load_template(None, path)
    with pytest.raises(BadInput, match=r"sft.template: vicuna is neither the name of a template \(chatml, llama3"):
        load_template("vicuna", path)
    (path / "bad.jinja").write_text("{% for x in messages %}\n{{ x }")
    with pytest.raises(BadInput, match=r"grpo.template: template .*bad.jinja is not valid Jinja \(line 2"):
        load_template(str(path / "bad.jinja"), path, field="grpo.template")
    configure([{"name": "rag", "template": TEXT}])
    with pytest.raises(BadInput, match="has the chat templates rag and no default"):
        load_template(None, path)


def test_a_chat_token_that_the_tokenizer_lacks_is_refused_by_name(make_tokenizer, make_encoder):
    directory = make_tokenizer(tokens=("<s>", "</s>", "<|im_start|>"))
    with pytest.raises(BadInput, match=r"sft.template: template chatml needs the chat token <\|im_end\|>"):
        make_encoder("chatml", directory=directory)


def test_a_template_without_answers_is_refused(make_encoder, own):
    path, _ = own
    (path / "mute.jinja").write_text("{% for message in messages %}{{ message.role }}{% endfor %}")
    with pytest.raises(BadInput, match="leaves out what the assistant says"):
        make_encoder(str(path / "mute.jinja"))


def test_the_fingerprint_changes_with_all_that_changes_the_text(own):
    path, configure = own
    configure(TEXT)
    first = load_template(None, path).fingerprint
    assert load_template(None, path).fingerprint == first
    configure(TEXT + " ")
    assert load_template(None, path).fingerprint != first

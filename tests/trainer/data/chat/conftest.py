"""Small tokenizers with chat tokens, templates written for the tests, and encoders of both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.data.chat.check import show_sample
from trainer.data.chat.conversation import Conversation, Message, ToolCall
from trainer.data.chat.encode import ChatEncoder
from trainer.data.chat.template import load_template
from trainer.data.tokenizer import load_tokenizer

TEMPLATES = Path(__file__).parent / "templates"
CHAT_TOKENS = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>", "<start_of_turn>"),
    *("<end_of_turn>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<|start|>", "<|end|>", "<|call|>"),
    *("<|return|>", "<|message|>", "<|channel|>", "<|user|>", "<|assistant|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eot_id|>"),
)
# Words as Qwen and Llama 3 split them: line breaks stay together, whatever follows.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXT = [
    "ask\n\nMe\n\nask answer [INST] [/INST] user assistant model tool think ### Response:\n\n a  b\n",
    "Who? Me. You.",
]


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory):
    """Write a byte-level tokenizer with the tokens given, of which <think> is an ordinary added one."""

    def make(tokens=CHAT_TOKENS, words=WORDS, **config):
        backend = Tokenizer(models.BPE())
        split = [pre_tokenizers.Split(Regex(words), "isolated")] if words else []
        split.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not words))
        backend.pre_tokenizer = pre_tokenizers.Sequence(split)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator(TEXT, trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
        backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
        directory = tmp_path_factory.mktemp("tokenizer")
        backend.save(str(directory / "tokenizer.json"))
        config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast", **config}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        return directory

    return make


@pytest.fixture(scope="session")
def directory(make_tokenizer):
    return make_tokenizer()


@pytest.fixture
def make_encoder(directory):
    """Build an encoder of a named template or of one in `templates/`."""

    def make(name, train_on="assistant", directory=directory):
        file = TEMPLATES / f"{name}.jinja"
        template = load_template(str(file) if file.exists() else name, directory)
        return ChatEncoder(template, load_tokenizer(directory), train_on)

    return make


@pytest.fixture
def show(make_encoder):
    """Encode turns, given as (role, text) or messages, and return the samples as text, [[ ]] around what is trained."""

    def run(name, *turns, train_on="assistant", tools=(), **options):
        encoder = make_encoder(name, train_on, **options)
        return [show_sample(sample, encoder.tokenizer) for sample in encoder.encode(chat(*turns, tools=tools))]

    return run


def chat(*turns, tools=()):
    messages = tuple(turn if isinstance(turn, Message) else Message(*turn) for turn in turns)
    return Conversation(messages, tuple(tools), "chats.jsonl", 7)


@pytest.fixture
def make_chat():
    return chat


@pytest.fixture
def call_turn():
    """A turn of the assistant that calls a tool."""
    return lambda **more: Message("assistant", tool_calls=(ToolCall("add", {"a": 1}),), **more)


@pytest.fixture
def apply_transformers(directory):
    """What `transformers` makes of messages: `apply(name, messages, **options)`."""
    from transformers import PreTrainedTokenizerFast

    def apply(name, messages, directory=directory, **options):
        file = TEMPLATES / f"{name}.jinja"
        text = file.read_text() if file.exists() else load_template(name, directory).text
        judge = PreTrainedTokenizerFast.from_pretrained(directory)
        return judge.apply_chat_template(messages, chat_template=text, **options)

    return apply

"""The guard over encoded samples: what it refuses, and that the first such sample is shown."""

from __future__ import annotations

from dataclasses import replace

import pytest

from configs.errors import BadInput
from trainer.data.chat.check import check_samples


@pytest.fixture
def encoder(make_encoder):
    return make_encoder("chatml")


@pytest.fixture
def sample(encoder, make_chat):
    [sample] = encoder.encode(make_chat(("user", "Who?"), ("assistant", "Me."), ("user", "ask"), ("assistant", "You.")))
    return sample


def test_good_samples_pass(encoder, sample):
    check_samples([sample, sample], "assistant", encoder.tokenizer)
    whole = replace(sample, loss_mask=[1] * len(sample.input_ids), ends=(), turns=())
    check_samples([whole], "all", encoder.tokenizer)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda mask, ends: [0] * len(mask), "has no trained token"),
        (lambda mask, ends: [1] * len(mask), "is trained from its first token to its last"),
        (
            lambda mask, ends: [0 if place in ends else flag for place, flag in enumerate(mask)],
            "end-of-turn token is not",
        ),
        (
            lambda mask, ends: [1 if place == ends[0] + 1 else flag for place, flag in enumerate(mask)],
            "does not end in",
        ),
        (lambda mask, ends: mask[1:], "tokens and a mask for"),
    ],
)
def test_masks_that_cannot_be_meant_are_refused(change, problem, encoder, sample):
    bad = replace(sample, loss_mask=change(sample.loss_mask, sample.ends), row=12)
    with pytest.raises(BadInput, match=rf"^sft.train: row 12 of chats.jsonl .*{problem}"):
        check_samples([sample, bad], "assistant", encoder.tokenizer)


def test_the_first_bad_sample_is_shown(encoder, sample):
    mask = [0 if place == sample.ends[1] else flag for place, flag in enumerate(sample.loss_mask)]
    with pytest.raises(BadInput) as error:
        check_samples([replace(sample, loss_mask=mask)], "assistant", encoder.tokenizer)
    assert str(error.value).endswith(
        "what is trained:\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n[[Me.<|im_end|>]]\n"
        "<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\n[[You.]]<|im_end|>\n"
    )

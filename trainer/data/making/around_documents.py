"""What its maker should hear of the tokens around a dataset's documents: no BOS, or an end that is a turn's.

Knows nothing of the documents. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.data.making.workers import Recipe
from trainer.data.tokenizer import Tokenizer, read_json, special_tokens, template_prefix

_DECORATION = str.maketrans("", "", "<>[]|｜_▁ ")
_ENDS_OF_TEXT = {"endoftext", "endofsentence", "eos", "/s", "eostoken"}  # as base models call theirs, undecorated


def find_notes(recipe: Recipe, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield a sentence for each way in which the data would differ from what the tokenizer's owner trained on."""
    if tokenizer.bos_id is None:
        begin = _own_begin(tokenizer)
        if begin is not None:
            yield (
                f"documents begin without BOS, while tokenizer {recipe.tokenizer} itself puts {begin} in front of "
                "every text, as inference will; --bos puts it in front of every document"
            )
    if recipe.eod is None and not _is_end_of_text(tokenizer.eod_token):
        other = next(filter(_is_end_of_text, special_tokens(tokenizer.backend)), None)
        if other is not None or tokenizer.eod_token in _chat_template(Path(tokenizer.directory)):
            token = "TOKEN" if other is None else f"'{other}'"
            yield (
                f"documents end in {tokenizer.eod_token}, the eos token of tokenizer {recipe.tokenizer}, which by its "
                f"name or chat template ends a turn of a conversation; --eod {token} ends them in another"
            )


def _own_begin(tokenizer: Tokenizer) -> str | None:
    """Return the token that the tokenizer, used as its owner does, would begin a text with."""
    prefix = template_prefix(tokenizer.backend)
    if prefix:
        return tokenizer.backend.id_to_token(prefix[0])
    # transformers obeys this where tokenizer.json has no template
    return (
        "its BOS token" if read_json(Path(tokenizer.directory) / "tokenizer_config.json").get("add_bos_token") else None
    )


def _is_end_of_text(token: str) -> bool:
    return token.lower().translate(_DECORATION) in _ENDS_OF_TEXT


def _chat_template(path: Path) -> str:
    """Return the chat templates of a tokenizer directory as one text, from either place they are kept in."""
    found = read_json(path / "tokenizer_config.json").get("chat_template")
    file = path / "chat_template.jinja"
    return str(found or "") + (file.read_text(encoding="utf-8", errors="replace") if file.is_file() else "")

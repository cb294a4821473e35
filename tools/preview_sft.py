"""Show what a recipe makes of its conversations, or of its preferences: which tokens are trained, what is left out.

Run: python tools/preview_sft.py RECIPE [key=value ...] [--stage reward] [--split validation] [--html F] ...
Trained tokens are green, or between [[ and ]] where there are no colours; special tokens are bold. `--json` has an
object a sample, before packing: source, row (from 0), input_ids, loss_mask, dropped, and of an answer its side.
"""

from __future__ import annotations

import argparse
import html
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.errors import BadInput
from configs.load import load_config, stage_of_recipe
from tools.console import Progress, end_process, run_command
from tools.html_page import draw_table, write_page
from tools.outputs import check_file
from tools.paths import path_argument

if TYPE_CHECKING:
    from configs.stages import ComparisonsConfig, SftConfig
    from trainer.data.chat.encode import Sample
    from trainer.data.chat.worker import EncodedRow
    from trainer.data.tokenizer import Tokenizer

STYLES = {"trained": "green", "context": "default", "special": "bold yellow", "trained special": "bold green"}
COLOURS = {"trained": "#1a7f37", "context": "#57606a", "special": "#9a6700", "trained special": "#116329"}
_STAGES = ("sft", "distill", "teacher_cache", "preference", "reward")
Piece = tuple[str, str]
"""What a token spells, and its kind."""


def encode_rows(config: SftConfig | ComparisonsConfig, split: str) -> Iterator[EncodedRow]:
    """Yield what becomes of every row of a split's sources; rows that a run refuses come as dropped ones."""
    from trainer.data.chat.preference_worker import open_worker
    from trainer.data.chat.rows import iter_blocks, list_chat_files
    from trainer.data.chat.worker import Recipe
    from trainer.data.making.documents import describe_left_out

    section = _section(config)
    lenient = config.model_copy(update={section: getattr(config, section).model_copy(update={"bad_rows": "drop"})})
    for number, source in enumerate(config.sources(split)):  # type: ignore[arg-type]
        recipe = Recipe.of(lenient, f"{section}.{split}[{number}]", source)
        worker = open_worker(recipe)
        files, left_out = list_chat_files(source, recipe.field)
        if left_out:
            print(f"{source.path}: left out: {describe_left_out(left_out)}; to read another split, name its folder")
        num_bytes = sum(file.num_bytes for file in files)
        with Progress(f"tokenising {source.path}", num_bytes) as progress:
            done = 0
            for block in iter_blocks(source, recipe.field):
                yield from worker.encode(block)
                done += block.num_disk_bytes
                progress.show(done)


def _section(config: SftConfig | ComparisonsConfig) -> str:
    return config.source_field("train").partition(".")[0]


def side_of(sample: Sample) -> str | None:
    """Return the side of an answer of preferences, as its mask has it."""
    from trainer.data.packed_source import CHOSEN, MISMATCHED, REJECTED

    return {CHOSEN: "chosen", REJECTED: "rejected", MISMATCHED: "mismatched"}.get(max(map(int, sample.loss_mask)))


def spell(tokenizer: Tokenizer, input_ids: Sequence[int], loss_mask: Sequence[int]) -> Iterator[Piece]:
    """Yield what each token of a sample spells and its kind; the bytes of a character are shown at the last of them."""
    special = {token.content for token in tokenizer.backend.get_added_tokens_decoder().values() if token.special}
    waiting: list[int] = []
    for token, is_trained in zip(input_ids, loss_mask, strict=True):
        text = tokenizer.backend.id_to_token(token) or ""
        is_special = text in special
        if not is_special:
            waiting.append(token)
            text = tokenizer.backend.decode(waiting, skip_special_tokens=False)
            text = "" if text.endswith("\ufffd") and len(waiting) < 4 else text
        if text:
            waiting.clear()
        yield text, ("trained " * bool(is_trained) + "special" * is_special).strip() or "context"


def mark(pieces: Sequence[Piece]) -> str:
    """Return a sample as text with [[ ]] around what is trained."""
    runs = [
        (is_trained, "".join(text for text, _ in run))
        for is_trained, run in groupby(pieces, key=lambda piece: piece[1].startswith("trained"))
    ]
    return "".join(f"[[{text}]]" if is_trained else text for is_trained, text in runs)


def summarise(config: SftConfig | ComparisonsConfig, rows: Sequence[EncodedRow]) -> list[tuple[str, str]]:
    """Return what a person wants to know of all samples: lengths, trained share, packing, what is left out and why."""
    import numpy as np

    from trainer.data.packing import pack_best_fit, place_alone

    section, is_paired = getattr(config, _section(config)), "pairs" in config.packing
    samples = [sample for row in rows for sample in row.samples]
    dropped = Counter(row.dropped for row in rows if row.dropped is not None)
    table = [("rows", f"{len(rows):,}"), ("samples", f"{len(samples):,}")]
    if samples:
        lengths = np.array([len(sample.input_ids) for sample in samples])
        trained = sum(sum(map(bool, sample.loss_mask)) for sample in samples)
        low, half, high = (int(value) for value in np.quantile(lengths, (0, 0.5, 1), method="nearest"))
        table.append(("tokens of a sample", f"{low:,} to {high:,}, half of them up to {half:,}"))
        table.append(("trained", f"{trained:,} of {int(lengths.sum()):,} tokens ({trained / lengths.sum():.1%})"))
        seq_len = config.train.seq_len
        pack = place_alone if config.packing == "padded" else pack_best_fit
        read = lengths if config.packing == "scored_pairs" else lengths - 1
        places = read.reshape(-1, 2).sum(axis=1) if is_paired else read
        num_rows = pack(np.bincount(places, minlength=seq_len + 1), seq_len).num_rows
        filled = places.sum() / (num_rows * seq_len)
        table.append(("rows of train.seq_len", f"{num_rows:,} of {seq_len:,} tokens, {filled:.1%} of them filled"))
    remarks = Counter(remark for sample in samples for remark in sample.remarks)
    table += [("to know", f"in {count:,} samples {remark}") for remark, count in remarks.most_common()]
    num_truncated = sum(row.num_truncated for row in rows)
    if num_truncated:
        longest = max(length for row in rows for length in row.lengths)
        table.append(("cut at train.seq_len", f"{num_truncated:,} samples, the longest of {longest:,} tokens"))
    if is_paired and samples:
        sides = Counter(side_of(sample) for sample in samples)
        table.append(("answers", ", ".join(f"{count:,} {side}" for side, count in sides.most_common())))
    refusal = f", which a run refuses ({_section(config)}.bad_rows=refuse)" if section.bad_rows == "refuse" else ""
    for reason, count in dropped.most_common():
        is_bad = refusal if "train.seq_len" not in reason else ""
        table.append(("left out", f"{count:,} rows{is_bad}: {reason}"))
    return table


def headings(row: EncodedRow, has_sides: bool) -> Iterator[str]:
    """Yield what stands above each sample of a row: where it comes from, its side, and what of it is cut."""
    for sample, length in zip(row.samples, row.lengths, strict=True):
        kept = len(sample.input_ids)
        cut = f", cut to {kept:,} of {length:,} tokens" if kept < length else ""
        side = f", {side_of(sample)}" if has_sides else ""
        yield f"{row.file}, row {row.row}{side}{cut}"


def write_json(path: Path, rows: Sequence[EncodedRow], has_sides: bool) -> None:
    """Write an object a sample, and one for each row, or part of one, that is left out."""
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            found: list[dict[str, Any]] = [
                {
                    "input_ids": list(sample.input_ids),
                    "loss_mask": [int(bool(one)) for one in sample.loss_mask],
                    "dropped": None,
                    **({"side": side_of(sample)} if has_sides else {}),
                }
                for sample in row.samples
            ]
            if row.dropped is not None:
                found.append({"input_ids": [], "loss_mask": [], "dropped": row.dropped})
            for entry in found:
                stream.write(json.dumps({"source": row.file, "row": row.row, **entry}, ensure_ascii=False) + "\n")


def write_html(
    path: Path, title: str, table: Sequence[tuple[str, str]], shown: Sequence[tuple[str, list[Piece]]]
) -> None:
    """Write a page with the summary and the samples, each token in the colour of its kind."""
    colours = (f".{kind.replace(' ', '-')}{{color:{colour}}}" for kind, colour in COLOURS.items())
    style = "".join(colours) + ".trained,.trained-special{background:#dafbe1}"
    parts = [draw_table(table)]
    for heading, pieces in shown:
        spans = "".join(f"<span class={k.replace(' ', '-')}>{html.escape(text)}</span>" for text, k in pieces)
        parts.append(f"<h3>{html.escape(heading)}</h3><pre>{spans}</pre>")
    write_page(path, title, style, parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(prog="preview_sft.py", description="What a recipe makes of its conversations.")
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--stage", choices=_STAGES, help="default: that of the recipe's folder or file, else sft")
    parser.add_argument("--split", choices=("train", "validation"), default="train")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="samples to print (default: 3)")
    parser.add_argument("--html", type=path_argument, metavar="FILE", help="write a page with 100 samples")
    parser.add_argument("--json", type=path_argument, metavar="FILE", help="write an object a sample")
    arguments = parser.parse_intermixed_args(argv)
    named = stage_of_recipe(arguments.recipe)
    arguments.stage = arguments.stage or (named if named in _STAGES else "sft")
    if arguments.show < 0:
        parser.error(f"--show: {arguments.show} is less than 0; a value that would work: 3")

    def command() -> None:
        for option, path in (("--html", arguments.html), ("--json", arguments.json)):
            if path is not None:
                check_file(path, option)
        if arguments.html is not None and arguments.html == arguments.json:
            raise BadInput(
                f"--json {arguments.json}: is the file of --html too; a value that would work: samples.jsonl"
            )
        preview(arguments)

    return run_command(command)


def preview(arguments: argparse.Namespace) -> None:
    """Print and write what was asked for. Raises BadInput."""
    from configs.rules.data import check_data
    from configs.stages import ComparisonsConfig, DistillConfig, SftConfig
    from trainer.data.tokenizer import load_tokenizer

    config = load_config(arguments.recipe, arguments.overrides, arguments.stage)
    assert isinstance(config, SftConfig | ComparisonsConfig)
    if isinstance(config, DistillConfig) and config.is_of_text:
        raise BadInput(
            "sft.train: names no conversations, and text of data.train has nothing to show; a value that would work: "
            "[{path: chats.jsonl}]"
        )
    problems = list(check_data(config))
    if problems:
        raise BadInput("\n".join(problems))
    if not config.sources(arguments.split):
        raise BadInput(
            f"{_section(config)}.{arguments.split}: the recipe names no source; a value that would work: "
            "[{path: chats.jsonl}]"
        )
    tokenizer = load_tokenizer(str(config.data.tokenizer))
    rows = list(encode_rows(config, arguments.split))
    table = summarise(config, rows)
    has_sides = isinstance(config, ComparisonsConfig)
    samples = [pair for row in rows for pair in zip(headings(row, has_sides), row.samples, strict=True)]
    pieces = [(title, list(spell(tokenizer, one.input_ids, one.loss_mask))) for title, one in samples[:100]]
    _print(table, pieces[: arguments.show])
    if arguments.json is not None:
        write_json(arguments.json, rows, has_sides)
    if arguments.html is not None:
        write_html(arguments.html, f"{arguments.recipe}: {arguments.split}", table, pieces)


def _print(table: Sequence[tuple[str, str]], shown: Sequence[tuple[str, list[Piece]]]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    for title, pieces in shown:
        console.print(title, style="underline", markup=False)
        if console.color_system is None:
            console.print(mark(pieces), markup=False)
        else:
            console.print(Text.assemble(*((text, STYLES[kind]) for text, kind in pieces)))
        console.print()
    for name, value in table:
        console.print(f"{name:<24}{value}", markup=False)


if __name__ == "__main__":
    end_process(main)

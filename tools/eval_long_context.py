"""How well a model uses long contexts: perplexity by position, and passkey retrieval by length and depth.

Run: [torchrun --nproc-per-node N] tools/eval_long_context.py MODEL --data PREFIX --lengths 1024,4096 --out DIR
[parallel.cp=N ...]. Writes long_context.json, passkeys.png and perplexity.png, and TensorBoard events, in DIR.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.errors import BadInput
from tools.console import Progress, end_process, run_command
from tools.open_model import open_model, read_config_of
from tools.outputs import check_directory
from tools.paths import path_argument, path_text
from tools.ranks import read_environment

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from trainer.engine.sharded_model import ShardedModel
    from trainer.evaluate.long_context import Bucket, Cell
    from trainer.evaluate.passkey import PasskeyMaker


@dataclass(frozen=True)
class Result:
    """Everything that was measured of one model."""

    model: str
    data: str
    layout: dict[str, int]
    seed: int
    digits: int
    """Of a passkey."""
    keys: int
    """Passkeys asked in each cell."""
    perplexity: list[Bucket]
    passkeys: list[Cell]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = _parse(argv)
    return run_command(lambda: _evaluate(arguments), "stopped; nothing was written, start it again", takes_ranks=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="eval_long_context.py", description="Perplexity by position, and passkeys by length and depth."
    )
    parser.add_argument("model", type=path_argument, help="run directory, checkpoint, or Hugging Face directory")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="fields such as parallel.cp=2 or model.rope.*"
    )
    parser.add_argument("--data", type=path_text, required=True, metavar="PREFIX", help="dataset with long documents")
    parser.add_argument(
        "--lengths", type=_read_lengths, required=True, metavar="N,N", help="context lengths in tokens: 1024,4096"
    )
    parser.add_argument("--documents", type=int, default=16, metavar="N", help="documents for perplexity (default: 16)")
    parser.add_argument("--depths", type=int, default=5, metavar="N", help="places of the passkey (default: 5)")
    parser.add_argument("--keys", type=int, default=4, metavar="N", help="texts a length and depth (default: 4)")
    parser.add_argument("--digits", type=int, default=5, metavar="N", help="digits of a passkey (default: 5)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the passkeys and the text around them")
    parser.add_argument("--out", type=path_text, required=True, metavar="DIR", help="directory for the results")
    arguments = parser.parse_intermixed_args(argv)
    for name, least in (("documents", 1), ("depths", 1), ("keys", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name}: {getattr(arguments, name)} is too few; a value that would work: {least}")
    return arguments


def _read_lengths(text: str) -> list[int]:
    """Return the numbers of a list such as 1024,4096 in their order."""
    words = text.split(",")
    if not all(word.isdecimal() and int(word) for word in words) or len(set(words)) < len(words):
        raise argparse.ArgumentTypeError(f"{text} is no list of different lengths; one that would work: 1024,4096")
    return sorted(int(word) for word in words)


def _evaluate(arguments: argparse.Namespace) -> None:
    from trainer.data.indexed import TokenDataset, check_tokenizer, check_vocab_size
    from trainer.data.tokenizer import load_tokenizer
    from trainer.evaluate.long_documents import read_long_documents
    from trainer.evaluate.passkey import PasskeyMaker

    check_directory(arguments.out, "runs/demo/evaluation")
    environment, lengths = read_environment(), arguments.lengths
    for length in lengths:  # each must suit the layout
        config = read_config_of(
            arguments.model,
            arguments.overrides,
            seq_len=length,
            world_size=environment.world_size,
            seq_len_option="--lengths",
        )
    if config.data.tokenizer is None:
        raise BadInput("data.tokenizer: the passkeys need the model's tokenizer; give data.tokenizer=DIR")
    tokenizer, dataset = load_tokenizer(config.data.tokenizer), TokenDataset(arguments.data)
    check_tokenizer(dataset, tokenizer)
    check_vocab_size(dataset, config.model.vocab_size)
    maker = PasskeyMaker(tokenizer, dataset, arguments.digits)
    if lengths[0] < maker.shortest:
        raise BadInput(f"--lengths: {lengths[0]} tokens are too few to hide a passkey in; at least {maker.shortest}")
    documents = read_long_documents(dataset, lengths[-1], arguments.documents)
    if environment.rank == 0:
        _make_directory(arguments.out)
        if len(documents) < arguments.documents:
            print(f"{arguments.data}: {len(documents)} documents have more than {lengths[-1]} tokens, all are taken")
    with open_model(config, arguments.model, environment) as model:
        result = _measure(model, documents, maker, arguments)
    if environment.rank == 0:
        _show(result)
        _write(result, Path(arguments.out))


def _make_directory(out: str) -> None:
    """Make the directory of the results before anything is measured. Raises BadInput where that cannot be."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(
            f"--out {out}: cannot be made ({error.strerror}); a value that would work: runs/demo/evaluation"
        ) from error


def _measure(
    model: ShardedModel, documents: NDArray[np.int64], maker: PasskeyMaker, arguments: argparse.Namespace
) -> Result:
    """Measure every bucket and cell. Collective: all ranks of the world must call this."""
    from trainer.evaluate.long_context import measure_passkeys, measure_perplexity

    lengths = arguments.lengths
    depths = [place / max(arguments.depths - 1, 1) for place in range(arguments.depths)]
    pairs = [(length, depth) for length in lengths for depth in depths]
    costs = [float(length) * arguments.keys for length, _ in pairs]
    first = float(documents.size)
    with _progress(first + sum(costs), model) as show:
        buckets = measure_perplexity(model, documents, [0, *lengths])
        show(first)
        cells = []
        for place, (length, depth) in enumerate(pairs):
            cells.append(measure_passkeys(model, maker, length, depth, arguments.keys, arguments.seed))
            show(first + sum(costs[: place + 1]))
    return Result(
        str(arguments.model),
        arguments.data,
        model.mesh.sizes(),
        arguments.seed,
        arguments.digits,
        arguments.keys,
        buckets,
        cells,
    )


@contextlib.contextmanager
def _progress(total: float, model: ShardedModel) -> Iterator[Callable[[float], None]]:
    """Show progress in tokens, on rank 0 alone."""
    if model.mesh.rank != 0:
        yield lambda done: None
        return
    with Progress("evaluation", total) as progress:
        yield progress.show


def _show(result: Result) -> None:
    """Print both tables."""
    ranks = result.layout["world"]
    print(f"{result.model} on {ranks} rank{'s' if ranks > 1 else ''}, text of {result.data}")
    print("positions            perplexity     loss    tokens")
    for one in result.perplexity:
        span = f"{one.first} to {one.end - 1}"
        print(f"{span:<18} {one.perplexity:12.2f} {one.loss:8.3f} {one.num_tokens:9d}")
    depths = sorted({cell.depth for cell in result.passkeys})
    print(
        f"passkeys of {result.digits} digits found at depth "
        + " ".join(f"{depth:5.0%}" for depth in depths)
        + "   loss of the answer"
    )
    for length in sorted({cell.length for cell in result.passkeys}):
        row = [cell for cell in result.passkeys if cell.length == length]
        mean_loss = sum(cell.loss for cell in row) / len(row)
        shares = " ".join(f"{cell.accuracy:5.0%}" for cell in sorted(row, key=lambda cell: cell.depth))
        print(f"{length:>28} tokens  {shares}   {mean_loss:.3f}")


def _write(result: Result, directory: Path) -> None:
    """Write the figures, the events and, last, the numbers."""
    from tools.long_context_figures import draw_passkeys, draw_perplexity
    from trainer.report.sinks import TensorBoard

    draw_passkeys(result.passkeys, directory / "passkeys.png")
    draw_perplexity(result.perplexity, directory / "perplexity.png")
    events = TensorBoard(directory / "tensorboard", 0)
    for bucket in result.perplexity:  # the horizontal axis is the position, or the length
        events.write({"step": bucket.end, "long_context/perplexity": bucket.perplexity})
    for length in sorted({cell.length for cell in result.passkeys}):
        row = [cell.accuracy for cell in result.passkeys if cell.length == length]
        events.write({"step": length, "long_context/passkey_accuracy": sum(row) / len(row)})
    events.close()
    content = {
        **asdict(result),
        "perplexity": [asdict(one) | {"perplexity": one.perplexity} for one in result.perplexity],
    }
    temporary = directory / "long_context.json.tmp"
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, directory / "long_context.json")
    print(f"{directory}: long_context.json, passkeys.png, perplexity.png, tensorboard/")


if __name__ == "__main__":
    end_process(main)

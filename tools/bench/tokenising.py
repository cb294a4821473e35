"""One file of chats tokenised in this process and its workers, started by `sft.py`; prints what it took as JSON.

Run: python -m tools.bench.tokenising ours|datasets|datasets_without_mask FILE.jsonl TOKENIZER CACHE PROCESSES
Imports are made before the clock starts. Torch-free as far as the libraries are.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configs.sections.sft import ConversationSource, SftSection
from tools.bench.chats import TAGGED_CHATML

_LONGEST = 1_000_000  # no sample is cut


def run_ours(chats: str, tokenizer: str, cache: str, num_processes: int) -> Callable[[], tuple[int, int]]:
    """Return what makes our cache and counts its samples and tokens."""
    from trainer.data.chat.cache import prepare_source, read_summary
    from trainer.data.chat.worker import Recipe

    sft = SftSection(template="chatml", cache=cache, num_workers=num_processes)
    recipe = Recipe(ConversationSource(path=chats), "sft.train[0]", tokenizer, sft, _LONGEST)

    def run() -> tuple[int, int]:
        summary = read_summary(prepare_source(recipe))
        return summary.num_samples, summary.num_tokens

    return run


def run_datasets(
    chats: str, tokenizer: str, cache: str, num_processes: int, with_mask: bool
) -> Callable[[], tuple[int, int]]:
    """Return what TRL's `SFTTrainer` does before packing: rows to Arrow, then a template and a tokenizer a row."""
    import datasets
    import transformers

    datasets.disable_progress_bars()

    def run() -> tuple[int, int]:
        loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)

        def tokenize(row: dict[str, Any]) -> dict[str, Any]:
            made = loaded.apply_chat_template(
                row["messages"],
                chat_template=TAGGED_CHATML,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=with_mask,
            )
            return {name: made[name] for name in ("input_ids", "assistant_masks") if name in made}

        rows = datasets.load_dataset("json", data_files=chats, split="train", cache_dir=cache)
        made = rows.map(tokenize, num_proc=num_processes, remove_columns=rows.column_names)
        return len(made), sum(map(len, made["input_ids"]))

    return run


def main(argv: Sequence[str]) -> int:
    """Tokenise as `argv` says."""
    side, chats, tokenizer, cache, num_processes = argv
    if side == "ours":
        run = run_ours(chats, tokenizer, cache, int(num_processes))
    else:
        run = run_datasets(chats, tokenizer, cache, int(num_processes), with_mask=side == "datasets")
    processor, started = _processor_seconds(), time.perf_counter()
    num_samples, num_tokens = run()
    figures = {
        "seconds": time.perf_counter() - started,
        "processor_seconds": _processor_seconds() - processor,
        "num_samples": num_samples,
        "num_tokens": num_tokens,
    }
    print(json.dumps(figures))
    return 0


def _processor_seconds() -> float:
    """Return the processor time of this process and of those it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

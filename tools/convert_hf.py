"""Hugging Face models in and out (ranks of a launcher share the work), and the proof that they compute the same.

Run: python tools/convert_hf.py import HF RUN_DIR | export CHECKPOINT HF | verify HF CHECKPOINT | model HF
CHECKPOINT is ours or one of Megatron-LM (torch_dist). Exit codes: 0, 1 differs (verify), 2 bad input, 5 another rank
was lost, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.errors import BadInput, ExitCode
from parallel.environment import Environment
from tools.console import Progress, end_process, run_command
from tools.paths import path_argument
from tools.ranks import host_ranks, read_environment

if TYPE_CHECKING:
    from trainer.hf.importing import ConversionReport

_TOLERANCE = 1e-4


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = _parse(argv)
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "import": _import,
        "export": _export,
        "verify": _verify,
        "model": _model,
    }
    codes: list[int] = []
    code = run_command(
        lambda: codes.append(commands[arguments.command](arguments)),
        "stopped; nothing was written, start it again",
        takes_ranks=True,
    )
    return code or codes[0]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="convert_hf.py", description="Hugging Face checkpoints in and out.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("import", help="Hugging Face model -> run directory")
    command.add_argument("hf_dir", type=path_argument, help="directory with config.json and safetensors files")
    command.add_argument("run_dir", type=path_argument, help="run directory to make")
    command = commands.add_parser("export", help="checkpoint -> Hugging Face model")
    command.add_argument(
        "checkpoint", type=path_argument, help="checkpoint, latest link, run directory, or Megatron-LM's"
    )
    command.add_argument("hf_dir", type=path_argument, help="directory to make")
    command.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="number format (default: the checkpoint's)")
    command.add_argument("--adapter", action="store_true", help="of a LoRA run: the adapters alone, as PEFT has them")
    command = commands.add_parser("verify", help="compare logits of transformers and the engine, in fp32")
    command.add_argument("hf_dir", type=path_argument, help="Hugging Face model")
    command.add_argument("checkpoint", type=path_argument, help="checkpoint, latest link or run directory")
    command.add_argument("--text", help="text to compare on (default: random tokens)")
    command.add_argument("--tolerance", type=float, default=_TOLERANCE, help=f"of a logit (default {_TOLERANCE:g})")
    command = commands.add_parser("model", help="print the model section of a Hugging Face model")
    command.add_argument("hf_dir", type=path_argument, help="directory with config.json")
    arguments = parser.parse_args(argv)
    if arguments.command == "verify" and not arguments.tolerance >= 0:
        parser.error(f"--tolerance: {arguments.tolerance} is no distance; give one such as {_TOLERANCE:g}")
    return arguments


def _import(arguments: argparse.Namespace) -> int:
    from trainer.hf.importing import import_checkpoint
    from trainer.hf.source import HfModel

    source = HfModel(arguments.hf_dir)
    total = sum(source.num_bytes(rule) for rule in source.rules.values())
    with host_ranks() as ranks, _progress("import", total, ranks) as show:
        report = import_checkpoint(
            source, arguments.run_dir, rank=ranks.rank, world_size=ranks.world_size, on_bytes=show
        )
    if ranks.rank == 0:
        _tell(f"{arguments.hf_dir} ({source.architecture}) -> {arguments.run_dir}", report)
        print(f"train from it: base: {arguments.run_dir / 'model.yaml'}, checkpoint.init_from={arguments.run_dir}")
    return ExitCode.DONE


def _export(arguments: argparse.Namespace) -> int:
    from trainer.hf.export_source import find_export_source
    from trainer.hf.exporting import DTYPES, export_checkpoint
    from trainer.hf.peft import export_adapter

    with host_ranks() as ranks:
        source = find_export_source(arguments.checkpoint, rank=ranks.rank, world_size=ranks.world_size)
        dtype = DTYPES[arguments.dtype] if arguments.dtype else None
        total = sum(file.stat().st_size for file in source.checkpoint.rglob("*.distcp"))
        with _progress("export", total, ranks) as show:
            if arguments.adapter:
                report = export_adapter(source, arguments.hf_dir, dtype=dtype, rank=ranks.rank)
            else:
                report = export_checkpoint(
                    source,
                    arguments.hf_dir,
                    dtype=dtype,
                    rank=ranks.rank,
                    world_size=ranks.world_size,
                    on_bytes=show,
                )
    if ranks.rank == 0:
        _tell(f"{source.checkpoint} -> {arguments.hf_dir}", report)
    if ranks.rank == 0 and not arguments.adapter:
        if not (arguments.hf_dir / "tokenizer.json").is_file():
            print("note: no tokenizer is known to this run; put its files beside the weights", file=sys.stderr)
        _warn_of_tokenizer(arguments.hf_dir)
    return ExitCode.DONE


def _verify(arguments: argparse.Namespace) -> int:
    import torch

    from tools.one_rank import open_checkpoint
    from trainer.hf.config_json import compare_models
    from trainer.hf.source import HfModel

    if read_environment().world_size > 1:
        raise BadInput("verify: compares on one rank; start it without a launcher.")
    source = HfModel(arguments.hf_dir)
    with open_checkpoint(arguments.checkpoint) as engine:
        from trainer.hf.verify import compare_with_transformers

        differences = compare_models(engine.config.model, source.model)
        if engine.head != source.head:
            differences.append(f"a {engine.head} head, not a {source.head} one")
        if differences:
            raise BadInput(
                f"{arguments.checkpoint}: is another architecture than {arguments.hf_dir} ({'; '.join(differences)}); "
                "compare the two that belong together."
            )
        if arguments.text is not None:
            from trainer.data.tokenizer import load_tokenizer

            tokens = torch.tensor([load_tokenizer(str(source.directory)).encode(arguments.text)])
            if tokens.numel() == 0:
                raise BadInput("--text: holds no token; give a few words.")
        else:
            length = min(64, source.model.max_position_embeddings)
            generator = torch.Generator().manual_seed(0)
            tokens = torch.randint(source.model.vocab_size, (2, length), generator=generator)
        result = compare_with_transformers(engine, source.directory, tokens)
    _warn_of_tokenizer(source.directory)
    print(f"tokens            {result.num_tokens}")
    print(f"max difference    {result.max_difference:.3e}")
    print(f"mean difference   {result.mean_difference:.3e}")
    if result.kl_divergence is not None:
        print(f"KL divergence     {result.kl_divergence:.3e} nats a token")
    if result.max_difference <= arguments.tolerance:
        print(f"the same within {arguments.tolerance:g}")
        return ExitCode.DONE
    print(f"they part first at: {result.first_difference(arguments.tolerance) or 'the logits'}")
    return 1


def _model(arguments: argparse.Namespace) -> int:
    from trainer.hf.config_json import load_config_json, read_model
    from trainer.hf.directories import find_model_directory
    from trainer.hf.importing import model_yaml

    directory = find_model_directory(arguments.hf_dir)
    print(model_yaml(read_model(load_config_json(directory), directory / "config.json")), end="")
    return ExitCode.DONE


@contextmanager
def _progress(title: str, total: int, ranks: Environment) -> Iterator[Callable[[int], None]]:
    """Show rank 0's progress, which stands for that of all."""
    if ranks.rank != 0:
        yield lambda done: None
        return
    with Progress(title, total / ranks.world_size) as progress:
        yield lambda done: progress.show(done, f"{done / 1e9:.2f} GB")


def _warn_of_tokenizer(directory: Path) -> None:
    from trainer.hf.tokenizer_check import tokenizer_difference

    text = tokenizer_difference(directory)
    if text is not None:
        print(
            f"warning: transformers' AutoTokenizer splits {text!r} otherwise than {directory / 'tokenizer.json'}, with "
            "which runs here work; load it with PreTrainedTokenizerFast.from_pretrained",
            file=sys.stderr,
        )


def _tell(what: str, report: ConversionReport) -> None:
    rate = report.num_bytes / 1e6 / max(report.seconds, 1e-9)
    size = f"{report.num_bytes / 1e6:,.1f} MB in {report.seconds:.1f} s, {rate:,.0f} MB/s"
    print(f"{what}: {report.num_tensors} tensors, {size}")
    if report.ignored:
        shown = f"{len(report.ignored)} tensors, such as {report.ignored[0]}"
        print(f"warning: left aside, as transformers does: {shown}", file=sys.stderr)
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    for name, count in list(report.non_finite.items())[:10]:
        print(f"warning: {name} holds {count} NaN or infinite values", file=sys.stderr)
    if len(report.non_finite) > 10:
        print(f"warning: {len(report.non_finite) - 10} more tensors hold such values", file=sys.stderr)


if __name__ == "__main__":
    end_process(main)

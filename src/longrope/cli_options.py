"""Options that commands share, and what is made of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longrope.errors import UserError
from longrope.lengths import parse_length
from longrope.runs import is_first_process

if TYPE_CHECKING:
    from longrope.checkpoint import LoadOptions
    from longrope.factors import FactorTable

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a Hub id, or `tiny`, the embedded model.")]
Documents = Annotated[
    list[str],
    typer.Option(
        "--documents",
        "-d",
        metavar="D",
        help="A file, folder or glob of .txt, .jsonl(.gz) or .parquet; hf:NAME[:SPLIT]; or stdlib. Repeatable.",
    ),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="Where to write; by default under runs/.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; tables are on stderr.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Fixes windows and every random choice.")]
Device = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:N, mps; balanced or sequential over all GPUs.")
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="auto (CUDA: bfloat16; CPU: autocast where it has bf16, else float32), autocast (float32 under bf16), "
        "float32, bfloat16, float16.",
    ),
]
Attention = Annotated[
    str, typer.Option("--attention", help="transformers' attention: auto, sdpa, eager, flash_attention_2.")
]
OriginalLength = Annotated[
    str | None, typer.Option("--original-length", metavar="N", help="Trained length, where the checkpoint is wrong.")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the code that the checkpoint carries.")]
Precision = Annotated[str, typer.Option("--rope-precision", help="dtype of angles: float32 as in engines, or float64.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads; a search resumes with as many as it had.")
]
Quantize = Annotated[
    str | None,
    typer.Option("--quantize", metavar="8bit|4bit", help="Load a base that does not fit in so many bits, on CUDA."),
]
Workers = Annotated[
    str | None,
    typer.Option(
        "--workers", metavar="N|ray[:HOST:PORT]", help="Ray workers: N here, or those of a cluster; by default none."
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say everything, and show tracebacks.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and results.")]
Windows = Annotated[
    int | None, typer.Option("--windows", min=1, help="Windows of each length; by default 8 up to 32k, 5, 3 from 512k.")
]
Factors = Annotated[
    list[str] | None,
    typer.Option("--factors", "-f", metavar="F", help="factors.json, a run folder, or none (ignore the checkpoint's)."),
]
OptionalDocuments = Annotated[
    list[str] | None,
    typer.Option("--documents", "-d", metavar="D", help="Texts that hide the needles; our own sentences without."),
]
Stride = Annotated[
    int | None, typer.Option(min=1, help="Slide a window over whole documents by so many tokens (256 in the papers).")
]
Template = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A TOML file with the prompts' texts, for instance in another language."),
]
Chat = Annotated[bool, typer.Option("--chat", help="Prompts go through the tokenizer's chat template.")]
Depths = Annotated[int, typer.Option(min=1, help="Evenly spaced depths of the needle at each length.")]
Digits = Annotated[int, typer.Option(min=1, help="Digits of the number to find.")]
RulerTasks = Annotated[
    str | None,
    typer.Option("--tasks", metavar="A,B,..", help="RULER tasks; by default all, qa_1 and qa_2 only with --questions."),
]
Samples = Annotated[int, typer.Option(min=1, help="Samples of each RULER task at each length.")]
Questions = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Your questions, for qa_1 and qa_2: JSON lines of question, answers, context."),
]
Tasks = Annotated[
    str | None,
    typer.Option(metavar="A,B,..", help="Of RULER, or lm-eval's tasks, groups, tags and patterns such as mmlu_*."),
]
Limit = Annotated[
    float | None, typer.Option(metavar="X", help="First examples of each lm-eval task; below 1, a share of them.")
]
FewShot = Annotated[
    int | None,
    typer.Option("--num-fewshot", metavar="N", help="Examples in an lm-eval prompt; each task's own by default."),
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", metavar="N", help="Rows of an lm-eval batch; by length and memory by default."),
]
IncludePath = Annotated[
    Path | None, typer.Option("--include-path", metavar="DIR", help="A folder of your own lm-eval tasks as YAML files.")
]
UnsafeCode = Annotated[bool, typer.Option("--unsafe-code", help="Run tasks that execute what the model writes.")]
Lengths = Annotated[str, typer.Option("--lengths", metavar="A,B,..", help="Lengths in tokens, such as 256,1k,2k.")]

VERBOSITY = {"verbose": False, "quiet": False}


def begin(verbose: bool, quiet: bool) -> None:
    """Set up what a command says while it works."""
    from longrope.console import set_up_logging

    VERBOSITY.update(verbose=verbose, quiet=quiet)
    if quiet:
        os.environ["TQDM_DISABLE"] = "1"  # bars of libraries, which read this when they are imported
    set_up_logging(1 if verbose else -1 if quiet else 0)


@dataclass(frozen=True)
class Shared:
    """What the options say that commands have which run a model; what one of them has not is as by default."""

    seed: int
    device: str
    dtype: str
    attention: str
    original_length: str | None
    rope_precision: str
    threads: int | None
    quantize: str | None
    trust: bool
    as_json: bool
    verbose: bool
    quiet: bool

    def options(self, *, own_factors: bool = True) -> LoadOptions:
        """Those of the model; transformers is told to keep quiet."""
        from transformers.utils import logging as transformers_logging

        from longrope.checkpoint import LoadOptions

        if not self.verbose:
            transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
            transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        return LoadOptions(
            device=self.device,
            dtype=self.dtype,
            attention=self.attention,
            original_length=length_of(self.original_length),
            trust_remote_code=self.trust,
            rope_precision=self.rope_precision,
            threads=self.threads,
            own_factors=own_factors,
            quantize=self.quantize,
        )


_SHARED: dict[str, tuple[Any, Any]] = {
    "seed": (Seed, 0),
    "device": (Device, "auto"),
    "dtype": (Dtype, "auto"),
    "attention": (Attention, "auto"),
    "original_length": (OriginalLength, None),
    "rope_precision": (Precision, "float32"),
    "threads": (Threads, None),
    "quantize": (Quantize, None),
    "trust": (Trust, False),
    "as_json": (Json, False),
    "verbose": (Verbose, False),
    "quiet": (Quiet, False),
}


def runs_a_model(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of `Shared`, but some; it gets them as its last keyword, `shared`.

    typer reads them off the signature, as if the command had written them itself.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        own = signature(command, eval_str=True)
        parameters = [each for each in own.parameters.values() if each.name != "shared"]
        for name, (kind, default) in _SHARED.items():
            if name not in without:
                parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind))
        parameters = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in parameters]

        @wraps(command)
        def started(**given: Any) -> None:
            shared = Shared(
                **{name: given.pop(name) if name not in without else default for name, (_, default) in _SHARED.items()}
            )
            if not is_first_process():
                shared = replace(shared, quiet=True)
            begin(shared.verbose, shared.quiet)
            command(**given, shared=shared)

        vars(started)["__signature__"] = own.replace(parameters=parameters)
        started.__annotations__ = {each.name: each.annotation for each in parameters}
        del started.__wrapped__  # its signature is no longer this one's
        return started

    return decorated


def names_of(text: str | None) -> list[str] | None:
    """Names between commas, None where nothing is given."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def length_of(text: str | None) -> int | None:
    """A length that may be left out."""
    return None if text is None else parse_length(text)


def one_table(factors: list[str] | None) -> FactorTable | None:
    """The only table given, if any."""
    if not factors or factors == ["none"]:
        return None
    if len(factors) > 1:
        raise UserError("--factors", got=f"{len(factors)} files", rule="one table is used here", do="give one")
    from longrope.convert import as_table

    return as_table(factors[0])


def one_or_none(factors: list[str] | None) -> FactorTable | str | None:
    """The only table given, or the word none."""
    return "none" if factors == ["none"] else one_table(factors)

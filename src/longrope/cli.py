"""The `longrope` command: one function a command, each a thin layer over the Python API.

Imports of torch and everything heavy stay inside the functions, so that `longrope --help` answers at once.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from longrope import __version__
from longrope.cli_compare import compare
from longrope.cli_doctor import doctor
from longrope.cli_evaluate import evaluate_app
from longrope.cli_export import export, verify
from longrope.cli_extend import extend
from longrope.cli_finetune import finetune
from longrope.cli_generate import chat, generate
from longrope.cli_options import (
    VERBOSITY,
    Documents,
    Json,
    OriginalLength,
    Out,
    Quiet,
    Shared,
    Trust,
    Verbose,
    begin,
    length_of,
    runs_a_model,
)
from longrope.cli_plan import plan
from longrope.cli_search import search
from longrope.errors import UserError, one_line
from longrope.lengths import parse_lengths
from longrope.runs import is_first_process

logger = logging.getLogger(__name__)

_AFTER_THE_FIRST = 15.0  # seconds; launchers end the others within one, but on a machine that is very busy
_NO_PATHS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM)

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A longer context window for a RoPE language model: LongRoPE, searched, measured and exported.",
)
app.add_typer(evaluate_app, name="evaluate")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"longrope {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


@app.command()
@runs_a_model("original_length", "rope_precision", "threads", "quantize", "trust")
def demo(
    documents: Documents = ["stdlib"],  # noqa: B006  (typer reads the default; nobody changes it)
    evaluations: Annotated[int | None, typer.Option(min=1, help="At most so many evaluations.")] = None,
    out: Out = None,
    *,
    shared: Shared,
) -> None:
    """The whole story on the embedded model: search, compare, export, report; a few minutes on two cores."""
    from longrope.console import err, print_json, resume_with, search_progress
    from longrope.console_tables import results_table
    from longrope.demo import demo as run_demo
    from longrope.runs import fresh_run_path

    if out is None:
        out = fresh_run_path("demo")
        resume_with("--out", str(out))
    with search_progress(shared.quiet) as on_progress:
        made = run_demo(
            documents=documents,
            evaluations=evaluations,
            seed=shared.seed,
            out=out,
            options=shared.options(),
            on_progress=on_progress,
        )
    if shared.as_json:
        print_json(made.metrics)
    err.print(results_table(made.metrics["results"], title="perplexity on documents that the search has not seen"))
    err.print(f"stock transformers loads {made.checkpoint} (largest logit gap to ours: {made.logit_gap:.2g})")
    err.print(f"report: {made.report}", soft_wrap=True)


@app.command()
def documents(
    sources: Annotated[list[str], typer.Argument(metavar="D", help="Documents, as --documents takes them.")],
    model: Annotated[str, typer.Option(help="The model whose tokenizer counts.")] = "tiny",
    lengths: Annotated[str | None, typer.Option(metavar="A,B,..", help="Lengths to count windows of.")] = None,
    trust: Trust = False,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """What is there: lengths of documents in tokens, and how many windows of each length they give."""
    begin(verbose, quiet)
    from longrope.checkpoint import load_tokenizer
    from longrope.console import err, print_json
    from longrope.documents import distinct, files_of_other_kinds, read_all, read_sources
    from longrope.windows import summary, token_lengths

    wanted = None if lengths is None else parse_lengths(lengths)
    tokenizer = load_tokenizer(model, trust_remote_code=trust)
    everything = read_all(sources, tokenizer=tokenizer)
    found = distinct(everything)
    empty = sum(not document.text.strip() for document in everything)
    left_out = {"empty": empty, "repeated": len(everything) - empty - len(found)}
    left_out["files of other kinds"] = files_of_other_kinds(sources)
    if any(left_out.values()):
        logger.info("left out: %s", ", ".join(f"{count} {what}" for what, count in left_out.items() if count))
    described = summary(token_lengths(found, tokenizer), wanted, bos=tokenizer.bos_token_id is not None)
    if "stdlib" in sources:
        shares = [len(read_sources(["stdlib"], share=share)) for share in ("search", "unseen")]
        note = "of stdlib, a search uses %d documents, and --unseen, compare and evaluate %d others; all are counted"
        logger.info(note, *shares)
    if as_json:
        print_json(
            {
                "command": "documents",
                "model": model,
                "settings": {"documents": sources},
                "left_out": left_out,
                **_counted(described),
            }
        )
    else:
        from longrope.console_tables import documents_table

        err.print(documents_table(described))


def _counted(described: Mapping[str, Any]) -> dict[str, Any]:
    """What was found, with the number of windows of each length as results like those of every command."""
    results = [
        {"method": "windows", "length": row["length"], "value": row["windows"], "tokens": None, "ci": None}
        for row in described["lengths"]
    ]
    return {"results": results, **described}


app.command()(search)
app.command()(compare)
app.command()(finetune)
app.command()(extend)
app.command()(export)
app.command()(verify)
app.command()(generate)
app.command()(chat)
app.command()(doctor)
app.command()(plan)


@app.command()
def factors(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="factors.json, a transformers config.json, or a CSV.")],
    row: Annotated[
        str | None, typer.Option(help="Of a CSV: the name of a row, or MODEL@LENGTH for a whole table.")
    ] = None,
    rope_theta: Annotated[float | None, typer.Option(help="Of a CSV: the model's rope_theta.")] = None,
    original_length: OriginalLength = None,
    attention_factor: Annotated[
        str | None, typer.Option(metavar="RULE", help="Of a CSV: su, which is the default, yarn, none or a number.")
    ] = None,
    up_to: Annotated[str | None, typer.Option(metavar="N", help="Of a CSV without a header: its length.")] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="FORM", help="Convert to json, transformers or csv.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the converted factors.")
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Print, check and convert factors."""
    begin(verbose, quiet)
    from longrope.console import err, print_json, print_out
    from longrope.console_tables import factors_table
    from longrope.convert import convert, factors_file, read_factors

    table = read_factors(
        factors_file(file),
        row=row,
        rope_theta=rope_theta,
        original_length=length_of(original_length),
        attention=attention_factor,
        up_to=length_of(up_to),
    )
    text = convert(table, "json" if to is None else to)
    if out is not None:
        from longrope.files import write_atomically

        write_atomically(out, text)
    if as_json:
        settings = {"file": str(file), "row": row, "to": to, "out": out and str(out)}
        told: dict[str, Any] = {"command": "factors", "model": table.model, "settings": settings, "results": []}
        print_json(told | {"factors": table.to_dict()})
    elif out is None and to is not None:
        print_out(text)
    elif out is None:
        err.print(factors_table(table))


@app.command()
def report(
    run: Annotated[list[Path], typer.Argument(metavar="RUN..", help="Run folders; several are shown side by side.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="By default RUN/report.html; of several report.html here."),
    ] = None,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="DIR", help="Write the plots as pictures, too; needs matplotlib.")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="DIR", help="Write the tables and the points of the plots, too.")
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option("--tensorboard", metavar="DIR", help="Write TensorBoard event files, too.")
    ] = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """One self-contained HTML page from run folders."""
    begin(verbose, quiet)
    from longrope.console import err
    from longrope.report import write_csv, write_png, write_report, write_tensorboard

    err.print(f"report: {write_report(run, out)}", soft_wrap=True)
    for folder, write in ((png, write_png), (csv, write_csv), (tensorboard, write_tensorboard)):
        if folder is not None:
            err.print(f"{len(write(run, folder))} files in {folder}", soft_wrap=True)


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, being written or not.")],
    once: Annotated[bool, typer.Option("--once", help="Show it as it is now, and end.")] = False,
    every: Annotated[float, typer.Option("--every", min=0.1, help="Seconds between two looks at the files.")] = 1.0,
    tensorboard: Annotated[
        Path | None, typer.Option("--tensorboard", metavar="DIR", help="Write TensorBoard event files as it goes on.")
    ] = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """A live view of a run, from its files; Ctrl-C ends the view, not the run."""
    begin(verbose, quiet)
    from longrope.console import err
    from longrope.watch import watch as run_watch

    run_watch(run, once=once, every=every, tensorboard=tensorboard, console=err)


def main() -> NoReturn:
    """Run the command line and end the process; SIGINT and SIGTERM end it at once with exit code 130."""
    from longrope.console import end_at_once_on_signals

    end_at_once_on_signals()
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:  # told already; what is left in the buffer must not be tried again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """The exit code of a command: 0 done, 2 bad usage or input and 1 anything else, both told in one line on stderr.

    No arguments at all ask for help. Under -v what is not the user's fault comes out as it was raised.
    """
    VERBOSITY.update(verbose=False, quiet=False)
    arguments = [_at_home(word) for word in arguments]
    try:
        code = app(arguments or ["--help"], prog_name="longrope", standalone_mode=False)
    except UserError as error:
        return _tell(str(error), 2)
    except BrokenPipeError:  # whoever read our output has enough of it
        return 1
    except OSError as error:
        if error.errno not in _NO_PATHS or error.filename is None:
            return _failed(error)
        rule, do = "a path is one that the system takes and lets you see", "give another path"
        return _tell(str(UserError("path", got=f"{error.filename} ({error.strerror})", rule=rule, do=do)), 2)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the command line's parser
            return _tell(_usage(error, arguments), 2)
        return _failed(error)
    return code if isinstance(code, int) else 0


def _at_home(word: str) -> str:
    """`--out=~/x` as shells expand `--out ~/x`: within a word they leave the ~, and a folder of that name is made."""
    option, _, path = word.partition("=")
    return f"{option}={os.path.expanduser(path)}" if option.startswith("--") and path.startswith("~/") else word


def _failed(error: Exception) -> int:
    """What is not the user's fault."""
    if VERBOSITY["verbose"]:
        raise error
    return _tell(f"{type(error).__name__}: {error} (run it again with -v for the traceback)", 1)


def _usage(error: Any, arguments: Sequence[str]) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else " ".join(["longrope", *_named(arguments)])
    message = error.format_message().rstrip(".")
    if (given := _given_for(error, arguments)) is not None and repr(given) not in message:
        message = f"{message}, got {given!r}"
    return f"{message}; see {command} --help"


def _given_for(error: Any, arguments: Sequence[str]) -> str | None:
    """The value of the option that the parser refuses, which it does not always say; the last one given counts."""
    names = getattr(getattr(error, "param", None), "opts", None) or ()
    found: str | None = None
    for place, word in enumerate(arguments):
        name, is_one, value = word.partition("=")
        if name in names:
            found = value if is_one else next(iter(arguments[place + 1 :]), None)
    return found


def _named(arguments: Sequence[str]) -> list[str]:
    """The words that lead to a command: the parser's own errors about an option do not say whose it is."""
    command: Any = typer.main.get_command(app)
    words: list[str] = []
    for word in arguments:
        if word not in getattr(command, "commands", {}):
            break
        command = command.commands[word]
        words.append(word)
    return words


def _tell(message: str, code: int) -> int:
    if not is_first_process():
        # Where all processes of a training end by the same error, the first one's line is enough: the launcher ends
        # the others meanwhile.
        time.sleep(_AFTER_THE_FIRST)
    print("longrope: " + one_line(message), file=sys.stderr)
    return code

"""`longrope generate` and `longrope chat`."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longrope.cli_options import (
    Factors,
    Model,
    Shared,
    one_or_none,
    runs_a_model,
)
from longrope.errors import UserError
from longrope.files import LARGEST, check_regular

if TYPE_CHECKING:
    from longrope.checkpoint import LoadOptions
    from longrope.factors import FactorTable
    from longrope.model import LoadedModel
    from longrope.runtime.applied import Applied
    from longrope.runtime.text import Made

New = Annotated[
    int | None, typer.Option("--max-new-tokens", "-n", min=1, help="By default 256, or what the table has room for.")
]
Policy = Annotated[
    str,
    typer.Option(
        help="exact: a text that passes a boundary is run again; ahead: the row of prompt and new tokens from the "
        "start; fixed: the last row at every length."
    ),
]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token.")]
TopP = Annotated[float, typer.Option("--top-p", help="Draw from the likeliest tokens of this probability together.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Draw from so many tokens; 0: from all.")]
Beams = Annotated[int, typer.Option(min=1, help="Beams of a beam search.")]
CacheKind = Annotated[
    str, typer.Option("--cache", help="Where keys and values lie: device, offloaded (host memory), quantized (8 bits).")
]
Chunk = Annotated[int | None, typer.Option(min=1, help="Tokens of a pass over a long prompt; by default 2048.")]

_OF_MODELS = ("/think",)  # Qwen3's
_COMMANDS = ("/file", "/reset", "/exit")
"""Of a conversation."""
_MARK = "\ufeff"
"""The byte order mark, which some programs begin a text with."""


@runs_a_model()
def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="What the text begins with.")
    ] = None,
    prompt_file: Annotated[
        str | None, typer.Option("--prompt-file", metavar="P", help="A file that holds it, or - for standard input.")
    ] = None,
    factors: Factors = None,
    new: New = None,
    policy: Policy = "exact",
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    beams: Beams = 1,
    as_chat: Annotated[bool, typer.Option("--chat", help="The prompt is a turn in the chat template.")] = False,
    cache: CacheKind = "device",
    chunk: Chunk = None,
    *,
    shared: Shared,
) -> None:
    """Text that goes on from a prompt, with the exact switch between the rows of a factor table."""
    from longrope.console import err, print_json
    from longrope.runtime.text import Sampling, chat_ids, prompt_ids, write_text

    text = _prompt(prompt, prompt_file)
    table = one_or_none(factors)
    sampling = Sampling(temperature, top_p, top_k, beams, shared.seed)
    options = shared.options(own_factors=table != "none")
    loaded, applied = _ready(model, table, options, policy, chunk)
    if as_chat:
        ids = chat_ids(loaded.tokenizer, [{"role": "user", "content": text}], instead="leave out --chat")
    else:
        ids = prompt_ids(loaded.tokenizer, text)
    write = None if shared.as_json else _write
    made = write_text(loaded, applied, ids, new=new, sampling=sampling, cache=cache, write=write)
    if shared.as_json:
        settings = {"policy": policy, "cache": cache, "seed": shared.seed, **vars(sampling)}
        print_json({"command": "generate", "model": model, "settings": settings, "results": [made.told()]})
    else:
        _write("\n")
    if not shared.quiet:
        err.print(_summary(made), soft_wrap=True)


@runs_a_model("as_json")
def chat(
    model: Model,
    factors: Factors = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system's turn.")] = None,
    new: New = None,
    policy: Policy = "exact",
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    cache: CacheKind = "device",
    chunk: Chunk = None,
    *,
    shared: Shared,
) -> None:
    """A conversation, a line a turn; /file PATH adds a document to the next turn, /reset begins anew, /exit ends."""
    from longrope.console import err
    from longrope.runtime.text import Conversation, Sampling, chat_ids

    _any_bytes()
    table = one_or_none(factors)
    sampling = Sampling(temperature, top_p, top_k, seed=shared.seed)
    options = shared.options(own_factors=table != "none")
    loaded, applied = _ready(model, table, options, policy, chunk)
    chat_ids(loaded.tokenizer, [{"role": "user", "content": "."}])  # says at once that there is no template
    talk = Conversation(loaded, applied, system, new=new, sampling=sampling, cache=cache)
    if not shared.quiet:
        err.print(f"{model}, up to {applied.reach} tokens; /file PATH, /reset, /exit")
    document = ""
    while (line := _line(shared.quiet)) is not None:
        command, _, argument = line.partition(" ")
        if command == "/exit":
            return
        if command == "/reset":
            talk.reset()
            document = ""
            continue
        if _is_mistyped(command):
            rule, do = "a command is one of /file PATH, /reset and /exit", f"begin with /{command} to say it"
            err.print(str(UserError("turn", got=repr(command), rule=rule, do=do)), style="red", soft_wrap=True)
            continue
        try:  # what is wrong with one turn ends no conversation
            if command == "/file":
                document += _read(argument.strip()) + "\n\n"
            elif line.strip():
                made = talk.say(document + _without_escape(line), _write)
                document = ""
                _write("\n")
                if not shared.quiet:
                    err.print(_summary(made), soft_wrap=True)
        except UserError as error:
            left_out = "; the document before it is left out" if document and command != "/file" else ""
            err.print(f"{error}{left_out}", style="red", soft_wrap=True)
            document = document if command == "/file" else ""


def _is_mistyped(word: str) -> bool:
    """Whether a line's first word is a command that there is not. A path is text, and so are a model's own (/think)."""
    return word not in (*_COMMANDS, *_OF_MODELS) and re.fullmatch(r"/[A-Za-z]+", word) is not None


def _without_escape(line: str) -> str:
    """The text of a turn, which a second slash lets begin like a command."""
    return line[1:] if re.match(r"//[A-Za-z]+(\s|$)", line) else line


def _ready(
    model: str, table: FactorTable | str | None, options: LoadOptions, policy: str, chunk: int | None
) -> tuple[LoadedModel, Applied]:
    """A model with the factors that are asked for, else with its own, else with its own RoPE."""
    from longrope.api import switched
    from longrope.model import load_model
    from longrope.runtime.chunks import CHUNK

    loaded = load_model(model, options)
    wanted = loaded.meaning if table is None or isinstance(table, str) else table
    applied = switched(loaded, wanted, policy=policy, chunk=CHUNK if chunk is None else chunk)
    return loaded, applied


def _prompt(text: str | None, file: str | None) -> str:
    if (text is None) == (file is None):
        got = "neither" if text is None else "both"
        rule = "a text begins with one of --prompt and --prompt-file"
        raise UserError("prompt", got=got, rule=rule, do="give one of them")
    if text is not None:
        return text
    if file != "-":
        return _read(str(file))
    _any_bytes()
    return sys.stdin.read().removeprefix(_MARK)


def _any_bytes() -> None:
    """Read stdin as UTF-8 whatever the locale, what is none as surrogates: those are refused as of any other text."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")


def _read(name: str) -> str:
    check_regular(Path(name), "prompt", LARGEST)
    try:
        return Path(name).read_text("utf-8-sig")
    except UnicodeDecodeError:
        rule, do = "a prompt is UTF-8 text", "convert the file"
    except (OSError, ValueError) as error:
        rule, do = getattr(error, "strerror", None) or str(error), "give a file that can be read"
    raise UserError("prompt", got=name or "no file", rule=rule, do=do)


def _line(quiet: bool) -> str | None:
    """The next turn; None at the end of the input."""
    if not quiet and sys.stdin.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


def _write(text: str) -> None:
    from longrope.console import print_out

    print_out(text)


def _summary(made: Made) -> str:
    first = made.prompt / max(made.first, 1e-9)
    timed = len(made.tokens) > 1 and made.seconds > made.first
    rest = (len(made.tokens) - 1) / (made.seconds - made.first) if timed else 0
    again = f"; {made.recomputed:,} run again at a boundary" if made.recomputed else ""
    return (
        f"{made.prompt:,} tokens in {made.first:.1f} s ({first:,.0f} a second), then {len(made.tokens):,}"
        + (f" at {rest:,.1f} a second" if rest else "")
        + again
    )

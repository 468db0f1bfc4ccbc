"""Documents from files, from the Hub or from Python's own library."""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import json
import logging
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from longrope.conversations import conversation, exchange
from longrope.errors import UserError, first_line
from longrope.room import Room
from longrope.runs import CONFIG, is_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Share = Literal["all", "search", "unseen", "train"]
"""Of `stdlib`: all of it, what a search reads, what is only measured, or what trained the embedded model."""

HUB_DOCUMENTS = 1000  # rows read of one hf: source, at most
_ROWS = 256  # of a table that are unfolded at once
_ROW_BYTES = 200  # that a row takes, also an empty one
_FIELDS = ("text", "messages", "tools", "prompt", "completion")  # of a row, the first ones before the last two
_JSON_NAMES = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
_KINDS = ".txt, .jsonl, .jsonl.gz or .parquet"


@dataclass(frozen=True)
class Document:
    """One text. `name` is what reports show: a path inside the folder given, with #row for a row of a file.

    prompt: characters at its beginning that training reads without learning to write them, of a row with `prompt` and
    `completion`; None of all others.
    """

    name: str
    text: str
    prompt: int | None = None

    @cached_property
    def sha256(self) -> str:
        """Hexadecimal hash of the text in UTF-8, and of where its prompt ends: names and places do not decide."""
        prompt = "" if self.prompt is None else f"{self.prompt}:"
        return hashlib.sha256((prompt + self.text).encode()).hexdigest()

    @cached_property
    def text_sha256(self) -> str:
        """The same of the text alone, which is what is searched and measured on."""
        return self.sha256 if self.prompt is None else hashlib.sha256(self.text.encode()).hexdigest()


def as_sources(given: str | Path | Iterable[str | Path]) -> list[str]:
    """Sources as a list of texts, from Python also a single one: a text is not a list of its letters."""
    return [str(given)] if isinstance(given, str | Path) else [str(source) for source in given]


def read_sources(
    sources: Sequence[str], *, share: Share = "all", tokenizer: PreTrainedTokenizerBase | None = None
) -> list[Document]:
    """The documents of every source: a file, a folder, a glob, `hf:NAME[:SPLIT]`, or `stdlib`.

    A path that exists is a path, whatever its characters (but a folder named stdlib is ./stdlib). Of `stdlib`, `share`
    takes a part, fixed by the paths inside it. `tokenizer` is only needed for rows with `messages`, which its chat
    template turns into text. Empty and repeated texts are dropped, except in the share "train": that is, file for
    file, what the embedded model was trained on. Raises UserError for a source that is missing, unreadable or empty.
    """
    found = read_all(sources, share=share, tokenizer=tokenizer)
    return found if share == "train" else distinct(found)


def read_all(
    sources: Sequence[str], *, share: Share = "all", tokenizer: PreTrainedTokenizerBase | None = None
) -> list[Document]:
    """The same with empty and repeated texts."""
    found: list[Document] = []
    room = Room()
    for source in sources:
        documents = _read_source(source, share, tokenizer, room)
        if not any(document.text.strip() for document in documents):
            rule = "a document holds at least some text"
            raise UserError("documents", got=f"{source!r}, which is empty", rule=rule, do="give documents with text")
        found += documents
    return found


def distinct(documents: Iterable[Document], *, text_alone: bool = False) -> list[Document]:
    """The documents with text, the first one of each; text_alone: wherever its prompt ends."""
    first: dict[str, Document] = {}
    for document in documents:
        if document.text.strip():
            first.setdefault(document.text_sha256 if text_alone else document.sha256, document)
    return list(first.values())


def _read_source(source: str, share: Share, tokenizer: PreTrainedTokenizerBase | None, room: Room) -> list[Document]:
    if source == "stdlib":
        return _read_stdlib(share)
    try:
        if source.startswith("hf:") and not _exists(source):
            return _read_hub(source, tokenizer, room)
        files = _find_files(source)
    except OSError as error:
        raise _unreadable(source, error) from error
    return [document for path, name in files for document in _read_file(path, name, tokenizer, room)]


def _read_stdlib(share: Share) -> list[Document]:
    """The modules of the running Python: sha256 of the path mod 10 is 0 for unseen, 1 for search, else train.

    The code pages in encodings/ are near-copies of each other, so what is searched and judged on leaves them out: a
    document that the search has not seen must not be one it has almost seen.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        inside = path.relative_to(root)
        installed = inside.parts[0] in ("site-packages", "dist-packages")
        copies = inside.parts[0] == "encodings" and share != "train"
        if installed or copies or share not in ("all", _stdlib_share(inside)):
            continue
        # A few of CPython's tests are in other encodings on purpose.
        with contextlib.suppress(UnicodeDecodeError, OSError):
            documents.append(Document(inside.as_posix(), path.read_text("utf-8")))
    return documents


def _stdlib_share(inside: Path) -> Share:
    digit = int(hashlib.sha256(os.fsencode(inside.as_posix())).hexdigest(), 16) % 10
    return "unseen" if digit == 0 else "search" if digit == 1 else "train"


def files_of_other_kinds(sources: Sequence[str]) -> int:
    """How many files below the folders and globs among some sources are of no kind that is read."""
    places = [source for source in sources if source != "stdlib" and (_exists(source) or not source.startswith("hf:"))]
    return sum(not _reader(file) and file.is_file() for source in places for file in set(_files(source)[1]))


def _files(source: str) -> tuple[Path, Iterator[Path]]:
    """The folder that names begin in, and every file of a path or glob."""
    path = Path(source)
    if not _exists(source):
        return _expand(source)
    if path.is_dir():
        return path, _walk(path)
    _check_file(path)
    return path.parent, iter([path])


def _find_files(source: str) -> list[tuple[Path, str]]:
    """Every file of a path or glob that can be read, each with its short name, in the order of the names."""
    base, found = _files(source)
    files = {file for file in found if _reader(file) and file.is_file()}
    if not files:
        got = f"{source!r}, where no file is of a kind that can be read"
        raise UserError("documents", got=got, rule=f"a document is {_KINDS}", do="give such files")
    ordered = sorted(files, key=lambda file: file.relative_to(base).parts)
    return [(file, _printable(file.relative_to(base).as_posix())) for file in ordered]


def _exists(source: str) -> bool:
    """Whether a path is there. Path.exists is not asked: on some Pythons it takes a locked folder for an absent one."""
    try:
        os.stat(source)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no path holds a zero byte
        return False
    return True


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder that is neither hidden nor of a run; links are followed, no folder is entered twice."""

    def give_up(error: OSError) -> None:
        raise error

    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=give_up):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        if place != str(folder) and _is_run(Path(place), files):
            folders.clear()  # a run of an earlier command, such as runs/ here: no text of anybody's
            continue
        seen.add(real)
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        yield from (Path(place, file) for file in files if not file.startswith("."))


def _is_run(folder: Path, files: Sequence[str]) -> bool:
    if CONFIG not in files:
        return False
    with contextlib.suppress(UserError):
        return is_run(folder)
    return False


def _expand(pattern: str) -> tuple[Path, Iterator[Path]]:
    """The folder before the first wildcard, and every file that a glob matches or that is below a match."""
    parts = Path(pattern).parts
    literal = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    base = Path(*parts[:literal])
    try:
        matches = sorted(base.glob(str(Path(*parts[literal:])))) if literal < len(parts) else []
    except ValueError as error:
        raise UserError("documents", got=repr(pattern), rule=str(error), do="correct the pattern") from error
    if not matches:
        rule = "documents are a file, a folder, a glob, hf:NAME[:SPLIT] or stdlib"
        raise UserError("documents", got=f"{pattern!r}, which does not exist", rule=rule, do="check the path")
    return base, (file for match in matches for file in (_walk(match) if match.is_dir() else [match]))


def _check_file(path: Path) -> None:
    if not _reader(path):
        rule = f"a document is {_KINDS}"
        raise UserError("documents", got=repr(str(path)), rule=rule, do="convert it, or give another file")
    if not path.is_file():
        got = f"{str(path)!r}, which is neither a file nor a folder"
        raise UserError("documents", got=got, rule="documents are regular files", do="save it as a file first")


def _printable(name: str) -> str:
    """A file name as proper Unicode: on Linux a name is any bytes."""
    return os.fsencode(name).decode("utf-8", "replace")


_Reader = Callable[[Path, str, "PreTrainedTokenizerBase | None", Room], list[Document]]


def _reader(path: Path) -> _Reader | None:
    name = path.name.lower()
    return next((reader for ending, reader in _READERS.items() if name.endswith(ending)), None)


def _read_file(path: Path, name: str, tokenizer: PreTrainedTokenizerBase | None, room: Room) -> list[Document]:
    reader = _reader(path)
    assert reader is not None
    try:
        return reader(path, name, tokenizer, room)
    except (OSError, EOFError, zlib.error) as error:  # the last two: a damaged .gz
        raise _unreadable(str(path), error) from error


def _unreadable(source: str, error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    got = f"{source!r}, which cannot be read"
    return UserError("documents", got=got, rule=reason, do="check the path, its permissions and its content")


def _read_text(path: Path, name: str, tokenizer: PreTrainedTokenizerBase | None, room: Room) -> list[Document]:
    """The whole file: UTF-8, a byte order mark removed, every end of line as \\n."""
    room.take(path.stat().st_size, repr(str(path)))
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_text(path, "not UTF-8") from error
    if "\0" in text:
        raise _not_text(path, "binary (it holds a zero byte)")
    return [Document(name, text)]


def _not_text(path: Path, why: str) -> UserError:
    got, rule = f"{str(path)!r}, which is {why}", "a document is text in UTF-8"
    return UserError("documents", got=got, rule=rule, do="convert it, or take it out")


def _read_jsonl(path: Path, name: str, tokenizer: PreTrainedTokenizerBase | None, room: Room) -> list[Document]:
    """One document a line that is not blank.

    Not read with `datasets`: it takes the fields and their types from the first 10 MB and fails where a later row has
    others, which is common, and does not say in which line.
    """
    documents = []
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as lines:
        pieces = iter(lambda: lines.readline(room.left + 1), b"")  # never more than there is room for
        for number, line in enumerate(pieces, start=1):
            where = f"{str(path)!r} line {number}"
            room.take(len(line), where)
            text = _decode(line, where)
            if text:
                documents.append(_row(f"{name}#{number}", _parse(text, where), where, tokenizer))
    return documents


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(where, got="bytes that are not UTF-8", rule="JSON is UTF-8", do="convert the file") from error


def _parse(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        got = f"{error.msg}: column {error.colno}"
    except (ValueError, RecursionError) as error:
        got = "a number of thousands of digits" if isinstance(error, ValueError) else "thousands of brackets"
    raise UserError(where, got=got, rule="every line is a JSON object", do="correct the line")


def _read_parquet(path: Path, name: str, tokenizer: PreTrainedTokenizerBase | None, room: Room) -> list[Document]:
    """One document a row; other columns are not even read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            wanted = [column for column in _FIELDS if column in columns]
            if not wanted:
                raise _no_field(repr(str(path)), dict.fromkeys(columns))
            rows: list[dict[str, Any]] = []
            for batch in file.iter_batches(batch_size=_ROWS, columns=wanted):
                for place, column in enumerate(batch.columns):
                    if pa.types.is_dictionary(column.type):  # where a text is there once for all rows that have it
                        batch = batch.set_column(place, batch.schema.names[place], column.dictionary_decode())
                room.take(max(batch.nbytes, _ROW_BYTES * batch.num_rows), repr(str(path)))
                rows += map(_of_table, batch.to_pylist())
    except UserError:
        raise
    except (pa.ArrowException, ValueError, OverflowError) as error:  # the last two: of values that Python has not
        raise _unreadable(str(path), error) from error
    named = ((f"{name}#{number}", f"{str(path)!r} row {number}", row) for number, row in enumerate(rows, start=1))
    return [_row(short, row, where, tokenizer) for short, where, row in named]


_READERS: dict[str, _Reader] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".parquet": _read_parquet,
}


def _read_hub(source: str, tokenizer: PreTrainedTokenizerBase | None, room: Room) -> list[Document]:
    """The first rows of a data set, streamed, so that only what is read is fetched."""
    import datasets

    name, _, split = source.removeprefix("hf:").partition(":")
    logger.info("reading at most %d documents of %s", HUB_DOCUMENTS, source)
    documents = []
    try:
        with _quiet("datasets", "huggingface_hub"):
            stream = datasets.load_dataset(name, split=split or "train", streaming=True)
            wanted = [column for column in _FIELDS if column in (stream.column_names or ())]
            rows = (stream.select_columns(wanted) if wanted else stream).take(HUB_DOCUMENTS)
            for number, row in enumerate(rows, start=1):
                documents.append(_row(f"{name}#{number}", _of_table(row), f"{source} row {number}", tokenizer))
                room.take(len(documents[-1].text), f"{source} row {number}")
    except UserError:
        raise
    except Exception as error:  # the two libraries have a dozen unrelated types for "no"
        do = "check the name, the split and the network"
        got = f"{source!r}, which cannot be reached"
        raise UserError("documents", got=got, rule=first_line(error), do=do) from error
    return documents


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """No log lines of these libraries: what they say before they fail is in the exception too."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [each.level for each in loggers]
    try:
        for each in loggers:
            each.setLevel(logging.CRITICAL)
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def _of_table(row: dict[str, Any]) -> dict[str, Any]:
    """What a row of a table holds: its type gives every object in it all fields that others have, too, as nulls."""
    return {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _row(name: str, row: object, where: str, tokenizer: PreTrainedTokenizerBase | None) -> Document:
    """The document of a row: its field `text`, else its `messages` through the chat template, else its `prompt` and
    `completion`, which are strings or, through the template, messages; "" when those are null."""
    if not isinstance(row, dict) or not ({"text", "messages"} & row.keys() or {"prompt", "completion"} <= row.keys()):
        raise _no_field(where, row)
    text = row.get("text")
    if text in (None, "") and row.get("messages") is not None:
        text = conversation(row["messages"], row.get("tools"), where, tokenizer)
    if text in (None, "") and row.get("completion") is not None:
        prompt, completion = row.get("prompt"), row["completion"]
        if isinstance(prompt, list) != isinstance(completion, list) and prompt is not None:
            rule = "`prompt` and `completion` are both strings, or both lists of messages"
            raise UserError(where, got="one of each", rule=rule, do="convert one of them")
        if isinstance(completion, list):
            prompt, completion = exchange(prompt, completion, row.get("tools"), where, tokenizer)
        prompt = _string(prompt, "prompt", where)
        return Document(name, prompt + _string(completion, "completion", where), len(prompt))
    return Document(name, _string(text, "text", where))


def _string(value: object, field: str, where: str) -> str:
    if not isinstance(value, str | None):
        got = f"a field `{field}` of type {type(value).__name__}"
        raise UserError(where, got=got, rule=f"`{field}` is a string", do="convert the field")
    # JSON can spell half a surrogate pair, which no UTF-8 text holds.
    return (value or "").encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _no_field(where: str, row: object) -> UserError:
    if not isinstance(row, Mapping):
        got = _JSON_NAMES.get(type(row), "null")
        return UserError(where, got=got, rule="every line is a JSON object", do="correct the line")
    got = f"the fields {', '.join(map(str, row))}" if row else "no fields"
    rule = "a row has a field `text` or `messages`, or `prompt` and `completion`"
    return UserError(where, got=got, rule=rule, do="rename the field that holds it")


def hold_out(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(search, unseen): unseen are the texts whose sha256 mod 4 is 0, at least one; at least one is left for search.

    A single document is cut instead: its last quarter is unseen.
    """
    kept = distinct(documents)
    assert kept, "read_sources never returns nothing"
    if len({each.text_sha256 for each in kept}) == 1:
        name, text, prompt = kept[0].name, kept[0].text, kept[0].prompt
        cut = len(text) * 3 // 4
        before, after = (None, None) if prompt is None else (min(prompt, cut), max(0, prompt - cut))
        return [Document(f"{name} (first 3/4)", text[:cut], before)], [
            Document(f"{name} (last 1/4)", text[cut:], after)
        ]
    hashes = sorted({document.text_sha256 for document in kept})
    unseen = {sha256 for sha256 in hashes if int(sha256, 16) % 4 == 0} or {hashes[0]}
    if len(unseen) == len(hashes):
        unseen.remove(hashes[-1])
    searched = [each for each in kept if each.text_sha256 not in unseen]
    return searched, [each for each in kept if each.text_sha256 in unseen]


def others(documents: Sequence[Document], used: Sequence[Document]) -> list[Document]:
    """Those documents whose text is of none that is used elsewhere."""
    texts = {each.text_sha256 for each in used}
    return [each for each in documents if each.text_sha256 not in texts]

"""What a reproduction is made of: the model's shape, the plan, the documents by use, and where things lie."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from longrope.checkpoint import LoadOptions
from longrope.documents import Document, read_sources
from longrope.errors import UserError
from longrope.extension.done import digest
from longrope.extension.plan import Plan
from longrope.factors import FactorTable, RopeFactors
from longrope.files import read_object, write_atomically
from longrope.model import LoadedModel, load_model
from longrope.runs import CHECKPOINT, FACTORS
from longrope.windows import Window, choose_windows

sys.path.append(str(Path(__file__).parents[2] / "tools"))
MODELS = Path(__file__).parents[1] / "models"
MADE_OF = "made_of.json"
"""In a committed model: the hash of all that its stages depend on."""
TRAINED = "trained.json"
"""In a committed model: the table that its weights were trained with, before rows of it were searched anew."""
BRIEF = 4096
"""Bytes of the short windows of a last fine-tuning: of prose enough that its gradient says something."""


@dataclass(frozen=True)
class Size:
    """A model's shape and training, and how much is measured.

    length: of its training, the original length. init: the model that training begins with, from scratch without.
    recall, recall_share: of recall tasks among what is trained on, of the base model and of the fine-tunings;
    answers_share: of the latter's that teach an answer alone; excerpts_share: of windows of short pieces of novels
    among what the fine-tunings are on; brief_share: of such windows of BRIEF bytes, in the last one. windows: of the
    target length, that perplexities are measured on. tries: passkeys a length. first: length and tokens of a training
    on shorter windows, whose weights the one at `length` begins with. moves: the state holds no path of the machine, so
    that another one can go on with it.
    """

    length: int
    tokens: float
    batch: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    head_dim: int
    theta: float
    recall: float = 0.2
    learning_rate: float = 3e-3
    init: str = ""
    recall_share: float = 0.66
    answers_share: float = 0.9
    excerpts_share: float = 0.22
    brief_share: float = 0.25
    windows: int = 1
    tries: int = 20
    first: tuple[int, float] | None = None
    moves: bool = False

    def told(self) -> dict[str, Any]:
        """As the results have it; what was added later only where it is used, so that older states are gone on with."""
        apart = {"moves"} | ({"first"} if self.first is None else set())
        told = {name: value for name, value in vars(self).items() if name not in apart}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}

    def quick(self) -> Size:
        """A thousandth of it."""
        return replace(
            self, length=128, tokens=4096, batch=4, hidden=32, intermediate=64, layers=1, heads=2, head_dim=16, tries=2,
            theta=50.0, init="", first=None if self.first is None else (128, 2048),
        )  # fmt: skip


def quick_plan(plan: Plan) -> Plan:
    """The stages of a plan with next to nothing to do in each."""
    few: dict[str, dict[str, Any]] = {
        "finetune": {"steps": 2, "batch": 1, "save_every": 1},
        "search": {"evaluations": 3, "windows": 1},
        "second": {"evaluations": 3, "windows": 1},
        "recovery": {"evaluations": 3, "windows": 2},
    }
    stages = tuple(replace(stage, settings=dict(stage.settings) | few[stage.do]) for stage in plan.stages)
    return replace(plan, stages=stages)


SETTINGS = {
    "miniature": Size(
        length=256,
        tokens=28e6,
        batch=32,
        hidden=256,
        intermediate=704,
        layers=4,
        heads=4,
        head_dim=64,
        theta=200.0,
        # On novels alone such a model learned no recall in 36 million tokens; tiny has, on code.
        init="tiny",
        recall=0.25,
        learning_rate=2e-3,
    ),
    # 6.8M parameters, 13.5 MB in bf16. Attention, whose cost grows with the square of the length, is narrow (3 heads of
    # 64, as of a model half as wide), the rest is wide. Of 2,097,152 tokens no activation has 2^31 numbers. theta puts
    # the critical dimension where that of LLaMA2 is.
    "full-length": Size(
        length=4096,
        tokens=160e6,
        batch=32,
        hidden=480,
        intermediate=896,
        layers=4,
        heads=3,
        head_dim=64,
        theta=10000.0,
        # Recall is learned from many tasks: of short windows there are eight times as many in as many tokens.
        first=(512, 80e6),
        recall=0.25,
        learning_rate=2e-3,
        moves=True,
    ),
}


@dataclass(frozen=True)
class Setting:
    """A reproduction: its size, plan, documents and folders."""

    size: Size
    plan: Plan
    documents: Path
    state: Path
    device: str
    threads: int
    seed: int = 0
    _models: dict[str, LoadedModel] = field(default_factory=dict)

    @classmethod
    def of(cls, size: Size, plan: Plan, documents: Path, state: Path, device: str, threads: int) -> Setting:
        """Raises UserError for a plan or documents that are not there."""
        for name in ("train", "validation", "test"):
            if not (documents / name).is_dir():
                rule = "the documents are in train, validation and test"
                raise UserError("--documents", got=f"{documents}, without {name}", rule=rule, do="give such a folder")
        return cls(size, plan, documents, state, device, threads)

    @contextmanager
    def at_home(self) -> Iterator[Setting]:
        """The same with paths that do not depend on the machine, where its size asks for that.

        Runs name their model and documents by path. So that they are gone on with elsewhere, the process stands in the
        folder above the state, and the documents are a link in it.
        """
        if not self.size.moves:
            yield self
            return
        self.state.mkdir(parents=True, exist_ok=True)
        link = self.state / "corpus"
        link.unlink(missing_ok=True)
        link.symlink_to(self.documents.resolve())
        with chdir(self.state.parent):
            name = Path(self.state.name)
            yield replace(self, documents=name / link.name, state=name)

    @property
    def run(self) -> Path:
        """The run of the extension."""
        return self.state / "extend"

    @property
    def base(self) -> Path:
        """The model that is extended: the committed weights where there are some, else what was trained here."""
        committed = MODELS / self.state.name
        return committed if committed.is_dir() else self.state / "base" / "model"

    @property
    def final(self) -> Path:
        """The model at the end of all stages: what was made here, else the committed one of the same stages.

        Raises UserError where there is neither.
        """
        made, committed = self.run / CHECKPOINT, MODELS / f"{self.state.name}-final"
        if made.is_dir():
            return made
        if (committed / MADE_OF).is_file():
            if read_object(committed / MADE_OF, str(committed)) == {"made_of": self.made_of()}:
                return committed
            got = f"none in {self.run}, and {committed} is of another plan, other documents or another seed"
        else:
            got = f"none in {self.run}"
        rule = "this part measures the model at the end of all stages"
        raise UserError("--parts", got=got, rule=rule, do="make the core first: --parts core")

    @property
    def trained_table(self) -> FactorTable:
        """The table that the final model's weights were trained with, before searches changed its rows."""
        own = self.final == self.run / CHECKPOINT
        return FactorTable.load(self.stage("finetune", self.trained[-1]) / FACTORS if own else self.final / TRAINED)

    @property
    def trained_with(self) -> RopeFactors:
        """The row of it that they were trained with."""
        return self.trained_table.row_for(self.trained[-1])

    def recall(self, length: int) -> Path:
        """Documents of recall tasks, beside the texts that a fine-tuning to a length is on."""
        return self.state / f"recall-{length}.jsonl"

    @property
    def trained(self) -> list[int]:
        """Lengths of the fine-tunings."""
        return [stage.to for stage in self.plan.stages if stage.do == "finetune"]

    def stage(self, do: str, to: int | None = None) -> Path:
        """The folder of a stage, the last of its kind."""
        found = [stage for stage in self.plan.stages if stage.do == do and to in (None, stage.to)]
        return self.run / found[-1].name

    @property
    def options(self) -> LoadOptions:
        """How models are loaded."""
        return LoadOptions(device=self.device, threads=self.threads)

    def load(self, name: Path) -> LoadedModel:
        """A model; only one is in memory."""
        if str(name) not in self._models:
            self._models.clear()
            self._models[str(name)] = load_model(str(name), self.options)
        return self._models[str(name)]

    def key(self, name: Path) -> str:
        """What values of a model are kept under: it changes with its weights and factors."""
        return digest(name)[7:23]

    def texts(self, use: str) -> list[Document]:
        """The documents of train, validation or test."""
        return read_sources([str(self.documents / use)])

    def made_of(self) -> str:
        """Hash of all that results depend on: size, plan, documents, seed."""
        told = [self.size.told(), [stage.to_dict() for stage in self.plan.stages], self.hashes(), self.seed]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def hashes(self) -> dict[str, dict[str, str]]:
        """Their names and hashes."""
        return {use: {each.name: each.sha256 for each in self.texts(use)} for use in ("train", "validation", "test")}

    def judged(self, length: int, count: int | None = None) -> list[Window]:
        """Windows of the test documents, the same for all that is compared."""
        tokenizer = self.load(self.base).tokenizer
        return choose_windows(
            self.texts("test"), tokenizer, length=length, count=count or self.size.windows, seed=self.seed
        )


def cut(windows: list[Window], length: int) -> list[Window]:
    """The same tokens in windows of a shorter length, each with BOS before it; what is left at the end is left out."""
    made = []
    for window in windows:
        bos, text = window.ids[:1], window.ids[1:]
        for start in range(0, len(text) - length + 2, length - 1):
            ids = np.concatenate([bos, text[start : start + length - 1]])
            made.append(Window(window.document, window.sha256, window.start + start, ids))
    return made


def with_recall(setting: Setting) -> Plan:
    """The plan with recall tasks in its fine-tunings, at all distances, and with windows of excerpts.

    Of the windows of a fine-tuning `recall_share` are such tasks, and of these `answers_share` have one question at
    their end, whose answer alone is learned: among a window's other bytes its few would weigh next to nothing. The
    last one has short windows of prose besides, which cost little: what short texts have lost is learned again there.
    """
    texts = [each.text.encode() for each in setting.texts("train")]
    stages = []
    for stage in setting.plan.stages:
        if stage.do != "finetune":
            stages.append(stage)
            continue
        path, size = setting.recall(stage.to), stage.to - 2  # BOS and EOS are around it
        stages.append(replace(stage, settings=dict(stage.settings) | {"documents": [str(path)]}))
        if not path.exists():
            brief = setting.size.brief_share if stage.to == setting.trained[-1] else 0.0
            rows = _made_rows(setting.size, texts, size, brief, (setting.seed, 7, stage.to))
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return replace(setting.plan, stages=tuple(stages))


def _made_rows(
    shares: Size, texts: list[bytes], size: int, brief: float, seed: tuple[int, ...]
) -> Iterator[dict[str, str]]:
    """Documents beside the novels, each of `size` bytes or a shorter question, in the shares that a Size says.

    brief: share of windows of excerpts that are shorter. Their first byte is a prompt: such a row is a window alone.
    """
    from recall import excerpts, recall_question, recall_window

    long = [text for text in texts if len(text) >= size]
    spans = sum(len(text) // size for text in long)
    windows = spans / (1 - shares.recall_share - shares.excerpts_share)
    for number in range(int(windows * (shares.recall_share + shares.excerpts_share))):
        rng = np.random.default_rng((*seed, number))
        if number < int(windows * shares.excerpts_share):
            yield {"text": excerpts(rng, size, texts).decode(errors="replace")}
            continue
        text = long[int(rng.integers(len(long)))]
        start = int(rng.integers(0, len(text) - size + 1))
        prose = text[start : start + size]
        if rng.random() < shares.answers_share:
            prompt, answer = recall_question(rng, size, prose)
            yield {"prompt": prompt.decode(errors="ignore"), "completion": answer.decode()}
        else:  # not shorter where a character is cut, so that it fills a window
            yield {"text": recall_window(rng, size, prose).decode(errors="replace")}
    for number in range(int(windows * brief / (1 - brief))):
        rng = np.random.default_rng((*seed, 1, number))
        pieces = excerpts(rng, min(BRIEF, size), texts).decode(errors="replace")
        yield {"prompt": pieces[:1], "completion": pieces[1:]}

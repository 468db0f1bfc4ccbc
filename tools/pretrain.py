"""Train a small byte-level Llama from scratch: the embedded model `tiny`, or one of another shape.

    python tools/pretrain.py --out runs/tiny                         # what src/longrope/assets/tiny is
    python tools/pretrain.py --out runs/other --documents BOOKS --kv-heads 2 --head-dim 32 --theta 500
    python tools/pretrain.py --out runs/books --documents BOOKS --init tiny

Training is transformers.Trainer's; this file only says what the model is and where the text comes from. Stop it at
any time: the same command goes on from the last checkpoint and ends in the same weights.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from byte_tokenizer import BOS, EOS, PAD, VOCABULARY, byte_tokenizer
from longrope.checkpoint import model_source
from longrope.documents import read_sources
from longrope.hardware import half_is_fast_on_cpu
from longrope.training.arguments import on_one_device
from recall import recall_text

logger = logging.getLogger("pretrain")


@dataclass(frozen=True)
class Settings:
    """Everything the weights depend on."""

    documents: tuple[str, ...]
    length: int
    tokens: int
    batch: int
    recall: float
    learning_rate: float
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    theta: float
    seed: int
    init: str = ""
    """A MODEL of this shape whose weights training begins with; from scratch without."""


class Windows(Dataset[dict[str, torch.Tensor]]):
    """Window i, a pure function of (seed, i): BOS and length - 1 bytes of text, or of a recall task.

    Being a function of i is what makes a resumed training see the very windows it would have seen.
    """

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64], settings: Settings) -> None:
        self.text, self.ends, self.settings = text, ends, settings

    def __len__(self) -> int:
        return self.settings.tokens // self.settings.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((self.settings.seed, index))
        size = self.settings.length - 1
        ids = np.empty(size + 1, dtype=np.int64)
        ids[0] = BOS
        if rng.random() < self.settings.recall:
            ids[1:] = np.frombuffer(recall_text(rng, size, self._prose(rng, size).tobytes()), dtype=np.uint8)
        else:
            start = int(rng.integers(0, len(self.text) - size))
            ids[1:] = self.text[start : start + size]
            ends = self.ends[np.searchsorted(self.ends, start) : np.searchsorted(self.ends, start + size)]
            ids[1 + ends - start] = EOS
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(ids)}

    def _prose(self, rng: np.random.Generator, size: int) -> NDArray[np.uint8]:
        start = int(rng.integers(0, len(self.text) - size))
        return self.text[start : start + size]


def join_documents(texts: list[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All documents in one array, each followed by a place for EOS; and those places, ascending."""
    joined = np.frombuffer(b"".join(text + b"\0" for text in texts), dtype=np.uint8)
    return joined, np.cumsum([len(text) + 1 for text in texts]) - 1


def build_model(settings: Settings) -> LlamaForCausalLM:
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=settings.length,
        rope_parameters={"rope_type": "default", "rope_theta": settings.theta},
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config)
    if settings.init:
        given = LlamaForCausalLM.from_pretrained(model_source(settings.init), dtype=torch.float32)
        model.load_state_dict(given.state_dict())
    return model


class SayLoss(TrainerCallback):
    """One JSON line a log step in training.jsonl, so that a card and a plot can be made of it."""

    def __init__(self, path: Path, tokens_a_step: int) -> None:
        self.path, self.tokens_a_step, self.start = path, tokens_a_step, time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        del args, control, kwargs
        if logs and "loss" in logs:
            line = {"step": state.global_step, "tokens": state.global_step * self.tokens_a_step, "loss": logs["loss"]}
            line |= {"learning_rate": logs["learning_rate"], "seconds": round(time.monotonic() - self.start, 1)}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def train(settings: Settings, out: Path, save_every: int, compile_model: bool) -> LlamaForCausalLM:
    texts = [document.text.encode() for document in read_sources(settings.documents, share="train")]
    text, ends = join_documents(texts)
    logger.info("%d documents, %.1f MB", len(texts), len(text) / 1e6)
    model = build_model(settings)
    logger.info("%.2fM parameters", model.num_parameters() / 1e6)
    steps = settings.tokens // settings.length // settings.batch
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=settings.batch,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(300, steps // 10),
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        bf16=torch.cuda.is_available() or half_is_fast_on_cpu(),
        logging_steps=50,
        save_steps=save_every,
        save_total_limit=2,
        seed=settings.seed,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        torch_compile=compile_model,
    )
    trainer = Trainer(
        model=model,
        args=on_one_device(arguments),
        train_dataset=Windows(text, ends, settings),
        callbacks=[SayLoss(out / "training.jsonl", settings.batch * settings.length)],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(arguments.output_dir))  # type: ignore[no-untyped-call]
    return model


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, log and the finished model")
    parser.add_argument("--documents", nargs="+", default=["stdlib"], help="text files, folders or globs; or stdlib")
    parser.add_argument("--length", type=int, default=256, help="window in tokens, BOS included")
    parser.add_argument("--tokens", type=float, default=64e6, help="tokens of training")
    parser.add_argument("--batch", type=int, default=32, help="windows a step")
    parser.add_argument("--recall", type=float, default=0.2, help="share of windows that are recall tasks")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=704)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--theta", type=float, default=200.0)
    parser.add_argument("--init", default="", help="a MODEL of the same shape to begin with, such as tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--compile", action="store_true", help="torch.compile: faster, needs a C++ compiler on CPU")
    given = vars(parser.parse_args(argv))
    out, save_every, compile_model = given.pop("out"), given.pop("save_every"), given.pop("compile")
    settings = Settings(**(given | {"documents": tuple(given["documents"]), "tokens": int(given["tokens"])}))

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    out.mkdir(parents=True, exist_ok=True)
    described = json.loads(json.dumps(asdict(settings)))
    record = out / "settings.json"
    if record.exists() and json.loads(record.read_text())["settings"] != described:
        print(f"pretrain: {out} holds a training with other settings: choose another --out", file=sys.stderr)
        return 2
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"transformers": transformers.__version__, "machine": platform.processor() or platform.machine()}
    record.write_text(json.dumps({"settings": described, "versions": versions}, indent=1) + "\n")

    model = train(settings, out, save_every, compile_model)
    model.config.use_cache = True  # Trainer switched it off
    finished: Any = model  # mypy does not know the decorated nn.Module.to
    unfinished = out / ".model.unfinished"
    finished.to(torch.bfloat16).save_pretrained(unfinished)
    byte_tokenizer(settings.length).save_pretrained(unfinished)
    shutil.rmtree(out / "model", ignore_errors=True)
    unfinished.rename(out / "model")
    logger.info("wrote %s", out / "model")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

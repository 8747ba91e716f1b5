"""Text classification with a model of the transformers library from a local folder, and a new head.

Nothing is downloaded. The task builds the model that the folder's config.json describes. ``start_from`` loads its
weights, and reports which ones::

    task: {name: huggingface, model: /models/all-MiniLM-L6-v2, data: reviews.jsonl}
    start_from:
      weights: /models/all-MiniLM-L6-v2
      rename: {"": "body."}                     # the file has only the body
      reset: ["head.*", "body.pooler.*"]        # the head is new, and the pooler is not used
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn
from torch.utils.data import Dataset

from disttrain.errors import UserError
from disttrain.tasks.base import Task, TensorData
from disttrain.tasks.paths import resolve
from disttrain.tasks.samples import read_samples


class HuggingFace(Task):
    """Text classification by a linear head on the last hidden state, averaged over a text's tokens.

    Samples are lines ``{"text": ..., "label": ...}`` of a .jsonl file, rows of a .csv file with these columns, or the
    paragraphs of the files in a folder, labeled by the files' names without suffix. Files are UTF-8. Empty texts are
    skipped; a missing text or label is an error. Some of the texts are held out, chosen by a hash of the text.
    """

    model: str = Field(
        description="folder with config.json and the tokenizer's files; 'package:name/folder': in an installed package"
    )
    data: str = Field(description="a .jsonl or .csv file with text and label, or a folder with one file per class")
    max_length: int = Field(default=128, ge=2, description="tokens per text; longer texts are truncated")
    held_out: float = Field(default=0.2, gt=0, lt=1, description="fraction of the texts held out for evaluation")
    dropout: float = Field(
        default=0.1, ge=0, lt=1, description="dropout of the head; that of the body is in its config.json"
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="fraction of each label spread over all classes, in the training loss only"
    )

    def build_model(self) -> nn.Module:
        auto = _transformers().AutoModel
        config = _read(lambda folder: _transformers().AutoConfig.from_pretrained(folder, local_files_only=True), self)
        return Classifier(auto.from_config(config), config.hidden_size, len(self._labels), self.dropout)

    def train_data(self) -> Dataset[Any]:
        return self._split[0]

    def eval_data(self) -> Dataset[Any]:
        return self._split[1]

    def collate(self, samples: Any) -> Any:
        """Return a batch without the columns that are padding in all of its texts."""
        tokens, mask, labels = super().collate(samples)
        length = int(mask.sum(1).max())
        return tokens[:, :length], mask[:, :length], labels

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        tokens, mask, labels = batch
        return F.cross_entropy(model(tokens, mask), labels, label_smoothing=self.label_smoothing)

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, tuple[torch.Tensor | float, int]]:
        tokens, mask, labels = batch
        scores = model(tokens, mask)
        return {
            "accuracy": ((scores.argmax(1) == labels).sum(), len(labels)),
            "loss": (F.cross_entropy(scores, labels, reduction="sum"), len(labels)),
        }

    @cached_property
    def _samples(self) -> list[tuple[str, str]]:
        """Pairs (text, label) without duplicates, sorted."""
        path = Path(resolve(self.data, "task.data"))
        if not path.exists():
            raise UserError(f"task.data={self.data!r} does not exist")
        found = sorted({(text.strip(), label): None for text, label in read_samples(path, self.data) if text.strip()})
        if len(classes := sorted({label for _, label in found})) < 2:
            its = f"all of class {classes[0]!r}" if classes else "and no class"
            raise UserError(f"task.data={self.data!r} has {len(found)} texts, {its}: at least two classes are needed")
        return found

    @cached_property
    def _labels(self) -> list[str]:
        return sorted({label for _, label in self._samples})

    @cached_property
    def _split(self) -> tuple[TensorData, TensorData]:
        tokenizer = _read(lambda f: _transformers().AutoTokenizer.from_pretrained(f, local_files_only=True), self)
        encoded = tokenizer(
            [text for text, _ in self._samples],
            truncation=True,
            max_length=self.max_length,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        numbers = {label: number for number, label in enumerate(self._labels)}
        labels = torch.tensor([numbers[label] for _, label in self._samples])
        held_out = torch.tensor([_hash(text) < self.held_out for text, _ in self._samples])
        if held_out.all() or not held_out.any():
            raise UserError(
                f"task.held_out={self.held_out} leaves nothing to {'train on' if held_out.all() else 'hold out'} of "
                f"{len(labels)} texts: change it, or add texts"
            )
        parts = [
            TensorData(encoded["input_ids"][mask], encoded["attention_mask"][mask], labels[mask])
            for mask in (~held_out, held_out)
        ]
        return parts[0], parts[1]


class Classifier(nn.Module):
    """A linear head on the mean of the last hidden state over the tokens that are not padding.

    Maps int64 tokens and their mask, both of shape (samples, length), to logits of shape (samples, classes).
    """

    def __init__(self, body: nn.Module, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.body = body
        if getattr(body, "pooler", None) is not None:
            body.pooler = None  # type: ignore[assignment]  # it would never get a gradient
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.body(input_ids=tokens, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(2).to(hidden.dtype)
        return self.head(self.dropout((hidden * weight).sum(1) / weight.sum(1)))  # type: ignore[no-any-return]


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise UserError(
            "task.name='huggingface' needs transformers, which is not installed: pip install 'disttrain[huggingface]'"
        ) from error
    return transformers


def _read(load: Any, task: HuggingFace) -> Any:
    folder = Path(resolve(task.model, "task.model"))
    if not (folder / "config.json").is_file():
        raise UserError(f"task.model={task.model!r} should be a local folder with config.json, which is missing")
    try:
        return load(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"task.model={task.model!r} cannot be read: {' '.join(str(error).split())}") from error


def _hash(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64

"""Fine-tuning of a tiny model that the tests create: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from disttrain import tasks
from disttrain.comm import SingleProcess, simulate
from disttrain.errors import UserError
from disttrain.training.start_from import StartFrom
from tests.support.runs import make_config, train

transformers = pytest.importorskip("transformers", reason="the extra 'huggingface' is not installed")

WORDS = ["red", "green", "blue", "cat", "dog", "mouse", "one", "two", "three", "sees", "a", "and"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, as ``save_pretrained`` leaves them, and texts of two classes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("model")
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(path)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        transformers.BertModel(config).save_pretrained(path)
        picks = torch.randint(len(WORDS), (60, 7)).tolist()
    lines = [
        {
            "text": " ".join(WORDS[index] for index in pick[: 2 + number % 6]),
            "label": "color" if pick[0] < 3 else "other",
        }
        for number, pick in enumerate(picks)
    ]
    (path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def spec(folder: Path, **changes: Any) -> dict[str, Any]:
    data = str(folder / "texts.jsonl")
    return {"name": "huggingface", "model": str(folder), "data": data, "dropout": 0.0, "max_length": 8, **changes}


def test_padding_is_ignored_and_losses_are_means(folder: Path) -> None:
    task = tasks.registry.build(spec(folder))
    model, data = task.build_model().double().eval(), task.train_data()

    def loss(indices: list[int]) -> float:
        return task.loss(model, task.collate(data.__getitems__(indices))).item()  # type: ignore[attr-defined]

    tokens, mask, _ = task.collate(data.__getitems__([0]))  # type: ignore[attr-defined]
    assert mask.all()
    assert tokens.shape[1] < 8
    assert loss(list(range(6))) == pytest.approx(sum(loss([index]) for index in range(6)) / 6, rel=1e-12)


def test_the_held_out_texts_are_disjoint_and_the_same_every_time(folder: Path) -> None:
    first, again = (tasks.registry.build(spec(folder)) for _ in range(2))
    assert torch.equal(first.train_data().tensors[0], again.train_data().tensors[0])  # type: ignore[attr-defined]
    seen = {tuple(row) for row in first.train_data().tensors[0].tolist()}  # type: ignore[attr-defined]
    held_out = first.eval_data().tensors[0].tolist()  # type: ignore[union-attr]
    assert held_out
    assert not any(tuple(row) in seen for row in held_out)


def test_the_body_is_loaded_from_the_folder_and_the_head_is_new(folder: Path) -> None:
    model = tasks.registry.build(spec(folder)).build_model()
    fresh = model.state_dict()["head.weight"].clone()
    section: dict[str, Any] = {"weights": str(folder), "rename": {"": "body."}, "reset": ("head.*", "body.pooler.*")}
    with pytest.raises(UserError, match=r"not in the model: body\.pooler"):
        StartFrom(**{**section, "reset": ("head.*",)}).load(model, SingleProcess())
    StartFrom(**section).load(model, SingleProcess())
    for name, value in transformers.BertModel.from_pretrained(folder).state_dict().items():
        assert name.startswith("pooler.") or torch.equal(model.state_dict()[f"body.{name}"], value)
    assert torch.equal(model.head.weight, fresh)


def test_ranks_fine_tune_as_one_process_does(tmp_path: Path, folder: Path) -> None:
    torch.save(tasks.registry.build(spec(folder)).build_model().state_dict(), tmp_path / "begin.pt")

    def config(name: str) -> Any:
        made = make_config(
            tmp_path / name,
            start_from={"weights": str(tmp_path / "begin.pt")},
            layers={"decay": 0.7, "rules": [{"match": "body.embeddings.*", "freeze": True, "until_step": 2}]},
            optimizer={"name": "adamw", "lr": 0.01},
            batch_size=12,
            epochs=2,
        )
        return made.model_copy(update={"task": tasks.registry.build(spec(folder))})

    _, alone = train(config("alone"), SingleProcess())
    name = "body.embeddings.word_embeddings.weight"
    assert not torch.equal(alone[name], torch.load(tmp_path / "begin.pt")[name].double()), "unfrozen"
    for _, together in simulate(2, lambda comm: train(config("together"), comm)):
        for name, value in alone.items():
            torch.testing.assert_close(together[name], value, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["csv", "folder"])
def test_other_kinds_of_data_hold_the_same_texts(tmp_path: Path, folder: Path, kind: str) -> None:
    lines = [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]
    path = tmp_path / {"csv": "texts.csv", "folder": "texts"}[kind]
    if kind == "csv":
        path.write_text("label,text\n" + "".join(f"{line['label']},{line['text']}\n" for line in lines))
    else:
        path.mkdir()
        for label in ("color", "other"):
            (path / f"{label}.txt").write_text("\n\n".join(line["text"] for line in lines if line["label"] == label))
    ours, theirs = (tasks.registry.build(spec(folder, data=str(data))) for data in (path, folder / "texts.jsonl"))
    for part, other in zip(ours.train_data().tensors, theirs.train_data().tensors, strict=True):  # type: ignore[attr-defined]
        assert torch.equal(part, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nowhere"}, "task.model='nowhere' should be a local folder with config.json"),
        ({"model": "package:nosuchthing/model"}, "there is no installed package 'nosuchthing'"),
        ({"data": "nowhere.csv"}, "task.data='nowhere.csv' does not exist"),
        ({"data": "pyproject.toml"}, r"should be a \.jsonl or \.csv file"),
    ],
)
def test_missing_files_are_refused_in_one_line(folder: Path, changes: dict[str, Any], message: str) -> None:
    task = tasks.registry.build(spec(folder, **changes))
    with pytest.raises(UserError, match=message) as caught:
        (task.build_model(), task.train_data())
    assert "\n" not in str(caught.value)

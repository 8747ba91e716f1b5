from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from disttrain.errors import UserError
from disttrain.optim.layers.depth import layer_depths
from disttrain.optim.layers.groups import Layers
from disttrain.optim.optimizers.sections import optimizers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))


class Transformer(nn.Module):
    """An embedding, three blocks, a norm, a head that is tied or not."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.encoder = nn.Module()
        self.encoder.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def build(**values: Any) -> Layers:
    return Layers.model_validate(values)


def test_the_blocks_of_a_transformer_are_layers() -> None:
    depth = layer_depths(Transformer())
    assert depth["embedding.weight"] == 0
    for name, value in depth.items():
        if name.startswith("encoder.blocks"):
            assert value == 1 + int(name.split(".")[2]), name
    assert depth["norm.weight"] == 3, "it belongs to the block before it"
    assert depth["head.weight"] == 4
    assert "head.weight" not in layer_depths(Transformer(tied=True))


def test_the_modules_of_a_sequence_are_layers_and_norms_belong_to_the_layer_before() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Flatten())
    assert layer_depths(model) == {"0.weight": 0, "0.bias": 0, "1.weight": 0, "1.bias": 0, "3.weight": 1, "3.bias": 1}


def test_a_sequence_of_different_modules_is_not_a_layer_list() -> None:
    model = nn.Sequential(Transformer(), nn.Linear(4, 2))
    assert layer_depths(model)["0.encoder.blocks.2.mlp.0.weight"] == 3
    assert layer_depths(model)["1.weight"] == 5


def test_each_module_beside_the_blocks_is_one_layer() -> None:
    model = Transformer()
    parts = {"words": nn.Embedding(7, 4), "norm": nn.LayerNorm(4), "places": nn.Linear(4, 4)}
    model.embedding = nn.ModuleDict(parts)  # type: ignore[assignment]
    depth = layer_depths(model)
    assert {depth[name] for name in depth if name.startswith("embedding")} == {0}
    assert depth["encoder.blocks.0.norm.weight"] == 1


def test_without_lists_each_module_with_parameters_is_a_layer() -> None:
    model = nn.Module()
    model.body, model.head = nn.Module(), nn.Linear(2, 2)
    model.body.first, model.body.second = nn.Linear(2, 2), nn.Conv1d(2, 2, 1)
    assert list(layer_depths(model).values()) == [0, 0, 1, 1, 2, 2]


def test_decay_goes_from_the_head_down() -> None:
    assigned = build(decay=0.5).assign(Transformer())
    assert assigned["head.weight"].lr_factor == 1
    assert assigned["encoder.blocks.2.norm.weight"].lr_factor == assigned["norm.bias"].lr_factor == 0.5
    assert assigned["embedding.weight"].lr_factor == 0.5**4


def test_an_explicit_order() -> None:
    layers = build(decay=0.5, order=["embedding.*", "encoder.*", "*"])
    factors = {name: entry.lr_factor for name, entry in layers.assign(Transformer()).items()}
    assert factors["embedding.weight"] == 0.25
    assert {factors[name] for name in factors if name.startswith("encoder")} == {0.5}
    assert factors["norm.weight"] == factors["head.weight"] == 1


def test_the_first_matching_rule_applies_and_factors_multiply() -> None:
    rules = [{"match": "*.norm.*", "lr_factor": 3, "weight_decay": 0}, {"match": "encoder.*", "lr_factor": 2}]
    assigned = build(rules=rules, decay=0.5).assign(Transformer())
    norm, linear = assigned["encoder.blocks.2.norm.weight"], assigned["encoder.blocks.2.mlp.0.weight"]
    assert (norm.lr_factor, norm.weight_decay) == (1.5, 0.0)
    assert (linear.lr_factor, linear.weight_decay) == (1.0, None)
    assert assigned["embedding.weight"].lr_factor == 0.5**4


def test_groups_hold_every_trained_parameter_once() -> None:
    model = Transformer()
    layers = build(decay=0.8, rules=[{"match": "embedding.*", "freeze": True}, {"match": "*norm*", "weight_decay": 0}])
    layers.freeze(model)
    assert not model.embedding.weight.requires_grad
    groups = layers.groups(model, lr=0.1)
    members = [parameter for group in groups for parameter in group["params"]]
    assert len(members) == len(set(members))
    assert set(members) == {parameter for parameter in model.parameters() if parameter.requires_grad}
    torch.optim.AdamW(groups)  # as a user's own script would


def test_without_rules_there_is_one_group() -> None:
    model = Transformer(tied=True)
    (group,) = Layers().groups(model, lr=0.1)
    assert group == {"params": list(model.parameters()), "lr": 0.1}


@pytest.mark.parametrize("name", ["lars", "lamb", "sgd", "adamw"])
def test_biases_and_norms_decay_by_default_except_in_lars_and_lamb_and_as_rules_say(name: str) -> None:
    model = Transformer()
    section = optimizers.build({"name": name, "lr": 0.1, "weight_decay": 0.3})
    layers = build(rules=[{"match": "norm.bias", "weight_decay": 0.2}])
    optimizer = section.build(layers.groups(model, section.lr))
    decay = {parameter: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    names = {decay_name: decay[parameter] for decay_name, parameter in model.named_parameters()}
    assert names["head.weight"] == 0.3
    assert names["norm.bias"] == 0.2
    assert names["norm.weight"] == (0.0 if name in ("lars", "lamb") else 0.3)


def test_rules_say_what_has_a_trust_ratio() -> None:
    model = Transformer()
    section = optimizers.build({"name": "lamb", "lr": 0.1})
    rules = [{"match": "embedding.*", "adapt": False}, {"match": "norm.bias", "adapt": True, "weight_decay": 0.1}]
    optimizer = section.build(build(rules=rules).groups(model, section.lr))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = model.norm.bias.detach().clone()
    optimizer.step()
    ratios = optimizer.trust_ratios  # type: ignore[attr-defined]
    assert model.norm.bias in ratios
    assert model.head.weight in ratios
    assert model.embedding.weight not in ratios
    assert model.norm.weight not in ratios
    assert not torch.equal(model.norm.bias, before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rules": [{"match": "embeding.*", "freeze": True}]}, r"layers.rules.0 .* nearest name is 'embedding.weight'"),
        (
            {"rules": [{"lr_factor": 2}, {"match": "norm.*", "lr_factor": 2}]},
            r"layers.rules.1 .* has no effect: earlier patterns",
        ),
        ({"rules": [{"freeze": True}]}, "freeze every parameter"),
        ({"decay": 0.5, "order": ["embedding.*", "heads", "*"]}, r"layers.order.1 \('heads'\) matches no parameter"),
        ({"decay": 0.5, "order": ["embedding.*"]}, "layers.order has no layer for 'encoder.blocks.0.norm.weight'"),
        ({"decay": 0.5, "order": ["*", "head.*"]}, r"layers.order.1 .* has no effect: earlier patterns"),
    ],
)
def test_rules_that_do_not_fit_the_model_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**values).assign(Transformer())


def test_parameters_that_the_model_froze_count_as_frozen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    with pytest.raises(UserError, match="there is nothing to train"):
        build(rules=[{"match": "1.*", "freeze": True}]).freeze(model)


def test_decoupled_decay_and_l1_refuse_a_closure() -> None:
    model = nn.Linear(2, 2)
    for options in ({"l1": 0.1}, {"weight_decay": 0.1, "decoupled": True}):
        optimizer = optimizers.build({"name": "sgd", "lr": 0.1, **options}).build(model.parameters())
        with pytest.raises(UserError, match="cannot take a closure"):
            optimizer.step(lambda: 0.0)

"""Loops with several models or several optimizers."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import mse_loss

from tests.scripts.nets import Branches, make, mlp
from tests.scripts.registry import loop


def generator() -> nn.Module:
    return mlp(features=8, outputs=6, seed=1)


def discriminator() -> nn.Module:
    return make(lambda: nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1)), seed=2)


def gan(world: Any, *, zero_by_module: bool) -> Any:
    """The loop of torch's DCGAN example."""
    net_g, net_d = world.wrap_model(generator()), world.wrap_model(discriminator())
    optimizer_g = world.wrap(torch.optim.SGD(net_g.parameters(), lr=0.1, momentum=0.5), net_g)
    optimizer_d = world.wrap(torch.optim.SGD(net_d.parameters(), lr=0.1, momentum=0.5), net_d)
    for noise, real in world.batches(5, outputs=6):
        one, zero = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        (net_d if zero_by_module else optimizer_d).zero_grad()
        bce(net_d(real + 2), one).backward()
        fake = net_g(noise)
        bce(net_d(fake.detach()), zero).backward()
        optimizer_d.step()
        (net_g if zero_by_module else optimizer_g).zero_grad()
        bce(net_d(fake), one).backward()
        optimizer_g.step()
    return net_g, net_d


@loop(engines=("mpi", "horovod"))
def gan_zeroed_by_modules(world: Any) -> Any:
    return gan(world, zero_by_module=True)


@loop()
def gan_zeroed_by_optimizers(world: Any) -> Any:
    return gan(world, zero_by_module=False)


@loop()
def wasserstein_gan(world: Any) -> Any:
    """Several critic steps for one of the generator, weights clamped, a gradient penalty by torch.autograd.grad."""
    net_g, critic = generator(), world.wrap_model(mlp(features=6, outputs=1, seed=2))
    net_g = world.wrap_model(net_g)
    optimizer_g = world.wrap(torch.optim.RMSprop(net_g.parameters(), lr=0.01), net_g)
    optimizer_c = world.wrap(torch.optim.RMSprop(critic.parameters(), lr=0.01), critic)
    for step, (noise, real) in enumerate(world.batches(6, outputs=6)):
        optimizer_c.zero_grad()
        fake = net_g(noise).detach()
        (critic(fake).mean() - critic(real).mean()).backward()
        optimizer_c.step()
        with torch.no_grad():
            for parameter in critic.parameters():
                parameter.clamp_(-0.2, 0.2)
        if step % 2:
            optimizer_g.zero_grad()
            (-critic(net_g(noise)).mean()).backward()
            optimizer_g.step()
    return net_g, critic


@loop(without_ddp="it does not see torch.autograd.grad, nor a second backward through the same forward pass")
def gradient_penalty(world: Any) -> Any:
    """WGAN-GP: the penalty's graph holds a derivative."""
    critic = mlp(features=6, outputs=1, seed=2)
    optimizer = world.wrap(torch.optim.Adam(critic.parameters(), lr=0.01), critic)
    for _, real in world.batches(outputs=6):
        between = (real * 0.5 + 1).requires_grad_()
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        optimizer.zero_grad()
        (10 * (slope.norm(dim=1) - 1).square().mean() - critic(real).mean()).backward()
        optimizer.step()
    return critic


@loop()
def two_models_one_optimizer_each(world: Any) -> Any:
    """An encoder and a decoder, one loss through both, with rates and methods of their own."""
    encoder, decoder = world.wrap_model(mlp(outputs=6, seed=1)), world.wrap_model(mlp(features=6, seed=2))
    first = world.wrap(torch.optim.SGD(encoder.parameters(), lr=0.1), encoder)
    second = world.wrap(torch.optim.AdamW(decoder.parameters(), lr=0.01), decoder)
    for x, y in world.batches():
        first.zero_grad()
        second.zero_grad()
        mse_loss(decoder(encoder(x)), y).backward()
        first.step()
        second.step()
    return encoder, decoder


@loop()
def two_models_in_one_optimizer(world: Any) -> Any:
    """One optimizer over two models, wrapped with the module that holds both."""
    both = world.wrap_model(nn.Sequential(mlp(outputs=6, seed=1), mlp(features=6, seed=2)))
    optimizer = world.wrap(torch.optim.Adam(both.parameters(), lr=0.01), both)
    for x, y in world.batches():
        optimizer.zero_grad()
        mse_loss(both(x), y).backward()
        optimizer.step()
    return both


@loop(engines=("mpi", "horovod"))
def two_optimizers_with_a_branch(world: Any) -> Any:
    """One model, two optimizers, and branches that only some ranks take in a step."""
    model = world.wrap_model(make(Branches), find_unused_parameters=True)
    inner = getattr(model, "module", model)
    first = torch.optim.SGD([*inner.head.parameters(), *inner.branches["left"].parameters()], lr=0.1)
    second = torch.optim.SGD([*inner.body.parameters(), *inner.branches["right"].parameters()], lr=0.05)
    first, second = world.wrap(first, model), world.wrap(second, model)
    for step in range(5):
        first.zero_grad()
        second.zero_grad()
        for rank in world.ranks:
            x, y = world.sample(step, rank)
            use = ["left", "right"] if (step + rank) % 2 else ["right"] if step % 3 else []
            (mse_loss(model(x, *use), y) / len(world.ranks)).backward()
        first.step()
        second.step()
    return model


@loop()
def two_optimizers_in_turn(world: Any) -> Any:
    """Both see every backward; in each step only one of them steps, and both drop their gradients."""
    model = world.wrap_model(mlp())
    parameters = list(model.parameters())
    first = world.wrap(torch.optim.SGD(parameters[:2], lr=0.1, momentum=0.9), model)
    second = world.wrap(torch.optim.Adam(parameters[2:], lr=0.01), model)
    for step, (x, y) in enumerate(world.batches(6)):
        mse_loss(model(x), y).backward()
        (first if step % 2 else second).step()
        first.zero_grad()
        second.zero_grad()
    return model


@loop()
def cyclic_gan(world: Any) -> Any:
    """Two generators in one optimizer by itertools.chain; discriminators frozen by requires_grad_ meanwhile."""
    both = nn.ModuleDict({"there": mlp(outputs=6, seed=1), "back": mlp(features=6, outputs=8, seed=2)})
    there, back = world.wrap_model(both["there"]), world.wrap_model(both["back"])
    net_d = discriminator()
    judge = world.wrap_model(net_d)
    chain = itertools.chain(both["there"].parameters(), both["back"].parameters())
    optimizer_g = world.wrap(torch.optim.Adam(chain, lr=0.01, betas=(0.5, 0.999)), both)
    optimizer_d = world.wrap(torch.optim.Adam(net_d.parameters(), lr=0.01, betas=(0.5, 0.999)), net_d)
    for x, real in world.batches(4, outputs=6):
        net_d.requires_grad_(False)
        optimizer_g.zero_grad()
        fake = there(x)
        (bce(net_d(fake), torch.ones(len(x), 1)) + mse_loss(back(fake), x)).backward()
        optimizer_g.step()
        net_d.requires_grad_(True)
        optimizer_d.zero_grad()
        (bce(judge(real), torch.ones(len(x), 1)) + bce(judge(fake.detach()), torch.zeros(len(x), 1))).backward()
        optimizer_d.step()
    return both, net_d


@loop()
def teacher_by_momentum(world: Any) -> Any:
    """A student, a teacher that follows it, and a predictor with an optimizer of its own (BYOL)."""
    teacher = mlp(seed=1)
    student, predictor = world.wrap_model(mlp(seed=1)), world.wrap_model(mlp(features=4, seed=2))
    teacher.requires_grad_(False)
    first = world.wrap(torch.optim.SGD(student.parameters(), lr=0.1), student)
    second = world.wrap(torch.optim.SGD(predictor.parameters(), lr=0.2), predictor)
    for x, _ in world.batches():
        first.zero_grad()
        second.zero_grad()
        mse_loss(predictor(student(x)), teacher(x + 0.1)).backward()
        first.step()
        second.step()
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.lerp_(fast, 0.1)
    return student, teacher, predictor

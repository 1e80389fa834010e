"""Muon for the inner matrices of a network, Adam for the rest, as one optimizer."""

from functools import cache, partial
from importlib import import_module

import torch
from torch import nn


def muon(net, lr, adam_lr, beta2=0.99, outer=(), apart=None):
    """Muon (Jordan et al. 2024) for the matrices inside `net`, convolutions flattened; Adam for all other parameters.

    Muon makes every singular value of a matrix's averaged gradient about 1 before it takes a step, so that directions
    with small gradients move too. That is for matrices between hidden layers: biases, gains, embeddings and the layers
    of `outer` (those that read the input or write the output) stay with Adam. A step changes the entries of a matrix by
    about 0.2 lr, whatever its shape. All rates are those of a whole step: a ramp of lr scales all groups alike.

    lr: of Muon. adam_lr, beta2: of Adam. Weights do not decay. apart: {module of `net`: a rate of its own}, for Adam.
    """
    apart = apart or {}
    own = {id(p) for module in apart for p in module.parameters()}
    kept = {id(p) for layer in outer for p in layer.parameters()}
    kept |= {id(p) for layer in net.modules() if isinstance(layer, nn.Embedding) for p in layer.parameters()}
    common = [p for p in net.parameters() if id(p) not in own]
    inner = [p for p in common if p.ndim > 1 and id(p) not in kept]
    rest = [p for p in common if p.ndim < 2 or id(p) in kept]
    groups = [{"params": inner}, {"params": rest, "use_fallback": True}]
    groups += [{"params": [*module.parameters()], "use_fallback": True, "fallback_lr_scale": rate / lr}
               for module, rate in apart.items()]
    return timm_muon()(groups, lr=lr, fallback_lr_scale=adam_lr / lr, betas=(0.9, beta2))


@cache
def timm_muon():
    """timm's Muon, its iterations in fp32: most laptops and a T4 only emulate the bf16 that it takes.

    Of a step of lesson 05's network they took 235 ms in bf16 on a CPU with AVX2, and 23 ms in fp32.
    """
    module = import_module("timm.optim.muon")          # here: importing timm takes seconds
    module.zeropower_via_newtonschulz = partial(module.zeropower_via_newtonschulz, dtype=torch.float32)
    return module.Muon

"""Muon for the inner matrices, Adam for the rest."""

import copy

import torch
from torch import nn

from utils.optim import muon

QUINTIC = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
           (2.8366, -3.0525, 1.2012))                  # timm's five steps


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(4, 16),
                         nn.Flatten(), nn.Linear(16 * 16, 12), nn.Linear(12, 6))


def step(net, optimizer):
    before = copy.deepcopy(net)
    net(torch.randn(32, 1, 4, 4)).square().mean().backward()
    optimizer.step()
    return [new.detach() - old.detach() for new, old in zip(net.parameters(), before.parameters())]


def test_an_inner_matrix_moves_by_its_orthogonal_factor():
    # The step of a matrix G = U S V^T is -0.2 lr sqrt(larger side) U V^T, up to the five iterations of its recipe.
    model = net()
    optimizer = muon(model, lr=0.01, adam_lr=0.004, outer=(model[0], model[5]))
    moved = step(model, optimizer)
    for i in (2, 6):                                   # the convolution, flattened, and the linear layer inside
        grad = list(model.parameters())[i].grad.flatten(1)
        left, size, right = torch.linalg.svd(grad, full_matrices=False)
        rank = int((size > 0.05 * size[0]).sum())      # what is almost 0 takes more iterations than five
        found = torch.linalg.multi_dot([left.T, -moved[i].flatten(1), right.T]).diagonal()[:rank]
        wanted = 0.2 * 0.01 * max(grad.shape) ** 0.5
        assert rank > 1 and bool(((found / wanted > 0.6) & (found / wanted < 1.3)).all()), found / wanted


def test_its_iterations_are_in_fp32():
    # bf16, timm's own choice, is emulated on most machines; and it would be off by a hundredth here.
    model = net()
    moved = step(model, muon(model, lr=0.01, adam_lr=0.004, outer=(model[0], model[5])))[6]
    x = model[4].weight.grad.double()                  # 12 x 256
    x = x / x.norm()
    for a, b, c in QUINTIC:
        power = x @ x.T
        x = a * x + (b * power + c * power @ power) @ x
    assert torch.allclose(moved.double(), -0.2 * 0.01 * 256 ** 0.5 * x, rtol=1e-4, atol=1e-6)


def test_all_else_moves_as_with_adam():
    model = net()
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    moved = step(model, muon(model, lr=0.01, adam_lr=0.004, beta2=0.99, outer=(model[0], model[5])))
    torch.manual_seed(1)
    adam = step(twin, torch.optim.Adam(twin.parameters(), lr=0.004, betas=(0.9, 0.99), eps=1e-7))
    for i, (a, b) in enumerate(zip(moved, adam)):
        assert torch.allclose(a, b, atol=1e-6) == (i not in (2, 6)), i


def test_an_embedding_stays_with_adam():
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8, bias=False))
    inner, rest = muon(model, lr=0.01, adam_lr=0.004).param_groups
    assert inner["params"] == [model[1].weight] and rest["params"] == [model[0].weight] and rest["use_fallback"]


def test_a_part_of_its_own_has_a_rate_of_its_own():
    model = net()
    twin = copy.deepcopy(model)
    optimizer = muon(model, lr=0.01, adam_lr=0.004, outer=(model[0],), apart={model[5]: 0.001})
    for group in optimizer.param_groups:
        group["lr"] *= 0.5                             # a ramp scales that rate, too
    torch.manual_seed(1)
    moved = step(model, optimizer)
    torch.manual_seed(1)
    adam = step(twin, torch.optim.Adam(twin[5].parameters(), lr=0.0005, betas=(0.9, 0.99), eps=1e-7))
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(moved[8:], adam[8:], strict=True))
    assert sorted(len(group["params"]) for group in optimizer.param_groups) == [2, 2, 6]

"""Train the two judges of utils/scores.py from fixed seeds and write utils/judges.safetensors.

    python -m tools.judges               both, one after the other
    python -m tools.judges epochs=1 out=/tmp/judges.safetensors   a quick look
"""

import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from utils.data import digits
from utils.device import fast_bf16
from utils.errors import UserError, cli
from utils.files import atomic
from utils.scores import JUDGES, WIDTHS, Judge

SEEDS = {"features": 1, "labels": 2}
TARGET = 0.994                                         # test accuracy that each must reach


def train(name, epochs=8, batch_size=128, peak=3e-3, log=print):
    """One judge: AdamW with a warm-up and cosine decay, on images moved a little. Returns (model, accuracy)."""
    torch.manual_seed(SEEDS[name])
    model, data = Judge(WIDTHS[name]), digits("train", batch_size, seed=SEEDS[name])
    steps = max(1, int(epochs * data.steps_per_epoch))
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.05)
    start = time.time()
    for step in range(steps):
        x, y = data.batch(step)
        warm = min(1, (step + 1) / (0.1 * steps))
        optimizer.param_groups[0]["lr"] = peak * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16()):
            loss = F.cross_entropy(model(moved(x)).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 500 == 499:
            log(f"{name}: step {step + 1}/{steps}, loss {loss.item():.3f}, {time.time() - start:.0f} s")
    model.half().float()                               # what is stored is what is measured
    return model.eval(), accuracy(model.eval())


def moved(x):
    """Rotated by up to 10 degrees, scaled by up to 10 %, shifted by up to 2 pixels, sheared by up to 0.15."""
    n = len(x)

    def uniform(bound):
        return (2 * torch.rand(n) - 1) * bound

    angle, scale, shear = uniform(math.radians(10)), 1 + uniform(0.1), uniform(0.15)
    row1 = torch.stack([angle.cos() / scale, shear - angle.sin() / scale, uniform(2 / 14)], dim=1)
    row2 = torch.stack([angle.sin() / scale, angle.cos() / scale, uniform(2 / 14)], dim=1)
    grid = F.affine_grid(torch.stack([row1, row2], dim=1), x.shape, align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1     # outside the image is black, -1


@torch.no_grad()
def accuracy(model):
    x, y = digits("test").first(10_000)
    return sum((model(a).argmax(1) == b).sum().item() for a, b in zip(x.split(500), y.split(500))) / len(x)


def main(argv=None):
    options = {"epochs": "8", "out": str(JUDGES)}
    for argument in sys.argv[1:] if argv is None else argv:
        key, _, value = argument.partition("=")
        if key not in options or not value:
            raise UserError(f"unknown argument {argument}: use epochs=N or out=FILE")
        options[key] = value
    try:
        epochs = float(options["epochs"])
    except ValueError:
        epochs = math.nan
    if not (math.isfinite(epochs) and epochs > 0):
        raise UserError(f"epochs={options['epochs']} is no number above zero: use epochs=N")
    out = Path(options["out"]).resolve()
    weights, report = {}, {}
    for name in WIDTHS:
        model, report[name] = train(name, epochs)
        print(f"{name}: test accuracy {100 * report[name]:.2f} %")
        weights |= {f"{name}.{key}": value.half() if value.is_floating_point() else value
                    for key, value in model.state_dict().items()}
    if min(report.values()) < TARGET and out == JUDGES.resolve():
        raise UserError(f"a judge below {100 * TARGET:.1f} % is not kept: {report}")
    with atomic(out) as temporary:
        save_file(weights, temporary, metadata={name: f"{value:.4f}" for name, value in report.items()})
    return report


if __name__ == "__main__":
    cli(main)

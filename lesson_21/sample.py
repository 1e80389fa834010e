"""Draw digits with a rectified flow: in one network call, or in more.

    python sample.py                                     64 digits in one call each, by the distilled network
    python sample.py model=2-rf steps=2                  the reflowed network in two Euler steps; model=1-rf: before it
    python sample.py model=1-rf solver=dopri5            the adaptive solver; it says how many calls it needed
    python sample.py model=1-rf steps=50 noise=1         the stochastic sampler
    python sample.py gif=denoising.gif npz=samples.npz   1-rf beside 2-rf as an animation; the images as an array
    python sample.py n=2048 metrics=true                 FID and the other scores
"""

import torch

from model import RectifiedFlow, UNet
from utils import Run, UserError, batches, cli, digits, noise, report, save_gif, save_grid, save_npz, score, seeded


def main(argv=None):
    run = Run(__file__, argv)
    cfg, path = run.config.sample, run.weights().path
    if cfg.noise and cfg.solver != "euler":
        raise UserError(f"noise={cfg.noise:g} is a sampler of its own: leave out solver={cfg.solver}")
    flow, net = load(run, path, cfg.model)
    test = None if cfg.source == "noise" else run.images(split="test")
    generators, begin = run.generators(cfg.n), run.clock()                  # one for each image
    z0 = starts(cfg.source, cfg.n, cfg.seed, run.data["shape"], test, generators).to(run.device)
    x, calls = draw(flow, net, z0, cfg, generators)
    seconds = run.clock() - begin
    run.output(save_grid, x[:64], cfg.out)
    print(f"{len(x)} images of {cfg.model}, network calls each: {calls}, in {seconds:.1f} s")
    if cfg.npz:
        run.output(save_npz, x, cfg.npz)
    if cfg.gif:
        run.output(save_gif, way(run, path, z0[:6]), cfg.gif, columns=6)
    if cfg.metrics:
        print(report(scores := score(x)))
        run.record(f"sample_{cfg.model}_{cfg.solver}_{calls}", nfe=calls, seconds=round(seconds, 1), model=cfg.model,
                   solver=cfg.solver, noise=cfg.noise, **scores)
    return x


def load(run, path, model):
    """Process and network of one stage; the files of all three lie side by side."""
    weights = run.read(path if model == "distilled" else path.with_name(f"{model}.safetensors"))
    return run.place(RectifiedFlow(**weights.config["flow"]), weights.load(UNet(**weights.config["unet"])))


def subset(name, data, seed=0):
    """The images that `source` or `target` names, all or one class, in an order of this seed; None for noise."""
    return None if name == "noise" else data.ordered(seed, None if name == "digits" else int(name))


def starts(source, n, seed, shape=(1, 28, 28), test=None, generators=None):
    """n starts: noise of this seed or of a generator for each, or n images of a class of the test set. (n, C, H, W)."""
    if source == "noise":                               # moved: a training with this seed pairs the noise that it gives
        return noise(n, shape, generators or seeded(seed + 10**7))
    data = subset(source, test or digits("test", 1))
    return data.first(min(n, len(data)), seed)[0]


def draw(flow, net, z0, cfg, generators):
    """The images that the starts are carried to, and the network calls (of dopri5: the mean of the batches)."""
    parts = [(flow.stochastic(net, part, cfg.steps, cfg.noise, own), cfg.steps) if cfg.noise
             else flow.sample(net, part, cfg.solver, cfg.steps, cfg.tolerance)
             for part, (_, own) in zip(z0.split(cfg.batch), batches(len(z0), cfg.batch, generators))]
    return torch.cat([x for x, _ in parts]), round(sum(calls for _, calls in parts) / len(parts))


def way(run, path, z0, frames=30):
    """Pictures on the way: z_t of 1-rf and the end of the line it is on; the same of 2-rf. (4 n, C, H, W) each."""
    rows = []
    for model in ("1-rf", "2-rf"):
        flow, net = load(run, path, model)
        z, v = flow.path(net, z0, frames)
        aims = [flow.predict_z1(z[i], v[i], i / frames) for i in range(frames)] + [z[-1]]
        rows.append([torch.cat(pair) for pair in zip(z, aims)])
    return [torch.cat(pair) for pair in zip(*rows)]


if __name__ == "__main__":
    cli(main)

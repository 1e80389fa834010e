"""Draw digits: solve the flow's ODE from noise to data.

    python sample.py                                     64 digits from your newest weights, else the published
    python sample.py solver=dopri5 tolerance=1e-3        the adaptive solver; it says how many calls it needed
    python sample.py solver=euler steps=10 n=16 seed=3   few calls, fewer digits, other noise
    python sample.py gif=denoising.gif npz=samples.npz   the way there as an animation; the images as an array
    python sample.py n=2048 metrics=true                 FID and the other scores
    python sample.py bits=200                            the likelihood of test images, in bits per dimension
"""


import torch

from model import FlowMatching, UNet, bits_per_dim, dequantise, quantise, signs
from utils import Run, cli, noise, report, save_gif, save_grid, save_npz, score


def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.sample
    weights = run.weights()                             # the file carries its network's configuration
    flow = FlowMatching(**weights.config["flow"])
    flow, net = run.place(flow, weights.load(UNet(**weights.config["unet"])))

    start = run.clock()
    eps = noise(cfg.n, weights.data.shape, run.generators(cfg.n)).to(run.device)           # every image has its own
    x, calls = draw(flow, net, eps, cfg.batch, cfg.solver, cfg.steps, cfg.tolerance)
    seconds = run.clock() - start
    run.output(save_grid, x[:64], cfg.out)
    print(f"{cfg.n} images, {calls} network calls each, in {seconds:.1f} s")
    if cfg.npz:
        run.output(save_npz, x, cfg.npz)
    if cfg.gif:
        run.output(save_gif, way(flow, net, eps[:6]), cfg.gif, columns=6)
    if cfg.bits:
        x0 = run.images(split="test").first(cfg.bits)[0].to(run.device)
        bits, bits_calls = likelihood(flow, net, x0, cfg.tolerance)
        error = float(bits.std() / len(bits) ** 0.5)
        print(f"{bits.mean():.3f} +- {error:.3f} bits/dim, {cfg.bits} test images, {bits_calls} calls each")
        run.record("bits", bits_per_dim=float(bits.mean()), standard_error=error, images=cfg.bits, calls=bits_calls,
                   tolerance=cfg.tolerance)
    if cfg.metrics:
        scores = score(x)
        print(report(scores))
        run.record(f"sample_{cfg.solver}_{calls}", nfe=calls, seconds=round(seconds, 1), solver=cfg.solver, **scores)
    return x


def draw(flow, net, eps, batch, *solver):
    """The images that the noises are carried to, as grey levels in [-1, 1], and the network calls (mean of batches)."""
    parts = [flow.sample(net, part, *solver) for part in eps.split(batch)]
    return torch.cat([quantise(x) for x, _ in parts]), round(sum(calls for _, calls in parts) / len(parts))


def likelihood(flow, net, x0, tolerance, batch=50):
    """Bits per dimension of 8-bit images x0 (N,), and the network calls. The same added noise and signs every time."""
    generator, bits, calls = torch.Generator().manual_seed(0), [], []
    for part in x0.split(batch):
        x, probe = dequantise(part, generator), signs(part, generator)
        log_p, _, n = flow.log_likelihood(net, x, probe, tolerance)
        bits.append(bits_per_dim(log_p, x[0].numel()))
        calls.append(n)
    return torch.cat(bits), round(sum(calls) / len(calls))


@torch.no_grad()
def way(flow, net, eps, frames=30):
    """Pictures on the way: x_t of every noise, and below it the x_0 that the field there aims at."""
    times = torch.linspace(0, flow.path.end, frames, dtype=torch.float64)
    path, _ = flow.sample(net, eps, "midpoint", times=times)
    pictures = []
    for x, t in zip(path, times[:-1].to(eps.device)):
        t = t.expand(len(x))
        pictures.append(torch.cat([x, flow.predict_x0(x, flow.velocity(net, x, t), t)]))
    return [*pictures, torch.cat([quantise(path[-1])] * 2)]


if __name__ == "__main__":
    cli(main)

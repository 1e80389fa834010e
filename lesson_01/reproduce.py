"""Check on known data what every later lesson relies on, and draw the lesson's pictures.

    python reproduce.py               all measurements, three seeds; writes results/claim.json and the pictures
    python reproduce.py quick=true    a look in half a minute, no verdict; writes to runs/

The criteria were written down before the numbers were seen.

(a) The chain and its closed form. 1e5 points are noised step by step from x_0 = 1. At t = 0, 9, 99, 499 and 999
    their mean and variance are within 3 standard errors of sqrt(abar_t) and 1 - abar_t, in every seed.
(b) Small steps. Walking back with the exact denoiser of a mixture with weights 0.8 and 0.2, 100 or more steps give
    the large cloud a share of 0.80 +- 0.02 in every seed; 5 steps miss it by more than 0.02, and by more than 100
    steps do, in every seed.
(c) Memorisation. Of samples drawn with the exact denoiser of 1,000 training images, the median distance to the
    nearest of those images is below 1 % of the median distance of test images to them. For samples drawn with a
    network that learned from the same 1,000 images it is above 10 %. Both in every seed.

Measured without a verdict: how far the exact reverse step is from a Gaussian, for longer and longer steps; and how
close networks that predict x_0, the noise or the score come to the exact score.
"""

import statistics
import time

import torch

import train
from model import MLP, Diffusion, Mixture, eight_gaussians, swiss_roll, two_gaussians
from sample import picture
from utils import (
    Run,
    Weights,
    cli,
    digits,
    figure,
    parallel,
    save_figure,
    save_gif,
    save_strip,
    trained,
    write_json,
)

TARGETS = ("x0", "noise", "score")
PICTURES = ("claim.png", "small_steps.png", "score_field.png", "particles.gif", "dissolving.png", "memorisation.png")


def main(argv=None):
    run = Run(__file__, argv)
    cfg, start = run.config.reproduce, time.perf_counter()
    run.open_folder("claim")
    diffusion = Diffusion(**run.config.diffusion)
    claim = {"chain": chain(diffusion, cfg), "mixture": mixture_weights(diffusion, cfg), "small_steps":
             small_steps(diffusion)}
    arms = [(run.argv, name, seed) for seed in range(cfg.seeds) for name in ("digits", *TARGETS)]
    arms.append((run.argv, "swiss_roll", 0))
    paths = {job[1:]: path for job, path in zip(arms, parallel(train_arm, arms, cfg.workers))}
    claim["memorisation"] = memorisation(run, paths)
    claim["targets"] = targets(run, paths)
    claim["minutes"] = round((time.perf_counter() - start) / 60, 1)
    for name in ("chain", "mixture", "memorisation"):
        claim[name]["verdict"] = verdict(claim[name]["holds"], cfg)
    run.say(text(claim, cfg))
    write_json(run.folder / "claim.json", claim)
    plot(claim, run.folder / "claim.png")
    plot_small_steps(claim["small_steps"], run.folder / "small_steps.png")
    score_field(run, paths["x0", 0], run.folder / "score_field.png")
    particles(run, paths["swiss_roll", 0], run.folder / "particles.gif")
    run.record("claim", minutes=claim["minutes"], **{k: claim[k]["verdict"] for k in ("chain", "mixture",
                                                                                      "memorisation")})
    if full(cfg):
        for name in ("claim.json", *PICTURES):
            run.publish(run.folder / name)
    run.say(f"wrote {run.folder / 'claim.json'} and the pictures" + " and results/" * full(cfg))
    return claim


def full(cfg):
    return not (cfg.quick or cfg.smoke)


def verdict(holds, cfg):
    if not full(cfg):
        return "no verdict from a quick look"
    return "reproduced" if holds else "not reproduced at this scale"


def train_arm(argv, name, seed):
    """Train one network, or take it from an earlier call: digits, the swiss roll, or eight clouds and a target."""
    run = Run(__file__, argv)
    cfg, folder = run.config.reproduce, run.open_folder("claim")
    what = {"digits": ["data=digits", f"limit={cfg.images}"], "swiss_roll": ["data=swiss_roll"]}.get(
        name, ["data=eight", f"diffusion.predict={name}"])
    return trained(train.main, folder / f"{name}_{seed}", [
        *["smoke=true"] * cfg.smoke, *what, f"seed={seed}", f"steps={cfg.steps}", "preview_every=0",
        f"device={cfg.device}"], run.lesson)


def load(run, path):
    """Process and network of a weights file."""
    weights = Weights(path, run.lesson.name)
    kind = "digits" if "digits" in weights.config else "points"
    return run.place(Diffusion(**weights.config["diffusion"]), weights.load(MLP(**weights.config[kind])))


def at(t, x):
    """The time t for every element of a batch x."""
    return torch.full((len(x),), t, device=x.device)


# ------------------------------------------------------------------ (a) the chain and its closed form
def chain(diffusion, cfg):
    """Noise x_0 = 1 step by step; errors of mean and variance in standard errors, at some t."""
    times = sorted({0, 9, 99, 499, diffusion.timesteps - 1} & set(range(diffusion.timesteps)))
    rows = []
    for seed in range(cfg.seeds):
        generator = torch.Generator().manual_seed(seed)
        x = torch.ones(cfg.chain, dtype=torch.float64)
        for t in range(diffusion.timesteps):
            eps = torch.randn(cfg.chain, generator=generator, dtype=torch.float64)
            x = diffusion.q_step(x, torch.tensor([t]), eps)
            if t in times:
                abar = diffusion.abar[t].item()
                mean, variance, n = x.mean().item(), x.var().item(), cfg.chain
                rows.append({"seed": seed, "t": t, "mean": mean, "mean_exact": abar ** 0.5, "variance": variance,
                             "variance_exact": 1 - abar, "mean_z": (mean - abar ** 0.5) / ((1 - abar) / n) ** 0.5,
                             "variance_z": (variance / (1 - abar) - 1) / (2 / (n - 1)) ** 0.5})
    worst = max(abs(row[key]) for row in rows for key in ("mean_z", "variance_z"))
    return {"rows": rows, "n": cfg.chain, "worst_z": worst, "holds": worst <= 3}


# ------------------------------------------------------------------ (b) the weights of a mixture
def mixture_weights(diffusion, cfg):
    """The large cloud's share among samples drawn with the exact denoiser, by the number of steps."""
    data = two_gaussians(diffusion, 0.8)
    exact = Diffusion(diffusion.timesteps)
    exact.abar = diffusion.abar                             # the same schedule; the mixture answers with x_0
    shares = {}
    for steps in [i for i in (5, 10, 20, 50, 100, 200, 500, 1000) if i <= diffusion.timesteps]:
        for seed in range(cfg.seeds):
            x = exact.sample(data, cfg.n, steps, generator=torch.Generator().manual_seed(seed))
            nearest = torch.cdist(x.double(), data.means).argmin(1)
            shares.setdefault(steps, []).append((nearest == 0).double().mean().item())
    many = all(abs(share - 0.8) <= 0.02 for steps, of in shares.items() if steps >= 100 for share in of)
    few = all(abs(a - 0.8) > max(0.02, abs(b - 0.8)) for a, b in zip(shares[5], shares.get(100, shares[5])))
    return {"share_by_steps": shares, "n": cfg.n, "holds": many and few}


# ------------------------------------------------------------------ (c) memorisation
def memorisation(run, paths):
    """Distance of samples to the nearest training image: exact denoiser, learned network, and test images."""
    cfg = run.config.reproduce
    images, _ = digits("train", limit=cfg.images).first(cfg.images)
    unseen, _ = digits("test").first(cfg.samples)
    rows, shown = [], []
    for seed in range(cfg.seeds):
        diffusion, net = load(run, paths["digits", seed])
        exact = run.place(Mixture(diffusion.cpu(), images))
        diffusion = run.place(diffusion)
        for name, network in (("exact denoiser", exact), ("network", net)):
            x = diffusion.sample(network, cfg.samples, cfg.sample_steps, (1, 28, 28),
                                 torch.Generator().manual_seed(seed)).cpu()
            distance, index = nearest_image(x, images)
            rows.append({"samples": name, "seed": seed, "median_distance": distance.median().item(),
                         "copies": (distance < 0.02).double().mean().item()})
            if seed == 0:
                shown += [x[:16], images[index[:16]]]
                dissolve = dissolve_rows(diffusion, network, unseen[:1]) if name == "network" else dissolve_rows(
                    diffusion, exact, unseen[:1])
                strips = [dissolve[0], dissolve[1]] if name == "exact denoiser" else [*strips, dissolve[1]]
    save_strip(shown, run.folder / "memorisation.png")
    save_strip(strips, run.folder / "dissolving.png", scale=3)
    distance, _ = nearest_image(unseen, images)
    test = distance.median().item()
    share = {name: [row["median_distance"] / test for row in rows if row["samples"] == name]
             for name in ("exact denoiser", "network")}
    return {"rows": rows, "images": cfg.images, "n": cfg.samples, "test_images": test, "share_of_test": share,
            "holds": all(v < 0.01 for v in share["exact denoiser"]) and all(v > 0.1 for v in share["network"])}

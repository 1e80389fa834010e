"""Measure the claims of the DDIM paper again: Table 1, its turn at 1,000 steps, Table 2; and find out what decides.

    python reproduce.py publish=true      all of it, three seeds; writes results/claim.json and results/claim.png
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py n=1024 seeds=5    other values; without publish=true to runs/claim

The criteria were written down before the numbers were seen.

(a) Table 1. With lesson 05's published network, 20 steps of the uniform sub-sequence, x_0 clipped in no row and the
    same x_T in all rows: the FID of eta = 0 is below that of eta = 1, and that below sigma-hat's, in every seed and by
    more than 3 pooled standard deviations over the seeds; and the same holds for the low-level FID. Both must hold.
(b) Its turn. At 20 steps sigma-hat's FID is above that of eta = 0 in every seed; at 1,000 steps it is at least on par:
    not above that of eta = 0 by more than 3 standard deviations of eta = 0 over the seeds at 20 steps (1,000 steps are
    drawn with one seed, at the same n). Again for both distances.
(c) Table 2. The error of encoding test images and drawing them again falls from each S to the next larger one, in each
    of three disjoint sets of images.

Measured without a verdict, at 20 steps: what decides between eta = 0 and eta = 1, one factor at a time against the row
of the claim. A factor "favours" one of them if its FID is lower in every seed and by more than 3 pooled deviations.
"""

import statistics
import time

import torch
from torch import nn

import train
from model import DDIM, slerp
from sample import draw, load
from utils import (
    Run,
    classify,
    cli,
    digits,
    fid_to_test,
    figure,
    floor,
    parallel,
    save_figure,
    save_strip,
    trained,
    write_json,
)

ETAS = {"eta 0": {"eta": 0.0}, "eta 0.2": {"eta": 0.2}, "eta 0.5": {"eta": 0.5}, "eta 1": {"eta": 1.0},
        "sigma-hat": {"hat": True}}
FACTORS = {                                             # what differs from the row of the claim
    "as in the claim": {},
    "x_0 clipped, noise kept (stale)": {"clip": "stale"},
    "x_0 clipped, noise made anew (fresh)": {"clip": "fresh"},
    "times: quadratic, 0 to 0.8 T": {"spacing": "quadratic"},
    "times: both ends, 0 to T - 1": {"spacing": "ends"},
    "times: trailing, T/S - 1 to T - 1": {"spacing": "trailing"},
    "training: short": {"net": "short"},
    "training: medium": {"net": "medium"},
    "training: the exact denoiser": {"net": "exact"},
    "schedule: cosine, medium training": {"net": "cosine"},
    "cosine, medium, fresh, both ends": {"net": "cosine", "clip": "fresh", "spacing": "ends"},
    "linear, medium, fresh, both ends": {"net": "medium", "clip": "fresh", "spacing": "ends"},
}
FIDS = {"fid": "FID", "fid_low": "low-level FID"}


def main(argv=None):
    run = Run(__file__, argv)
    cfg, start = run.config.reproduce, time.perf_counter()
    run.settings.publish &= full(cfg)
    run.open_folder("claim")
    for path in parallel(train_arm, [(run.argv, name) for name in ("short", "medium", "cosine")], cfg.workers):
        run.say(f"trained {path.parent}")
    middle = time.perf_counter()
    wanted = jobs(cfg)
    rows = {}
    for job, row in zip(wanted, parallel(measure, [(run.argv, job) for job in wanted], cfg.workers)):
        rows[key(job)] = row
        run.say(f"{cfg.n} of {job['net']}, {job['steps']} steps, {job['arm']}, seed {job['seed']}, {job['spacing']}, "
                f"{job['clip']}: FID {row['fid']:.3f}   low {row['fid_low']:.3f}")
    exact = [*run.argv, "precision=fp32"]               # an error of rounding would stand in Table 2
    errors = parallel(reconstruction, [(exact, steps) for steps in cfg.reconstruct], cfg.workers)
    claim = {
        "table_1": table_1(rows, cfg), "turn": turn(rows, cfg),
        "table_2": table_2(dict(zip(cfg.reconstruct, errors))), "factors": factors(rows, cfg),
        "consistency": consistency(rows, cfg), "interpolation": interpolation(run),
        "n": cfg.n, "floor": {"fid": floor(cfg.n), "fid_low": floor(cfg.n, low=True)}, "seeds": cfg.seeds,
        "few": cfg.few, "long": cfg.long, "train_steps": cfg.train_steps, "images": cfg.images,
        "minutes": round((time.perf_counter() - middle) / 60, 1),
        "training_minutes": round((middle - start) / 60, 1),
    }
    for name in ("table_1", "turn", "table_2"):
        claim[name]["verdict"] = verdict(claim[name]["holds"], cfg)
    run.say(text(claim))
    run.output(lambda content, path: write_json(path, content) or path, claim, "claim.json")
    run.output(plot, claim, "claim.png")
    run.output(plot_factors, claim, "factors.png")
    run.output(save_strip, [rows[key(base(arm, cfg.few))]["x"][:12] for arm in ETAS], "eta.png")
    run.record("claim", minutes=claim["minutes"], n=cfg.n, **{
        name: claim[name]["verdict"] for name in ("table_1", "turn", "table_2")})
    return claim


def full(cfg):
    return not (cfg.quick or cfg.smoke)


def verdict(holds, cfg):
    """One of the two verdicts, or none if there were too few seeds for one."""
    if not full(cfg) or cfg.seeds < 3:
        return "no verdict from a quick look"
    return "reproduced" if holds else "not reproduced at this scale"


# ------------------------------------------------------------------ the networks
class Exact(nn.Module):
    """The noise that the best possible network predicts for these training images: E[eps | x_t]. (B, 1, 28, 28)."""

    def __init__(self, ddim, images):
        super().__init__()
        self.ddim, self.shape = ddim, images.shape[1:]
        self.register_buffer("images", images.flatten(1), persistent=False)                        # (N, 784)

    def forward(self, x, t):
        """x (B, 1, 28, 28), t (B,) -> the noise."""
        abar = self.ddim.abar[t].float()[:, None]
        x = x.flatten(1)
        distance = abar * self.images.square().sum(1) - 2 * abar.sqrt() * (x @ self.images.T)      # less |x|^2
        x0 = torch.softmax(-distance / (2 * (1 - abar)), dim=1) @ self.images                      # E[x_0 | x_t]
        return ((x - abar.sqrt() * x0) / (1 - abar).sqrt()).unflatten(1, self.shape)


def train_arm(argv, name):
    """Train one of the short networks, or take it from an earlier call."""
    run = Run(__file__, argv)
    cfg, folder = run.config.reproduce, run.open_folder("claim")
    own = [a for a in argv if a.split("=")[0].split(".")[0] in ("unet", "ddpm", "train", "gpu", "device", "smoke")]
    steps = cfg.train_steps[name != "short"]
    schedule = "cosine" if name == "cosine" else "linear"
    return trained(train.main, folder / name, [*own, f"ddpm.schedule={schedule}", f"steps={steps}",
                                               "preview_every=0"], run.lesson)


def network(run, name):
    """Sampler and network called `name`; in smoke mode the published one is that of the longer training."""
    cfg = run.config.reproduce
    if name == "exact":
        ddim = DDIM(**run.config.ddpm)
        return run.place(ddim, Exact(ddim, digits("train").first(cfg.exact_images)[0]))
    if name == "published" and not cfg.smoke:
        return load(run, run.read(run.published))
    name = "medium" if name == "published" else name
    return load(run, run.read(max((run.folder / name).glob("**/weights.safetensors"))))


# ------------------------------------------------------------------ drawing and scoring
def base(arm, steps, seed=0, net="published", spacing="uniform", clip="none"):
    """A row of the claim: all that can be changed has its first value."""
    return {"arm": arm, "steps": steps, "seed": seed, "net": net, "spacing": spacing, "clip": clip}


def key(job):
    return tuple(job.values())


def jobs(cfg):
    """Every row that is drawn, once, the longest first."""
    seeds = range(cfg.seeds)
    wanted = [base(arm, cfg.long) for arm in ("eta 0", "sigma-hat")]
    wanted += [base(arm, steps) for steps in cfg.counts for arm in ETAS]
    wanted += [base(arm, cfg.few, seed) for seed in seeds for arm in ETAS]
    wanted += [base("sigma-hat", cfg.few, seed, clip="fresh") for seed in seeds]
    wanted += [base(arm, cfg.few, seed, **change) for change in FACTORS.values() for seed in seeds
               for arm in ("eta 0", "eta 1")]
    return sorted({key(job): job for job in wanted}.values(), key=lambda job: -job["steps"])


def measure(argv, job):
    """Draw n images in one way; their two FIDs, and the images."""
    run = Run(__file__, argv)
    cfg, _ = run.config.reproduce, run.open_folder("claim")
    ddim, net = network(run, job["net"])
    x = draw(ddim, net, cfg.n, job["seed"], cfg.batch, times=ddim.times(job["steps"], job["spacing"]),
             clip=job["clip"], **ETAS[job["arm"]]).cpu()
    return {"fid": fid_to_test(x), "fid_low": fid_to_test(x, low=True), "x": x}


def of_seeds(rows, cfg, arm, what, **change):
    """One number of a row of the claim, or of one with a change, for every seed."""
    return [rows[key(base(arm, cfg.few, seed, **change))][what] for seed in range(cfg.seeds)]


def below(a, b):
    """Whether a is below b in every seed and by more than 3 pooled standard deviations."""
    spread = ((deviation(a) ** 2 + deviation(b) ** 2) / 2) ** 0.5
    return all(x < y for x, y in zip(a, b)) and statistics.mean(b) - statistics.mean(a) > 3 * spread


def deviation(values):
    """Standard deviation over the seeds; 0 for a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def table_1(rows, cfg):
    """(a): both distances by eta and number of steps, and their order at few steps."""
    grid = {arm: {str(steps): {what: rows[key(base(arm, steps))][what] for what in FIDS}
                  for steps in sorted({*cfg.counts, cfg.few, cfg.long}) if key(base(arm, steps)) in rows}
            for arm in ETAS}
    few = {arm: {what: of_seeds(rows, cfg, arm, what) for what in FIDS} for arm in ETAS}
    official = {what: of_seeds(rows, cfg, "sigma-hat", what, clip="fresh") for what in FIDS}
    order = {what: {"eta 0 < eta 1": below(few["eta 0"][what], few["eta 1"][what]),
                    "eta 1 < sigma-hat": below(few["eta 1"][what], few["sigma-hat"][what])} for what in FIDS}
    return {"by_steps": grid, "at_few_steps": few, "sigma_hat_clipped": official, "order": order,
            "holds": all(all(one.values()) for one in order.values())}


def turn(rows, cfg):
    """(b): sigma-hat against eta = 0 at few and at all steps."""
    result = {}
    for what in FIDS:
        few = [of_seeds(rows, cfg, arm, what) for arm in ("eta 0", "sigma-hat")]
        zero, hat = (rows[key(base(arm, cfg.long))][what] for arm in ("eta 0", "sigma-hat"))
        result[what] = {"eta 0": zero, "sigma-hat": hat, "margin": 3 * deviation(few[0]),
                        "holds": all(a < b for a, b in zip(*few)) and hat - zero <= 3 * deviation(few[0])}
    return {**result, "holds": all(one["holds"] for one in result.values())}


def factors(rows, cfg):
    """Both distances of eta = 0 and of eta = 1 for every factor, and which of the two it favours."""
    table = {}
    for name, change in FACTORS.items():
        table[name] = {}
        for what in FIDS:
            zero, one = (of_seeds(rows, cfg, arm, what, **change) for arm in ("eta 0", "eta 1"))
            favours = "eta 0" if below(zero, one) else "eta 1" if below(one, zero) else "neither"
            table[name][what] = {"eta 0": zero, "eta 1": one, "favours": favours}
    return table


# ------------------------------------------------------------------ one noise, one image: Sections 5.2 to 5.4
def reconstruction(argv, steps):
    """Table 2: test images encoded and drawn again; the squared error of [0, 1] pixels, for each set of images."""
    run = Run(__file__, argv)
    cfg, _ = run.config.reproduce, run.open_folder("claim")
    ddim, net = network(run, "published")
    x0, tau = digits("test").first(cfg.images)[0].to(run.device), ddim.times(steps)
    x = ddim.sample(net, ddim.encode(net, x0, tau), tau)
    error = ((x - x0) / 2).square().flatten(1).mean(1)
    return [float(part.mean()) for part in error.chunk(cfg.seeds)]


def table_2(errors):
    """(c): the error by S, and whether it falls from each to the next in every set."""
    falls = all(a > b for few, more in zip(list(errors.values()), list(errors.values())[1:])
                for a, b in zip(few, more))
    return {"error": {str(steps): values for steps, values in errors.items()}, "holds": falls}


def consistency(rows, cfg):
    """How far images are from those of eta = 0, `long` steps and the same x_T; and whether the digit is the same."""
    table, reference = {}, rows[key(base("eta 0", cfg.long))]["x"]
    for arm in ("eta 0", "eta 1"):
        for steps in sorted({*cfg.counts, cfg.few}):
            x = rows[key(base(arm, steps))]["x"]
            same = (classify(x)[0] == classify(reference)[0]).float().mean()
            table.setdefault(arm, {})[str(steps)] = {
                "rms": float((x - reference).flatten(1).square().mean(1).sqrt().mean()), "same_digit": float(same)}
    return table


def interpolation(run):
    """FID of what is drawn half-way between two noises: along the circle, and in a straight line."""
    cfg = run.config.reproduce
    ddim, net = network(run, "published")
    a, b = (torch.randn(cfg.n, 1, 28, 28, generator=run.generator(i)).to(run.device) for i in (1, 2))
    mixed = {"from noise": a, "slerp": slerp(a, b, 0.5), "straight": (a + b) / 2}
    result = {}
    for name, xT in mixed.items():
        x = torch.cat([ddim.sample(net, part, ddim.times(cfg.few)) for part in xT.split(cfg.batch)])
        result[name] = {"fid": fid_to_test(x), "fid_low": fid_to_test(x, low=True)}
    return result


# ------------------------------------------------------------------ what is printed and drawn
def text(claim):
    """The tables with their verdicts."""
    def mean(values):
        return f"{statistics.mean(values):8.3f} +- {deviation(values):<7.3f}"

    lines = ["", f"n = {claim['n']}; floor: FID {claim['floor']['fid']:.3f}, low-level {claim['floor']['fid_low']:.3f}",
             f"(a) Table 1 at {claim['few']} steps: {claim['table_1']['verdict']}"]
    few = {**claim["table_1"]["at_few_steps"], "sigma-hat, clipped": claim["table_1"]["sigma_hat_clipped"]}
    lines += [f"    {arm:20} FID {mean(row['fid'])}   low {mean(row['fid_low'])}" for arm, row in few.items()]
    lines += [f"    {name}: " + ", ".join(f"{pair} {'holds' if ok else 'does not hold'}" for pair, ok in order.items())
              for what, name in FIDS.items() for order in [claim["table_1"]["order"][what]]]
    lines += ["    by steps (one seed):"]
    for arm, row in claim["table_1"]["by_steps"].items():
        lines += [f"    {arm:10} " + "   ".join(f"{s}: {v['fid']:.2f} / {v['fid_low']:.2f}" for s, v in row.items())]
    lines += [f"(b) the turn at {claim['long']} steps: {claim['turn']['verdict']}"]
    lines += [f"    {name}: eta 0 {row['eta 0']:.3f}, sigma-hat {row['sigma-hat']:.3f}, margin {row['margin']:.3f}"
              for what, name in FIDS.items() for row in [claim["turn"][what]]]
    lines += [f"(c) Table 2, squared error of there and back: {claim['table_2']['verdict']}"]
    lines += [f"    S = {s:>4}: " + "  ".join(f"{v:.5f}" for v in values)
              for s, values in claim["table_2"]["error"].items()]
    lines += ["what decides, FID of eta 0 and eta 1, low-level FID of eta 0 and eta 1:"]
    for name, row in claim["factors"].items():
        lines += [f"    {name:38} " + "   ".join(
            f"{mean(one['eta 0'])} {mean(one['eta 1'])} {one['favours']:8}" for one in row.values())]
    for arm, row in claim["consistency"].items():
        lines += [f"distance of {arm} to eta 0 with {claim['long']} steps: " + "   ".join(
            f"{s}: {v['rms']:.3f} ({100 * v['same_digit']:.0f} % same digit)" for s, v in row.items())]
    lines += ["half-way between two noises: " + "   ".join(
        f"{name} FID {v['fid']:.2f} low {v['fid_low']:.2f}" for name, v in claim["interpolation"].items())]
    return "\n".join(lines)


def plot(claim, path):
    """Three answers: how both distances fall with the number of steps, and the error of there and back."""
    fig, axes = figure(1, 3, width=4.2)
    for ax, (what, name) in zip(axes, FIDS.items()):
        for i, (arm, row) in enumerate(claim["table_1"]["by_steps"].items()):
            ax.plot([int(s) for s in row], [v[what] for v in row.values()], "o-", color=f"C{i}", ms=4, label=arm)
        ax.axhline(claim["floor"][what], color="grey", ls=":", lw=1)
        ax.set(xscale="log", yscale="log", xlabel="network calls an image", title=f"{name}, n = {claim['n']}",
               ylabel=f"{name} (dotted: floor)")
    axes[0].legend(fontsize=8)
    error = claim["table_2"]["error"]
    for values in zip(*error.values()):
        axes[2].plot([int(s) for s in error], values, "o-", ms=4)
    axes[2].set(xscale="log", yscale="log", xlabel="steps each way", ylabel="squared error, pixels in [0, 1]",
                title="there and back, sets of images")
    for ax in axes:
        ax.grid(alpha=0.3)
    return save_figure(fig, path)


def plot_factors(claim, path):
    """What decides: the FID of eta = 0 as a multiple of that of eta = 1, each seed a dot; left of 1, 0 is better."""
    names = list(claim["factors"])
    fig, ax = figure(width=8.0, height=0.8 + 0.36 * len(names))
    for k, (what, name) in enumerate(FIDS.items()):
        for i, row in enumerate(claim["factors"].values()):
            ratio = [a / b for a, b in zip(row[what]["eta 0"], row[what]["eta 1"])]
            ax.plot(ratio, [i + 0.24 * k - 0.12] * len(ratio), "os"[k], color=f"C{k}", ms=5, alpha=0.7,
                    label=name if i == 0 else None)
    ax.axvline(1, color="grey", lw=1)
    ax.set(xscale="log", yticks=range(len(names)), yticklabels=names,
           xlabel=f"eta = 0 over eta = 1, {claim['few']} steps (left: eta = 0 is better)")
    ax.invert_yaxis()
    ax.grid(alpha=0.3, axis="x", which="both")
    ax.legend(fontsize=8)
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)

"""Measure the claims of the NCSN paper again: annealing finds the weights of modes, and draws digits.

    python reproduce.py publish=true      all arms, three seeds; writes results/claim.json and the pictures
    python reproduce.py quick=true        a look at it, no verdict

The criteria were written down before the numbers were seen.

(a) Two clouds in the plane hold 0.8 and 0.2 of the data; between them lies almost nothing. Both samplers get the exact
    score, the same uniform starts and the same number of score evaluations. Annealed Langevin dynamics puts a share of
    0.80 +- 0.03 into the large cloud in every seed. Plain Langevin dynamics keeps the share of the starts that lie in
    that cloud's basin, about a half, to within 0.05 in every seed.
(b) MNIST, equal training steps, equal network calls a sample. The annealed arm has ten noise levels; the plain arm has
    the smallest of them, sigma = 0.01, in training and in sampling; it starts from uniform noise in [0, 1], as the
    paper's chains do, and gets the better of two step sizes. The annealed FID is lower in every seed, the gap is
    above 3 pooled standard deviations over the seeds, and the annealed mean is below half of the other.

A first look at (a), with 100 steps a level and 4,000 points, gave 0.778. Below sigma of about 3 hardly a point
crosses between the clouds, so the share lags behind; 200 steps a level were then chosen, for both samplers alike.

Measured without a verdict: (a) with other values of sigma_1; the exact score against a learned one; the loss at each
level; with the published network, single levels of it, the chain from uniform noise, and (c) the digit that a judge
reads in inpainted images, with the known half noised to the level or left clean.
"""

import statistics
import time

import torch

import train
from model import MLP, NCSN, ScoreNet, dequantise, from_unit, two_clouds
from utils import (
    Run,
    Weights,
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

SHOWN = (3, 5, 9)                                       # levels of the two clouds whose score is drawn
ARMS = {"annealed": [], "plain": ["ncsn.levels=1", "ncsn.sigma_1=0.01", "ncsn.sigma_L=0.01"]}


def main(argv=None):
    run = Run(__file__, argv)
    cfg, start = run.config.reproduce, time.perf_counter()
    run.open_folder("claim")
    rows, jobs = [], [(run.argv, arm, seed) for seed in range(cfg.seeds) for arm in ARMS]
    for row in parallel(measure, jobs, cfg.workers):
        run.say("{arm:9} seed {seed}: FID ".format(**row) + ", ".join(f"{f:.2f}" for f in row["fid"].values()))
        rows.append(row)
    learned = learned_score(cfg)
    names = ("points", "single_levels", "uniform_start", "inpainting")
    more = dict(zip(names, parallel(further, [(run.argv, name) for name in names], cfg.workers)))
    along = more["points"].pop("along")
    claim = {"points": more.pop("points"), "digits": judge_rows(rows), **more,
             "learned_score_error": learned_error(learned), "n": cfg.n, "floor": floor(cfg.n),
             "train_steps": cfg.steps, "network_calls": calls(run), "rows": rows,
             "minutes": round((time.perf_counter() - start) / 60, 1)}
    for name in ("points", "digits"):
        claim[name]["verdict"] = verdict(claim[name]["holds"], cfg)
    run.say(text(claim))
    run.output(save_json, claim, "claim.json")
    run.output(plot, (claim, along), "claim.png")
    run.output(plot_score_field, learned, "score_field.png")
    run.output(save_strip, [pictures(run, arm) for arm in ARMS], "annealed_and_plain.png")
    run.record("claim", **{key: value for key, value in claim.items() if key != "rows"})
    return claim


def save_json(claim, path):
    write_json(path, claim)
    return path


def verdict(holds, cfg):
    """One of the two verdicts, or none if there were too few seeds for one."""
    if cfg.quick or cfg.smoke or cfg.seeds < 3:
        return "no verdict from a quick look"
    return "reproduced" if holds else "not reproduced at this scale"


def further(argv, name):
    """One of the measurements that need no training of their own, in a process of its own."""
    run = Run(__file__, argv)
    run.open_folder("claim")
    return {"points": points, "single_levels": single_levels, "uniform_start": uniform_start,
            "inpainting": inpainting}[name](run)


def seeded(seed):
    """A generator of random numbers."""
    return torch.Generator().manual_seed(seed)


def chain(ncsn, net, x, steps, epsilon, seed):
    """The end of Algorithm 1 from x."""
    for _, end, _ in ncsn.anneal(net, x.to(ncsn.sigmas.device), steps, epsilon, seeded(seed + 1000)):
        pass
    return end


def noise(n, seed, uniform):
    """n starts: uniform noise in [0, 1], as the paper's chains, or Gaussian noise of deviation 1, as the lesson's."""
    shape = n, 1, 28, 28
    return torch.rand(shape, generator=seeded(seed)) if uniform else torch.randn(shape, generator=seeded(seed))


# ------------------------------------------------------------------ (a) two clouds with the exact score
def points(run):
    """The share of the large cloud among the ends of each sampler, from the same uniform starts in [-8, 8]^2."""
    cfg, share, along = run.config.reproduce, {}, {}
    for seed in range(cfg.seeds):
        x = 16 * torch.rand(cfg.points, 2, generator=seeded(seed)) - 8
        steps, epsilon = cfg.point_steps, cfg.point_epsilon
        ends = {"basin": downhill(x), "plain": exact(NCSN(0.01, 0.01, 1), x, 10 * steps, epsilon, seed),
                "annealed": exact(NCSN(20, 1, 10), x, steps, epsilon, seed)}
        ends |= {from_sigma(s): exact(NCSN(s, 1, 10), x, steps, epsilon, seed) for s in cfg.sigmas_1}
        for name, x in ends.items():
            share.setdefault(name, []).append((x.sum(1) > 0).double().mean().item())
            along.setdefault(name, x.sum(1).tolist())
    annealed = all(abs(s - 0.8) <= 0.03 for s in share["annealed"])
    plain = all(abs(s - b) <= 0.05 and abs(b - 0.5) <= 0.05 for s, b in zip(share["plain"], share["basin"]))
    return {"share": share, "n": cfg.points, "steps_a_level": cfg.point_steps, "holds": annealed and plain,
            "along": along}


def from_sigma(sigma_1):
    return f"annealed from {sigma_1:g}"


def exact(ncsn, x, steps, epsilon, seed):
    """The end of Algorithm 1 from x with the exact score of the two clouds."""
    return chain(ncsn, two_clouds(ncsn), x, steps, epsilon, seed)


def downhill(x):
    """Where the points end that follow the exact score without noise: which basin each start lies in."""
    data = two_clouds(NCSN(0.01, 0.01, 1))
    for _ in range(500):
        x = x + 0.05 * data(x, torch.zeros(len(x), dtype=torch.long))
    return x


def learned_score(cfg):
    """A small network that learned the score of the two clouds by denoising score matching, and its process."""
    torch.manual_seed(0)
    ncsn, net = NCSN(20, 1, 10), MLP()
    data, optimizer = two_clouds(ncsn), torch.optim.Adam(net.parameters(), lr=2e-3)
    for step in range(cfg.point_training):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / cfg.point_training)
        loss = ncsn.loss(net, data.draw(256))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return ncsn, net.eval()


def learned_error(learned):
    """Error of the learned score relative to the exact one, where the noised data are and all over the square."""
    ncsn, net = learned
    data, table = two_clouds(ncsn), {}
    for level in SHOWN:
        i = torch.full((5000,), level)
        noised = ncsn.q_sample(data.draw(5000, seeded(0)), i, torch.randn(5000, 2, generator=seeded(1)))
        places = {"of_the_data": noised, "of_the_square": 16 * torch.rand(5000, 2, generator=seeded(2)) - 8}
        with torch.no_grad():
            table[f"{ncsn.sigmas[level].item():.2g}"] = {
                name: ((net(x, i) - data(x, i)).norm() / data(x, i).norm()).item() for name, x in places.items()}
    return table


# ------------------------------------------------------------------ (b) digits at equal network calls
def calls(run):
    """Network calls a sample, in both arms: L T of the annealed one."""
    return run.config.ncsn.levels * run.config.reproduce.sample_steps


def weights_of(run, arm, seed):
    """Process and network of an arm, trained now or in an earlier call."""
    cfg, folder = run.config.reproduce, run.open_folder("claim")
    own = [a for a in run.argv if a.split("=")[0].split(".")[0] in ("scorenet", "ncsn", "train", "gpu", "device",
                                                                    "smoke", "threads")]
    path = trained(train.main, folder / f"{arm}_{seed}", [
        *own, *ARMS[arm], f"seed={seed}", f"steps={cfg.steps}", "preview_every=0"], run.lesson)
    return read(run, path)


def read(run, path):
    """Process and network of a weights file."""
    weights = Weights(path, run.name)
    ncsn = NCSN(**weights.config["ncsn"])
    return run.place(ncsn, weights.load(ScoreNet(ncsn.levels, **weights.config["scorenet"])))


def measure(argv, arm, seed):
    """Train an arm, draw samples with the calls that both arms may spend, score them, and look at the loss."""
    run = Run(__file__, argv)
    cfg = run.config.reproduce
    ncsn, net = weights_of(run, arm, seed)
    steps, fid = calls(run) // ncsn.levels, {}
    for epsilon in [cfg.epsilon] if arm == "annealed" else [cfg.epsilon, 4 * cfg.epsilon]:
        x = noise(cfg.n, seed, uniform=arm == "plain")
        fid[f"{epsilon:g}"] = judged(chain(ncsn, net, x, steps, epsilon, seed))
    torch.manual_seed(0)                               # the same noise for all
    x0 = dequantise(digits("test").first(cfg.loss_images)[0]).to(run.device)
    losses = []
    with torch.no_grad():
        for level in range(ncsn.levels):
            i = torch.full((len(x0),), level, device=run.device)
            losses.append(round(ncsn.level_losses(net, x0, i, torch.randn_like(x0)).mean().item(), 5))
    return {"arm": arm, "seed": seed, "fid": fid, "best": min(fid.values()), "losses": losses}


def judge_rows(rows):
    """Means and deviations of the two arms, and whether criterion (b) holds."""
    ours, plain = ([row["best"] for row in rows if row["arm"] == arm] for arm in ("annealed", "plain"))
    gap = statistics.mean(plain) - statistics.mean(ours)
    spread = ((deviation(ours) ** 2 + deviation(plain) ** 2) / 2) ** 0.5
    lower = all(a < b for a, b in zip(ours, plain))
    half = statistics.mean(ours) < 0.5 * statistics.mean(plain)
    return {"annealed_mean": statistics.mean(ours), "annealed_std": deviation(ours), "gap": gap,
            "plain_mean": statistics.mean(plain), "plain_std": deviation(plain), "pooled_std": spread,
            "lower_in_every_seed": lower, "below_half": half, "holds": lower and half and gap > 3 * spread}


def deviation(values):
    """Standard deviation over the seeds; 0 for a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


class OneLevel(torch.nn.Module):
    """A network of many levels that is always asked for the same one."""

    def __init__(self, net, level):
        super().__init__()
        self.net, self.level = net, level

    def forward(self, x, i):
        return self.net(x, torch.full_like(i, self.level))


def published(run):
    """The published network and its process; in smoke mode, or where there is none, the annealed arm of seed 0."""
    path = run.lesson / "results" / "weights.safetensors"
    return weights_of(run, "annealed", 0) if run.config.reproduce.smoke or not path.exists() else read(run, path)


def single_levels(run):
    """FID of plain Langevin dynamics with one level of a network that knows many, at the same number of calls."""
    cfg, (ncsn, net) = run.config.reproduce, published(run)
    found = {}
    for level in sorted({0, ncsn.levels // 2, ncsn.levels - 1}):
        sigma = ncsn.sigmas[level].item()
        one = run.place(NCSN(sigma, sigma, 1))
        epsilon = cfg.epsilon * (sigma / ncsn.sigmas[-1].item()) ** 2      # alpha_i of that level
        x = chain(one, OneLevel(net, level), noise(cfg.few, 0, uniform=False), calls(run), epsilon, 0)
        found[f"{sigma:.3g}"] = judged(x)
    x = chain(ncsn, net, noise(cfg.few, 0, uniform=False), cfg.sample_steps, cfg.epsilon, 0)
    return {"fid_by_sigma": found, "fid_annealed": judged(x), "n": cfg.few, "floor": floor(cfg.few)}


def uniform_start(run):
    """FID and brightness of chains from uniform noise in [0, 1], as in the paper."""
    cfg, (ncsn, net) = run.config.reproduce, published(run)
    x = chain(ncsn, net, noise(cfg.few, 0, uniform=True), cfg.sample_steps, cfg.epsilon, 0)
    return {"fid": judged(x), "share_above_half": (x.mean((1, 2, 3)) > 0.5).double().mean().item(),
            "n": cfg.few}


def judged(x):
    """FID of this lesson's images, in about [0, 1], some of which may have run away."""
    return fid_to_test(from_unit(x).nan_to_num().clamp(-1, 1))


def pictures(run, arm):
    """Sixteen samples of an arm of seed 0, at the smaller step size."""
    cfg, (ncsn, net) = run.config.reproduce, weights_of(run, arm, 0)
    x = noise(16, 0, uniform=arm == "plain")
    return from_unit(chain(ncsn, net, x, calls(run) // ncsn.levels, cfg.epsilon, 0)).cpu()


# ------------------------------------------------------------------ (c) inpainting
def inpainting(run):
    """How often a judge reads the right digit in a test image whose right half was made up anew."""
    cfg, (ncsn, net) = run.config.reproduce, published(run)
    x0, label = digits("test").first(cfg.few)
    torch.manual_seed(0)
    known = dequantise(x0).to(run.device)
    mask = torch.zeros_like(known, dtype=torch.bool)
    mask[..., :14] = True
    filled = {"half_alone": torch.where(mask, known, 0.0)}
    for name, process in (("noised_to_the_level", ncsn), ("left_clean", CleanNCSN(ncsn))):
        filled[name] = process.inpaint(net, known, mask, cfg.sample_steps, cfg.epsilon, seeded(0))
    filled["whole_image"] = known
    return {"n": cfg.few, "accuracy": {name: (classify(from_unit(x).nan_to_num())[0] == label).double().mean().item()
                         for name, x in filled.items()}}


class CleanNCSN(NCSN):
    """Inpaints with the known half as it is, at every level: what the paper does not do."""

    def __init__(self, ncsn):
        super().__init__(ncsn.sigmas[0].item(), ncsn.sigmas[-1].item(), ncsn.levels)
        self.to(ncsn.sigmas.device)

    def q_sample(self, x0, i, z):
        return x0


# ------------------------------------------------------------------ what is printed and drawn
def text(claim):
    """The tables with their verdicts."""
    share, both, fill, one = claim["points"]["share"], claim["digits"], claim["inpainting"], claim["single_levels"]
    lines = ["", f"(a) share of the large cloud, exactly 0.8: {claim['points']['verdict']}   (n = "
             f"{claim['points']['n']})"]
    lines += [f"    {name:19}" + "  ".join(f"{s:.4f}" for s in seeds) for name, seeds in share.items()]
    lines += ["    error of a learned score, relative: " + "  ".join(
        "sigma {}: {of_the_data:.2f} where data are, {of_the_square:.2f} all over".format(sigma, **errors)
        for sigma, errors in claim["learned_score_error"].items())]
    lines += [f"(b) FID with {claim['network_calls']} network calls: {both['verdict']}   (n = {claim['n']}, floor "
              f"{claim['floor']:.3f})"]
    lines += [f"    {arm:9} {both[f'{arm}_mean']:8.2f} +- {both[f'{arm}_std']:.2f}" for arm in ARMS]
    lines += [f"    {row['arm']:9} seed {row['seed']}: loss by level, largest noise first: " + " ".join(
        f"{v:.3f}" for v in row["losses"]) for row in claim["rows"]]
    lines += [f"published network, n = {one['n']}: FID {one['fid_annealed']:.2f}; with one level only: " + "  ".join(
        f"sigma {sigma}: {value:.1f}" for sigma, value in one["fid_by_sigma"].items()),
        "    from uniform noise: FID {fid:.2f}, {share_above_half:.2f} turn white".format(**claim["uniform_start"]),
        f"    inpainted digits that are read rightly (n = {fill['n']}): " + "  ".join(
            f"{name} {value:.3f}" for name, value in fill["accuracy"].items())]
    return "\n".join(lines)


def plot(content, path):
    """Which clouds are found, what sigma_1 has to do with it, and the FID of both arms."""
    claim, along = content
    fig, (left, middle, right) = figure(1, 3, width=4.2)
    bins = torch.linspace(-16, 16, 65).tolist()
    for name in ("plain", "annealed"):
        left.hist(along[name], bins, histtype="step", density=True, label=name)
    left.set(xlabel="$x + y$ where the points end", ylabel="density", title="(a) two clouds of weights 0.2, 0.8")
    share = claim["points"]["share"]
    others = {float(name.split()[-1]): seeds for name, seeds in share.items() if "from" in name}
    others[20.0] = share["annealed"]
    for sigma_1, seeds in sorted(others.items()):
        middle.plot([sigma_1] * len(seeds), seeds, "o", color="C1", ms=4)
    middle.axhline(statistics.mean(share["plain"]), color="C0", ls="--", label="plain")
    middle.axhspan(0.77, 0.83, color="grey", alpha=0.2, label="0.80 $\\pm$ 0.03")
    middle.set(xscale="log", xlabel="largest noise $\\sigma_1$", ylabel="share of the large cloud",
               title="how large must $\\sigma_1$ be?")
    for k, arm in enumerate(ARMS):
        values = [row["best"] for row in claim["rows"] if row["arm"] == arm]
        right.plot([k] * len(values), values, "o", color=f"C{1 - k}")
    right.axhline(claim["floor"], color="grey", ls=":", lw=1)
    right.set_xticks(range(2), ["ten levels,\nannealed", "$\\sigma = 0.01$,\nplain"])
    right.set(yscale="log", xlim=(-0.5, 1.5), ylabel=f"FID (n = {claim['n']}; dotted: floor)",
              title=f"(b) {claim['network_calls']} network calls")
    for ax in (left, middle):
        ax.legend(fontsize=8)
    for ax in (left, middle, right):
        ax.grid(alpha=0.3)
    return save_figure(fig, path)


def plot_score_field(learned, path):
    """Exact and learned score at three noise levels, over where the noised data lie."""
    ncsn, net = learned
    data, fine = two_clouds(ncsn), torch.linspace(-8, 8, 120)
    points, pixels = torch.cartesian_prod(*[torch.linspace(-7.5, 7.5, 16)] * 2), torch.cartesian_prod(fine, fine)
    fig, axes = figure(2, 3, width=3.3, height=3.2)
    for column, level in enumerate(SHOWN):
        i, sigma = torch.full((len(points),), level), ncsn.sigmas[level].item()
        log_q = data.log_q(pixels, torch.full((len(pixels),), level)).reshape(120, 120).T
        with torch.no_grad():
            both = data(points, i), net(points, i)
        for ax, score in zip(axes[:, column], both):
            ax.contourf(fine, fine, log_q, torch.linspace(-18, -2, 17), cmap="Blues", extend="both")
            arrow = sigma * score                      # in units of the noise ...
            arrow = arrow / (1 + arrow.norm(dim=1, keepdim=True))          # ... and none longer than 1
            ax.quiver(*points.T, *arrow.T, angles="xy", scale_units="xy", scale=0.8, width=0.005)
            ax.set(xticks=[], yticks=[], xlim=(-8, 8), ylim=(-8, 8), aspect="equal")
        axes[0, column].set_title(f"$\\sigma$ = {sigma:.2g}", fontsize=10)
    axes[0, 0].set_ylabel("exact")
    axes[1, 0].set_ylabel("learned")
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)

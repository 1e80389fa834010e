"""Measure the claims of the NCSN paper again: annealing finds the weights of modes, and draws digits.

    python reproduce.py publish=true      all arms, three seeds; writes results/claim.json and the pictures
    python reproduce.py quick=true        a look at it, no verdict

In the plane two clouds hold 0.8 and 0.2 of the data; between them lies almost nothing. All samplers get the exact
score, the same uniform starts and the same number of score evaluations. On MNIST both arms get equal training steps,
equal network calls a sample and the same starts, uniform noise in [0, 1]. The plain arm has the smallest of the ten
levels, sigma = 0.01, in training and in sampling, and gets the better of two step sizes. The criteria, in `main`, were
written down before the numbers were seen.

Measured without a verdict: other values of sigma_1 in the plane; the exact score against a learned one; the loss at
each level; with the published network, single levels of it, the chain from a black image with noise of the largest
level, and the digit that a judge reads in inpainted images, with the known half noised to the level or left clean.
"""

import torch

import train
from model import MLP, NCSN, dequantise, from_unit, network, two_clouds
from utils import (
    Claim,
    arm_weights,
    classify,
    cli,
    digits,
    dots,
    fid_to_test,
    figure,
    floor,
    published,
    save_figure,
    save_grid,
    seeded,
    ticks,
)

SHOWN = (3, 5, 9)                                      # levels of the two clouds whose score is drawn
ARMS = {"annealed": [], "plain": ["ncsn.levels=1", "ncsn.sigma_1=0.01", "ncsn.sigma_L=0.01"]}
FILLED = ("nothing", "known half noised", "known half left clean", "the true half")        # into the missing half


def main(argv=None):
    claim = Claim(__file__, argv, sections=("images", "unet", "scorenet", "ncsn"))
    run, cfg = claim.run, claim.cfg
    rows = claim.arms(ARMS, train=train.main, load=load, measure=measure, keys=[f"steps={cfg.steps}"])
    clouds = claim.each(points, sampler=["basin", "plain", *[from_sigma(s) for s in (*cfg.sigmas_1, 20)]],
                        seed=claim.seeds)
    basin, plain, annealed = (clouds.values("share", sampler=name) for name in ("basin", "plain", from_sigma(20)))
    claim.judge("a1", "Annealed Langevin dynamics finds the weights 0.8 and 0.2 of two far clouds to 0.03",
                paper="the relative weights come out right (Fig. 3)", rule="in every seed",
                holds=all(abs(share - 0.8) <= 0.03 for share in annealed))
    claim.judge("a2", "Plain Langevin dynamics does not: the starts decide, about a half, to 0.05",
                paper="the relative weights come out wrong (Fig. 3)", rule="in every seed",
                holds=keeps_the_basin(plain, basin))
    claim.judge("b", "Ten annealed levels have less than half the FID of the smallest level alone, at equal calls",
                paper="reported without a number: one small level alone draws no sensible images (Sec. 5)",
                holds=rows.below("annealed", "plain", "best", factor=0.5))
    levels = published(run, "annealed").config["ncsn"]["levels"]
    claim.each(of_the_published, sampler=["all levels", "all levels, start from 0",
                                          *[f"level {level}" for level in sorted({0, levels // 2, levels - 1})]])
    claim.each(inpainting, filled=FILLED)
    learned = learned_score(cfg)
    claim.note("learned_score_error", learned_error(learned))
    claim.note("along", {name: along(clouds, name) for name in ("plain", from_sigma(20))})
    claim.note("floor", floor(cfg.n))
    claim.note("floor_of_few", floor(cfg.few))
    claim.note("network_calls", calls(run))
    run.output(plot_score_field, learned, "score_field.png")
    run.output(save_grid, torch.cat([pictures(run, arm)[:12] for arm in ARMS]), "annealed_and_plain.png", columns=12,
               down=["ten levels", "one level"])
    return claim.finish(plot=plot, n=cfg.n)


def keeps_the_basin(plain, basin):
    """(a2): the share stays that of the basin in which the starts lie, and that is about a half, in every seed."""
    return all(abs(share - start) <= 0.05 and abs(start - 0.5) <= 0.05 for share, start in zip(plain, basin))


def chain(ncsn, net, x, steps, epsilon, seed):
    """The end of Algorithm 1 from x."""
    for _, end, _ in ncsn.anneal(net, x.to(ncsn.sigmas.device), steps, epsilon, seeded(seed + 1000)):
        pass
    return end


def starts(ncsn, n, seed):
    """n starts of Algorithm 1, the same for all arms."""
    return ncsn.start(n, (1, 28, 28), seeded(seed))


# ------------------------------------------------------------------ (a) two clouds with the exact score
def points(run, sampler, seed):
    """The share of the points that end in the large cloud, from the same uniform starts in [-8, 8]^2."""
    cfg = run.config.reproduce
    x, steps = 16 * torch.rand(cfg.points, 2, generator=seeded(seed)) - 8, cfg.point_steps
    if sampler == "basin":
        x = downhill(x)
    else:
        alone = sampler == "plain"
        ncsn = NCSN(0.01, 0.01, 1) if alone else NCSN(float(sampler.split()[-1]), 1, 10)
        x = chain(ncsn, two_clouds(ncsn), x, 10 * steps if alone else steps, cfg.point_epsilon, seed)
    return {"share": (x.sum(1) > 0).double().mean().item(), "ends": [x.sum(1)]}


def from_sigma(sigma_1):
    """The name of a sampler."""
    return f"annealed from {sigma_1:g}"


def along(clouds, sampler):
    """Where seed 0's points end along the line through the clouds: counts in 64 bins from -16 to 16."""
    ends, = clouds.where(sampler=sampler, seed=0)[0]["ends"]
    return torch.histc(ends, 64, -16, 16).int().tolist()


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


def load(run, weights):
    """Process and network of a weights file."""
    ncsn = NCSN(**weights.config["ncsn"])
    return run.place(ncsn, weights.load(network(ncsn, weights.config)))


def measure(run, ncsn, net, arm, seed):
    """FID of samples drawn with the calls that both arms may spend, and the loss at each level."""
    cfg, fid, losses = run.config.reproduce, {}, []
    for epsilon in [cfg.epsilon] if arm == "annealed" else [cfg.epsilon, 4 * cfg.epsilon]:
        x = chain(ncsn, net, starts(ncsn, cfg.n, seed), calls(run) // ncsn.levels, epsilon, seed)
        fid[f"{epsilon:g}"] = judged(x)
    torch.manual_seed(0)                               # the same noise for all
    x0 = dequantise(digits("test").first(cfg.loss_images)[0]).to(run.device)
    with torch.no_grad():
        for level in range(ncsn.levels):
            i = torch.full((len(x0),), level, device=run.device)
            losses.append(round(ncsn.level_losses(net, x0, i, torch.randn_like(x0)).mean().item(), 5))
    return {"fid": fid, "best": min(fid.values()), "losses": losses}


class OneLevel(torch.nn.Module):
    """A network of many levels that is always asked for the same one."""

    def __init__(self, net, level):
        super().__init__()
        self.net, self.level = net, level

    def forward(self, x, i):
        return self.net(x, torch.full_like(i, self.level))


def of_the_published(run, sampler):
    """FID of the published network: all its levels, the same from x = sigma_1 z, or one level at as many calls."""
    cfg, (ncsn, net) = run.config.reproduce, load(run, published(run, "annealed"))
    steps, epsilon, sigma, x = cfg.sample_steps, cfg.epsilon, {}, starts(ncsn, cfg.few, 0)
    if sampler.endswith("start from 0"):
        x = ncsn.sigmas[0].item() * torch.randn(x.shape, generator=seeded(0))
    if sampler.startswith("level"):
        level = int(sampler.split()[-1])
        sigma = {"sigma": ncsn.sigmas[level].item()}
        epsilon *= (sigma["sigma"] / ncsn.sigmas[-1].item()) ** 2              # alpha_i of that level
        ncsn, net, steps = run.place(NCSN(*[sigma["sigma"]] * 2, 1)), OneLevel(net, level), calls(run)
    x = chain(ncsn, net, x, steps, epsilon, 0)
    return {**sigma, "fid": judged(x), "share_above_half": (x.mean((1, 2, 3)) > 0.5).double().mean().item()}


def judged(x):
    """FID of this lesson's images, in about [0, 1], some of which may have run away."""
    return fid_to_test(from_unit(x).nan_to_num().clamp(-1, 1))


def pictures(run, arm):
    """Sixteen samples of an arm of seed 0, at the smaller step size."""
    cfg, (ncsn, net) = run.config.reproduce, load(run, arm_weights(run, arm))
    x = chain(ncsn, net, starts(ncsn, 16, 0), calls(run) // ncsn.levels, cfg.epsilon, 0)
    return from_unit(x).cpu()


# ------------------------------------------------------------------ inpainting
def inpainting(run, filled):
    """How often a judge reads the right digit in a test image whose right half was filled in."""
    cfg, (ncsn, net) = run.config.reproduce, load(run, published(run, "annealed"))
    x0, label = digits("test").first(cfg.few)
    torch.manual_seed(0)
    known = x = dequantise(x0).to(run.device)
    mask = torch.zeros_like(known, dtype=torch.bool)
    mask[..., :14] = True
    if filled == "nothing":
        x = torch.where(mask, known, 0.0)
    elif filled != "the true half":
        process = CleanNCSN(ncsn) if "clean" in filled else ncsn
        x = process.inpaint(net, known, mask, cfg.sample_steps, cfg.epsilon, seeded(0))
    return {"accuracy": (classify(from_unit(x).nan_to_num())[0] == label).double().mean().item()}


class CleanNCSN(NCSN):
    """Inpaints with the known half as it is, at every level: what the paper does not do."""

    def __init__(self, ncsn):
        super().__init__(ncsn.sigmas[0].item(), ncsn.sigmas[-1].item(), ncsn.levels)
        self.to(ncsn.sigmas.device)

    def q_sample(self, x0, i, z):
        return x0


# ------------------------------------------------------------------ pictures
def plot(claim, path):
    """Which clouds are found, what sigma_1 has to do with it, and the FID of both arms."""
    fig, ((left, right), (below, corner)) = figure(2, 2, width=4.2, height=3.2)
    corner.remove()
    edges = torch.linspace(-16, 16, 65)
    for (_, counts), name in zip(claim.notes["along"].items(), ("plain", "annealed")):
        counts = torch.tensor(counts)
        left.stairs(counts / (counts.sum() * (edges[1] - edges[0])), edges, label=name)
    left.set(xlabel="$x + y$ where the points end", ylabel="density", title="(a) two clouds of weights 0.2, 0.8")
    left.legend(fontsize=8, loc="upper center")
    for sampler, share in claim.rows.by("sampler", "share").items():
        if sampler.startswith("annealed"):
            right.plot([float(sampler.split()[-1])] * len(share), share, "o", color="C1", ms=4,
                       label="annealed" if sampler.endswith("20") else None)
    right.axhline(claim.rows.mean("share", sampler="plain"), color="C0", ls="--", label="plain")
    right.axhspan(0.77, 0.83, color="grey", alpha=0.2, label="0.80 $\\pm$ 0.03")
    right.set(xscale="log", xlabel="largest noise $\\sigma_1$", ylabel="share of the large cloud",
              title="(a) how large must $\\sigma_1$ be?")
    ticks(right.xaxis, (1, 2, 5, 10, 20))
    right.legend(fontsize=8, loc="center right")
    dots(below, claim.rows, "best", names={"annealed": "ten levels,\nannealed", "plain": "$\\sigma = 0.01$,\nplain"})
    below.axhline(claim.notes["floor"], color="grey", ls=":", lw=1)
    below.set(yscale="log", ylabel=f"FID (n = {claim.cfg.n}; dotted: floor)",
              title=f"(b) {claim.notes['network_calls']} network calls")
    ticks(below.yaxis, (2, 5, 10, 20, 50, 100, 200))
    for ax in (left, right, below):
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

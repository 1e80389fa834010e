"""Measure the claims of the DDPM paper again: Table 2, Section 4.3, and the clipping that Algorithm 2 leaves out.

    python reproduce.py publish=true      all arms, three seeds; writes results/claim.json and results/claim.png
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py unet.channels=48  other values for all arms; without publish=true to runs/claim

The four arms of Table 2 are trained alike; the learning rate was chosen with noise prediction and the simple loss, for
all of them. What the other three need stands here and not in model.py: `Mean` and `Bound`.
"""

import torch
import torch.nn.functional as F

import train
from model import DDPM, UNet, image
from sample import draw
from utils import Arm, Claim, cli, digits, fid_to_test, figure, floor, published, save_figure, seeded, ticks


# ------------------------------------------------------------------ the arms of Table 2
class Mean(DDPM):
    """The network predicts mu-tilde of Eq. (8) instead of the noise."""

    def predict_x0(self, net, xt, t):
        """Eq. (7) solved for x_0. (B, C, H, W)."""
        one, zero = image(torch.ones_like(t)), image(torch.zeros_like(t))
        a, b = self.q_posterior(one, zero, t, t - 1), self.q_posterior(zero, one, t, t - 1)        # a x_0 + b x_t
        return (net(xt, t) - b * xt) / a

    def p_mean(self, net, xt, t, s, clip=True):
        """From t to t - 1 the predicted mean as it is: the official code clips noise predictions only.

        A jump over several times needs x_0, which is the predicted mean divided by a small number, and clips it.
        """
        return super().p_mean(net, xt, t, s, clip and bool((s < t - 1).all()))

    def loss(self, net, x0):
        """The squared error of mu-tilde, Eq. (8) without its weight."""
        t, eps = torch.randint(self.timesteps, (len(x0),), device=x0.device), torch.randn_like(x0)
        xt = self.q_sample(x0, t, eps)
        return F.mse_loss(net(xt, t), self.q_posterior(x0, xt, t, t - 1))


class Bound(DDPM):
    """The loss is the variational bound of Eq. (5), one random term of it, divided by T."""

    def loss(self, net, x0):
        """L_{t-1} of Eq. (5) at a random t, in bits per dimension."""
        t, eps = torch.randint(self.timesteps, (len(x0),), device=x0.device), torch.randn_like(x0)
        xt = self.q_sample(x0, t, eps)
        mean, _ = self.p_mean(net, xt, t, t - 1, clip=False)
        return self.bound_term(x0, xt, t, mean).mean()


class MeanBound(Bound, Mean):
    """Both: the first row of Table 2."""


OURS = "noise + simple"
ARMS = {OURS: Arm(), "noise + bound": Arm(DDPM=Bound), "mean + simple": Arm(DDPM=Mean),
        "mean + bound": Arm(DDPM=MeanBound)}
VARIANCES = ("small", "large")


# ------------------------------------------------------------------ what is measured
def load(run, weights, DDPM=DDPM, **changes):
    """Process and network of a weights file."""
    ddpm = DDPM(**{**weights.config["ddpm"], **changes})
    return run.place(ddpm, weights.load(UNet(**weights.config["unet"])))


def measure(run, ddpm, net, arm, seed):
    """FID of samples, and the bound of Eq. (5) on test images with the same noise for every arm."""
    cfg = run.config.reproduce
    x = draw(ddpm, net, cfg.n, cfg.sample_steps, seeded(seed, cfg.n))
    x0, _ = digits("test").first(cfg.bound_images)
    prior, terms, _ = ddpm.bound(net, x0.to(run.device), seeded(0))
    return {"fid": fid_to_test(x.nan_to_num()), "bits": float((prior + terms.sum(1)).mean())}


def clipping(run, variance, clip, seed):
    """FID of the published network's samples, with x_0 clipped or not; the noise is the seed's."""
    cfg, (ddpm, net) = run.config.reproduce, load(run, published(run, OURS), variance=variance)
    return {"fid": fid_to_test(draw(ddpm, net, cfg.n, cfg.sample_steps, seeded(seed, cfg.n), clip))}


def rate_distortion(run, variance):
    """Sec. 4.3: the published network's bound as a code, and the error of x_0 after every part of it."""
    ddpm, net = load(run, published(run, OURS), variance=variance)
    x0, _ = digits("test").first(run.config.reproduce.bound_images)
    prior, terms, rmse = ddpm.bound(net, x0.to(run.device), seeded(run.settings.seed))
    return code(prior.mean(), terms.mean(0), rmse.mean(0))


def code(prior, terms, rmse):
    """The bound as a code. prior (), terms (T,), rmse (T,), of which index 0 is t = 0 (L_0)."""
    received = torch.cat([prior[None], terms[1:].flip(0)]).cumsum(0)          # before x_0 is estimated at T-1, ..., 0
    rmse_on_the_way = rmse.flip(0)
    total, above = float(prior + terms.sum()), (rmse_on_the_way > 0.05 * 255).nonzero()
    within = int(above.max()) + 1 if len(above) else 0                        # from here on within 5 % for good
    after = 1 - float(received[within]) / total if within < len(received) else 0.0
    return {"bits_per_dim": total, "prior": float(prior), "L_0": float(terms[0]),
            "share_of_L_0": float(terms[0]) / total, "share_after_5_percent": after,
            "rate": [round(float(r), 6) for r in received], "rmse": [round(float(e), 3) for e in rmse_on_the_way],
            "term_by_t": [round(float(v), 7) for v in terms]}


# ------------------------------------------------------------------ what is claimed
def main(argv=None):
    claim = Claim(__file__, argv, sections=("unet", "ddpm"))
    cfg = claim.cfg
    table = claim.arms(ARMS, train=train.main, load=load, measure=measure,
                       keys=[f"steps={cfg.steps}", f"precision={cfg.precision}"])
    clip = claim.each(clipping, variance=VARIANCES, clip=[True, False], seed=claim.seeds)
    codes = {variance: rate_distortion(claim.run, variance) for variance in VARIANCES}
    best = min(codes, key=lambda variance: codes[variance]["bits_per_dim"])
    claim.judge("a1", "Predicting the noise with the simple loss gives a lower FID than each of the other three arms",
                paper="FID 3.17 against about 13 for either prediction trained on the bound (Table 2, CIFAR-10)",
                holds=draws_best(table))
    claim.judge("a2", "It does not give the best code: another arm has a lower bound in bits/dim",
                paper="at most 3.75 bits/dim, and 3.70 if trained on the bound (Table 1, CIFAR-10)",
                holds=another_is_shorter(table))
    claim.judge("b", "More than half of the published network's bits are L_0, spent on grey levels no eye tells apart",
                paper="more than half of the lossless code describes imperceptible distortions (Sec. 4.3, CIFAR-10)",
                rule="one computation on the same test images, for the variance of the shorter code",
                holds=codes[best]["share_of_L_0"] > 0.5, variance=best, share_of_L_0=codes[best]["share_of_L_0"])
    claim.judge("c", "Clipping x_0 at every step lowers the FID of the published network, with either variance",
                paper="Algorithm 2 has no clipping; the official code clips",
                holds=all(clip.below(True, False, "fid", by="clip", variance=v) for v in VARIANCES))
    claim.note("floor", floor(cfg.n))
    claim.note("rate_distortion", codes)
    return claim.finish(plot=plot)


def draws_best(table):
    """(a1): the FID of noise + simple is below that of every other arm."""
    return all(table.below(OURS, other, "fid") for other in ARMS if other != OURS)


def another_is_shorter(table):
    """(a2): one and the same other arm has fewer bits/dim than noise + simple."""
    return any(table.below(other, OURS, "bits") for other in ARMS if other != OURS)


def plot(claim, path):
    """Four answers: which arm draws best, what the bits buy, at which t they are paid, and what clipping does."""
    fig, axes = figure(2, 2, width=4.2)
    (left, code), (paid, clipped) = axes
    for i, arm in enumerate(ARMS):
        fid, bits = (torch.tensor(claim.rows.values(key, arm=arm)) for key in ("fid", "bits"))
        if bool((fid + bits).isfinite().all()):        # one that diverged has no point to draw
            left.errorbar(bits.mean(), fid.mean(), fid.std(correction=0), bits.std(correction=0), fmt="o",
                          color=f"C{i}", label=arm)
    left.axhline(claim.notes["floor"], color="grey", ls=":", lw=1)
    left.set(xlabel="bound, bits/dim", ylabel=f"FID (n = {claim.cfg.n}; dotted: floor)", xscale="log", yscale="log",
             title="(a) prediction and objective")
    ticks(left.xaxis, [2, 5, 10, 20, 50, 100])
    ticks(left.yaxis, [0.5, 2, 5, 20, 50, 200])
    left.legend(fontsize=8, loc="center right")
    best = claim.notes["rate_distortion"][claim.claims["b"]["variance"]]
    code.plot(best["rate"], best["rmse"])
    code.axhline(0.05 * 255, color="grey", ls=":", lw=1)
    code.set(xlabel="rate before L_0, bits/dim", ylabel="RMSE of x_0, of 255", title="(b) rate and distortion")
    paid.plot(range(1, 1 + len(best["term_by_t"])), best["term_by_t"])
    paid.set(xscale="log", yscale="log", xlabel="t (as the paper counts, from 1)", ylabel="L_{t-1}, bits/dim",
             title="where the bound is paid")
    ticks(paid.xaxis, [1, 10, 100, 1000])
    for i, variance in enumerate(VARIANCES):
        pairs = zip(*(claim.rows.values("fid", variance=variance, clip=clip) for clip in (True, False)))
        for j, pair in enumerate(pairs):
            clipped.plot([0, 1], pair, "o-", color=f"C{i}", label=None if j else f"variance={variance}")
    clipped.set(xticks=[0, 1], xticklabels=["clipped", "not clipped"], xlim=(-0.3, 1.3), ylim=(0, None),
                ylabel=f"FID (n = {claim.cfg.n})", title="(c) clipping x_0")
    clipped.legend(fontsize=8, loc="lower right")
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)

"""Measure the claims of the DDPM paper again: Table 2, Section 4.3, and the clipping that Algorithm 2 leaves out.

    python reproduce.py publish=true      all arms, three seeds; writes results/claim.json and results/claim.png
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py unet.channels=48  other values for all arms; without publish=true to runs/claim

(a) Table 2. Of {mean, noise} prediction x {bound, simple} objective, trained alike:
    noise + simple has the lowest mean FID, its FID is the lowest of the four in every seed, and the gap to the
    second best is above 3 pooled standard deviations over the seeds;
    and it does not have the best bits/dim: one and the same other arm has a lower bound in every seed.
    An arm that diverges counts as infinitely bad. The learning rate was chosen with noise + simple, for all arms.
(b) Sec. 4.3. More than half of the bits of the published network's bound are L_0, spent on grey levels that the eye
    does not tell apart, for the variance of the shorter code. (An earlier wording, half of the bits after the RMSE
    falls below 5 % of the range, could not fail; its number is still printed.)
(c) Clipping x_0 lowers the FID of the published network at 50 steps, in every sampling seed and for both variances.
"""

import math
import statistics
import time

import torch

import train
from model import DDPM, UNet
from sample import draw
from utils import (
    Run,
    UserError,
    Weights,
    cli,
    digits,
    fid_to_test,
    figure,
    floor,
    parallel,
    save_figure,
    trained,
    write_json,
)

ARMS = [("noise", "simple"), ("noise", "bound"), ("mean", "simple"), ("mean", "bound")]


def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.reproduce
    start = time.perf_counter()
    run.open_folder("claim")
    rows = []
    arms = [(run.argv, predict, objective, seed) for seed in range(cfg.seeds) for predict, objective in ARMS]
    for row in parallel(measure, arms, cfg.workers):
        run.say("{arm:15} seed {seed}: FID {fid:8.3f}   bits/dim {bits:6.3f}".format(**row))
        rows.append(row)
    claim = {
        "table_2": table_2(rows), "rate_distortion": rate_distortion(run), "clipping": clipping(run),
        "n": cfg.n, "sample_steps": cfg.sample_steps, "floor": floor(cfg.n), "bound_images": cfg.bound_images,
        "train_steps": cfg.steps, "rows": rows, "minutes": round((time.perf_counter() - start) / 60, 1),
    }
    for name in ("table_2", "rate_distortion", "clipping"):
        claim[name]["verdict"] = verdict(claim[name]["holds"], cfg)
    run.say(text(claim))
    run.output(save_json, claim, "claim.json")
    run.output(plot, claim, "claim.png")
    run.record("claim", **{k: v for k, v in claim.items() if k != "rows"} | {
        "rate_distortion": {k: v for k, v in claim["rate_distortion"].items() if not isinstance(v, list)}})
    return claim


def save_json(claim, path):
    """claim.json; infinities, which JSON does not have, become null."""
    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    write_json(path, plain(claim))
    return path


def verdict(holds, cfg):
    """One of the two verdicts, or none if there were too few seeds for one."""
    if cfg.quick or cfg.smoke or cfg.seeds < 3:
        return "no verdict from a quick look"
    return "reproduced" if holds else "not reproduced at this scale"


# ------------------------------------------------------------------ (a) Table 2
def measure(argv, predict, objective, seed):
    """Train one arm (or take it from an earlier call), draw samples, evaluate the bound on test images."""
    run = Run(__file__, argv)
    cfg, folder = run.config.reproduce, run.open_folder("claim")
    own = [a for a in argv if a.split("=")[0].split(".")[0] in ("unet", "ddpm", "train", "gpu", "device", "smoke")]
    try:
        path = trained(train.main, folder / f"{predict}_{objective}_{seed}", [
            *own, f"ddpm.predict={predict}", f"ddpm.objective={objective}", f"seed={seed}", f"steps={cfg.steps}",
            "preview_every=0", f"precision={cfg.precision}"], run.lesson)
    except UserError as error:
        if "stopped" not in str(error):                # anything but a loss that is not finite
            raise
        return {"arm": f"{predict} + {objective}", "seed": seed, "fid": math.inf, "bits": math.inf}
    ddpm, net = load(run, path)
    x = draw(ddpm, net, cfg.n, cfg.sample_steps, torch.Generator().manual_seed(seed))
    x0, _ = digits("test").first(cfg.bound_images)
    prior, terms, _ = ddpm.bound(net, x0.to(run.device), torch.Generator().manual_seed(0))   # the same noise for all
    return {"arm": f"{predict} + {objective}", "seed": seed, "fid": finite(fid_to_test(x.nan_to_num())),
            "bits": finite(float((prior + terms.sum(1)).mean()))}


def finite(value):
    return value if math.isfinite(value) else math.inf


def load(run, path, **changes):
    """Process and network of a weights file."""
    weights = Weights(path, run.name)
    ddpm = DDPM(**{**weights.config["ddpm"], **changes})
    return run.place(ddpm, weights.load(UNet(**weights.config["unet"])))


def table_2(rows):
    """Means and deviations per arm, and whether criterion (a) holds."""
    arms = {}
    for predict, objective in ARMS:
        of_arm = [row for row in rows if row["arm"] == f"{predict} + {objective}"]
        arms[of_arm[0]["arm"]] = {key: [row[key] for row in of_arm] for key in ("fid", "bits")}
    ours, others = arms["noise + simple"], {name: arm for name, arm in arms.items() if name != "noise + simple"}
    second = min(others.values(), key=lambda arm: statistics.mean(arm["fid"]))
    lowest = all(ours["fid"][i] < arm["fid"][i] for arm in others.values() for i in range(len(ours["fid"])))
    gap = statistics.mean(second["fid"]) - statistics.mean(ours["fid"])
    spread = pooled(ours["fid"], second["fid"])
    better_bits = [name for name, arm in others.items() if all(b < o for b, o in zip(arm["bits"], ours["bits"]))]
    table = {name: {f"{key}_{what}": round(of(arm[key]), 4) for key in ("fid", "bits")
                    for what, of in (("mean", statistics.mean), ("std", deviation))} for name, arm in arms.items()}
    return {"arms": table, "gap": gap, "pooled_std": spread, "lowest_in_every_seed": lowest,
            "better_bits_in_every_seed": better_bits,
            "fid_holds": lowest and gap > 3 * spread, "bits_holds": bool(better_bits),
            "holds": lowest and gap > 3 * spread and bool(better_bits)}


def deviation(values):
    """Standard deviation over the seeds; 0 for a single one, infinite if an arm diverged."""
    if not all(map(math.isfinite, values)):
        return math.inf
    return statistics.stdev(values) if len(values) > 1 else 0.0


def pooled(a, b):
    """Pooled standard deviation of two arms. One that diverged loses to the other, whatever its spread."""
    if math.isinf(deviation(b)):
        return deviation(a)
    return ((deviation(a) ** 2 + deviation(b) ** 2) / 2) ** 0.5


# ------------------------------------------------------------------ (b) Section 4.3
def rate_distortion(run):
    """Bits received so far against the error of the x_0 estimated from them, with the published weights."""
    x0, _ = digits("test").first(run.config.reproduce.bound_images)
    codes = {}
    for variance in ("small", "large"):
        ddpm, net = published(run, variance=variance)
        prior, terms, rmse = ddpm.bound(net, x0.to(run.device), run.generator())
        codes[variance] = code(prior.mean(), terms.mean(0), rmse.mean(0))
    best = min(codes, key=lambda variance: codes[variance]["bits_per_dim"])
    return {"variance": best, **codes[best], "holds": codes[best]["share_of_L_0"] > 0.5,
            "of_both": {v: {k: c[k] for k in ("bits_per_dim", "share_of_L_0")} for v, c in codes.items()}}


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


def published(run, **changes):
    """The lesson's published network; in smoke mode, or where there is none, the first arm."""
    path = run.lesson / "results" / "weights.safetensors"
    if run.config.reproduce.smoke or not path.exists():
        path = max(run.folder.glob("noise_simple_0/**/weights.safetensors"))
        run.say(f"the network of (b) and (c) is {path.parent}")
    return load(run, path, **changes)


# ------------------------------------------------------------------ (c) clipping
def clipping(run):
    """FID with and without clipping x_0, at the same noise; both variances."""
    cfg = run.config.reproduce
    jobs = [(run.argv, variance, clip, seed) for variance in ("small", "large") for clip in (True, False)
            for seed in range(cfg.seeds)]
    table = {}
    for (_, variance, clip, _), value in zip(jobs, parallel(sample_fid, jobs, cfg.workers)):
        table.setdefault(f"{variance}, {'clipped' if clip else 'not clipped'}", []).append(value)
    holds = all(a < b for v in ("small", "large") for a, b in zip(table[f"{v}, clipped"], table[f"{v}, not clipped"]))
    return {"fid": table, "holds": holds}


def sample_fid(argv, variance, clip, seed):
    """FID of n samples of the published network."""
    run = Run(__file__, argv)
    cfg, _ = run.config.reproduce, run.open_folder("claim")
    ddpm, net = published(run, variance=variance)
    return fid_to_test(draw(ddpm, net, cfg.n, cfg.sample_steps, torch.Generator().manual_seed(seed), clip))


# ------------------------------------------------------------------ what is printed and drawn
def text(claim):
    """The three tables with their verdicts."""
    lines = ["", f"(a) Table 2: {claim['table_2']['verdict']}   (FID: n = {claim['n']}, floor {claim['floor']:.3f})"]
    lines += [f"    {name:15} FID {a['fid_mean']:8.3f} +- {a['fid_std']:.3f}   bits/dim {a['bits_mean']:6.3f} +- "
              f"{a['bits_std']:.3f}" for name, a in claim["table_2"]["arms"].items()]
    lines += [f"(b) Sec. 4.3: {claim['rate_distortion']['verdict']}"]
    lines += [f"    {name} variance: {c['bits_per_dim']:.3f} bits/dim, of which L_0 {100 * c['share_of_L_0']:.0f} %"
              for name, c in claim["rate_distortion"]["of_both"].items()]
    share = claim["rate_distortion"]["share_after_5_percent"]
    lines += [f"    after x_0 is known within 5 % of the range: {100 * share:.0f} % of the bits",
              f"(c) clipping: {claim['clipping']['verdict']}"]
    lines += [f"    {name:20} FID " + "  ".join(f"{v:.3f}" for v in values)
              for name, values in claim["clipping"]["fid"].items()]
    return "\n".join(lines)


def plot(claim, path):
    """Three answers: which arm draws best, where the bits go, and at which t the bound is paid."""
    fig, (left, middle, right) = figure(1, 3, width=4.2)
    for i, (name, arm) in enumerate(claim["table_2"]["arms"].items()):
        if not math.isfinite(arm["fid_mean"] + arm["bits_mean"]):
            continue                                   # diverged: there is no point to draw
        left.errorbar(arm["bits_mean"], arm["fid_mean"], arm["fid_std"], arm["bits_std"], fmt="o", color=f"C{i}",
                      label=name)
    left.axhline(claim["floor"], color="grey", ls=":", lw=1)
    left.set(xlabel="bound, bits/dim", ylabel=f"FID (n = {claim['n']}; dotted: floor)", yscale="log",
             title="(a) objective and target")
    left.legend(fontsize=8)
    rd = claim["rate_distortion"]
    middle.plot(rd["rate"], rd["rmse"])
    middle.axhline(0.05 * 255, color="grey", ls=":", lw=1)
    middle.set(xlabel="rate before L_0, bits/dim", ylabel="RMSE of x_0, of 255", title="(b) rate and distortion")
    right.plot(range(1, 1 + len(rd["term_by_t"])), rd["term_by_t"])
    right.set(xscale="log", yscale="log", xlabel="t (as the paper counts, from 1)", ylabel="L_{t-1}, bits/dim",
              title="where the bound is paid")
    for ax in (left, middle, right):
        ax.grid(alpha=0.3)
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)

"""VDM: Variational Diffusion Models (Kingma, Salimans, Poole, Ho 2021, arXiv 2107.00630).

Convention: z_t = alpha_t x + sigma_t eps with sigma_t^2 = sigmoid(gamma(t)), alpha_t^2 = sigmoid(-gamma(t)). Time is a
real number and runs from data (0) to noise (1); the network receives gamma(t), scaled to 0..1000. x is the centre of
a pixel's grey level k = 0..255: 2 (k + 1/2) / 256 - 1, and not k / 127.5 - 1, which is what the loader gives.
Images x0 (B, C, H, W) are in the loader's [-1, 1]; t, u and gamma are (B,) float64. All losses are in bits/dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import earlier  # lesson 05: UNet
from earlier import noise_like  # lesson 01
from earlier import image  # lesson 05

INTERIORS = ("learned", "linear", "cosine", "ddpm")
GRIDS = ("even", "cosine")


# ------------------------------------------------------------------ the noise schedule: Section 3.2, Appendix H
def cosine_clock(t, low, high):
    """gamma(t) between two ends, and its slope, if the angle of alpha = cos, sigma = sin runs evenly (Sec. 6.2).

    t (B,) float64, ends () or (1,) -> two (B,).
    """
    first, last = torch.atan(torch.exp(low / 2)), torch.atan(torch.exp(high / 2))       # tan(angle) = sigma / alpha
    angle = first + (last - first) * t
    return 2 * torch.log(torch.tan(angle)), 4 * (last - first) / torch.sin(2 * angle)


class Schedule(nn.Module):
    """gamma(t) = gamma_0 + (gamma_1 - gamma_0) u(t), u increasing from u(0) = 0 to u(1) = 1 (Sec. 3.2, App. I.2).

    gamma_0, gamma_1  the ends; learned by the bound if learn_ends
    interior          of u: "learned" (a monotone network) or fixed: "linear", "cosine", "ddpm" (linear beta)
    units             of the monotone network
    """

    def __init__(self, gamma_0=-13.3, gamma_1=5.0, learn_ends=True, interior="learned", units=1024):
        super().__init__()
        if interior not in INTERIORS:
            raise ValueError(f"interior={interior!r} is none of {', '.join(INTERIORS)}")
        if not gamma_0 < gamma_1:
            raise ValueError(f"gamma_0={gamma_0} must be below gamma_1={gamma_1}: noise grows with time")
        self.interior = interior
        self.low = nn.Parameter(torch.tensor(float(gamma_0)), requires_grad=learn_ends)
        self.span = nn.Parameter(torch.tensor(float(gamma_1 - gamma_0)), requires_grad=learn_ends)
        if interior == "learned":
            # Differs from the paper: the units start as steps of width 1 / 10, spread evenly, because a short run
            # can then bend the curve anywhere. u starts as a nearly straight line.
            self.l1, self.l2 = nn.Parameter(torch.ones(1)), nn.Parameter(torch.full((units,), 10.0))
            self.b2 = nn.Parameter(-10 * (torch.arange(units) + 0.5) / units)
            self.l3 = nn.Parameter(torch.ones(units))

    def monotone(self, t):
        """App. H: l1 t + l3 sigmoid(l2 t + b2), the weights l taken as positive, and its slope. (B,) -> two (B,)."""
        l1, l2, b2, l3 = (p.to(t) for p in (self.l1.abs(), self.l2.abs(), self.b2, self.l3.abs()))
        step = torch.sigmoid(l2 * t[:, None] + b2)                          # (B, units)
        return l1 * t + (l3 * step).mean(1), l1 + (l3 * step * (1 - step) * l2).mean(1)

    def fixed(self, t, low, high):
        """The curves without weights that Sec. 6.2 compares with, and their slopes. t (B,) -> two (B,)."""
        if self.interior == "linear":
            return t, torch.ones_like(t)
        if self.interior == "cosine":
            return cosine_clock(t, low, high)
        spent = 1e-4 + 10 * t ** 2                                          # "ddpm": the integral of a linear beta
        return torch.log(torch.expm1(spent)), -20 * t / torch.expm1(-spent)

    def forward(self, t):
        """t (B,) float64 -> u, du/dt (B,), gamma_0, gamma_1 (), all of the precision of t."""
        low, high = self.low.to(t), self.low.to(t) + self.span.to(t).abs()
        all_t = torch.cat([t, t.new_tensor([0.0, 1.0])])
        curve, slope = (self.monotone(all_t) if self.interior == "learned"
                        else self.fixed(all_t, low.detach(), high.detach()))
        rise = curve[-1] - curve[-2]                                        # App. I.2: so the ends are exact
        return (curve[:-2] - curve[-2]) / rise, slope[:-2] / rise, low, high


# ------------------------------------------------------------------ the network: Section 3.4, Appendix C
def fourier_features(z, exponents):
    """z, and sin and cos of 2^n 2 pi z for every exponent n, Eq. (34). (B, C, H, W) -> (B, C (1 + 2 exponents), H, W).

    The paper's n is this one plus 1. The period of n = 7 is one grey level.
    """
    angle = [2 ** n * 2 * math.pi * z for n in exponents]
    return torch.cat([z, *(f(a) for a in angle for f in (torch.sin, torch.cos))], dim=1)


class UNet(earlier.UNet):
    """The noise in z_t from z_t and gamma(t), Sec. 3.4: lesson 05's U-Net with another input and another output.

    fourier               exponents n of the Fourier features of z
    gamma_min, gamma_max  what becomes 0 and 1000 in the time embedding; fixed, so that a schedule may move
    The other values are those of lesson 05.
    """

    def __init__(self, fourier=(6, 7), gamma_min=-13.3, gamma_max=5.0, image_channels=1, **unet):
        super().__init__(image_channels=image_channels * (1 + 2 * len(fourier)), c_out=image_channels, **unet)
        self.fourier, self.gamma_min, self.gamma_max = fourier, gamma_min, gamma_max

    def embed(self, gamma):
        """What every level is told (Sec. 3.4): gamma, and not t, as a vector. (B,) -> (B, width)."""
        return super().embed(1000 * (gamma - self.gamma_min) / (self.gamma_max - self.gamma_min))

    def forward(self, z, gamma):
        """z (B, C, H, W), gamma (B,) -> the prediction of eps, (B, C, H, W)."""
        out = self.body(fourier_features(z, self.fourier), self.embed(gamma))
        return z + out                                                      # at gamma_1 z is nearly the noise


class Network(nn.Module):
    """All that is learned (Sec. 3), in one module, so that it is averaged, distributed and saved as one.

    net(z, gamma) predicts the noise; net(t=t) is the schedule.
    """

    def __init__(self, schedule, unet):
        super().__init__()
        self.schedule, self.unet = Schedule(**schedule), UNet(**unet)

    def forward(self, z=None, gamma=None, t=None):
        return self.schedule(t) if z is None else self.unet(z, gamma)


# ------------------------------------------------------------------ process, bound, sampler: Sections 3 to 5
def bits(nats):
    """Nats of every pixel (B, ...) -> their mean in bits, (B,): the bits per dimension of Sec. 6."""
    return nats.flatten(1).mean(1) / math.log(2)


class VDM(nn.Module):
    """Forward process, bound on the likelihood and sampler (Sec. 3 to 5). Has no weights: gamma is the network's.

    T  number of steps of the diffusion loss (Sec. 4); 0: continuous time, T = infinity (Sec. 5)
    """

    def __init__(self, T=0):
        super().__init__()
        if T < 0 or T != int(T):
            raise ValueError(f"T={T} must be a whole number of steps, or 0 for continuous time")
        self.T = int(T)
        self.register_buffer("values", 2 * (torch.arange(256) + 0.5) / 256 - 1, persistent=False)           # (256,)

    # ------------------------------------------------------------------ forward process: Sections 3.1 and 3.2
    def q_sample(self, x, gamma, eps):
        """z_t ~ q(z_t | x) with the given noise, Eq. (1), (4). x, eps (B, C, H, W), gamma (B,) -> (B, C, H, W)."""
        return image(torch.sigmoid(-gamma).sqrt()) * x + image(torch.sigmoid(gamma).sqrt()) * eps

    def gamma(self, net, t):
        """gamma(t) = -log SNR(t), Eq. (5). t (B,) float64 -> (B,) float64."""
        u, _, low, high = net(t=t)
        return low + (high - low) * u

    def ends(self, net):
        """gamma_0 and gamma_1 (Sec. 3.2), (1,) each, on the device of the process."""
        return self.gamma(net, torch.tensor([0.0, 1.0], dtype=torch.float64, device=self.values.device)).split(1)

    # ------------------------------------------------------------------ encoder and decoder: Section 3.3
    def levels(self, x0):
        """The grey levels (Sec. 3.3) of images in the loader's [-1, 1]: (B, C, H, W) int64 in 0..255."""
        return ((x0 + 1) * 127.5).round().long().clamp(0, 255)

    def encode(self, x0):
        """x, the centres of the grey levels (Sec. 3.3): 256 bins of width 2/256 tile [-1, 1]. (B, C, H, W)."""
        return self.values[self.levels(x0)]

    def decode(self, scaled, gamma_0):
        """log p(level | z_0) for every level, Eq. (8). scaled: z_0 / alpha_0, (...) -> (..., 256).

        p is proportional to the density of z_0 given that level: no network, and every pixel for itself.
        """
        away = (scaled[..., None] - self.values) * torch.exp(-gamma_0 / 2).float()     # in standard deviations
        return (-0.5 * away.square()).log_softmax(-1)

    # ------------------------------------------------------------------ the bound, Eq. (11): Sections 3.5, 4 and 5
    def prior(self, x, gamma_1):
        """The prior loss of Eq. (11): KL of q(z_1 | x) from a unit Gaussian. (B,) bits/dim."""
        variance, signal = torch.sigmoid(gamma_1), torch.sigmoid(-gamma_1) * x.double() ** 2
        kl = 0.5 * (variance + signal + F.softplus(-gamma_1) - 1)           # -log variance, without cancellation
        return bits(kl)

    def reconstruction(self, x0, gamma_0, eps):
        """The reconstruction loss of Eq. (11): -log p(x | z_0) with z_0 made from eps. (B,) bits/dim."""
        scaled = self.encode(x0) + torch.exp(gamma_0 / 2).float() * eps     # z_0 / alpha_0: sigma/alpha = exp(gamma/2)
        return bits(-self.decode(scaled, gamma_0).gather(-1, self.levels(x0)[..., None])[..., 0])

    def diffusion(self, net, x, t, eps):
        """One draw of the diffusion loss of every image at its t: Eq. (17), or Eq. (14) where T is finite.

        x, eps (B, C, H, W), t (B,) float64 -> (B,) bits/dim. With a finite T, t is rounded up to a multiple of 1 / T.

        Sec. 5.3, App. I.2: the ends of gamma and the network descend this loss L, but the interior, which in continuous
        time changes its variance only, descends L^2. Each image has its own u, so that d(L^2) = 2 L dL: what arrives
        at u and du/dt on the way back is multiplied by 2 L, and one walk back serves both.
        """
        T = self.T
        if T:
            i = (t * T).ceil()
            t = torch.cat([i / T, (i - 1) / T])                             # t, and s = t - 1 / T
        u, slope, low, high = net(t=t)
        gamma = low + (high - low) * u
        if T:
            gamma, gamma_s = gamma.chunk(2)
            weight = 0.5 * T * torch.expm1(gamma - gamma_s)                 # Eq. (14), T / 2 (SNR(s) / SNR(t) - 1)
        else:
            weight = 0.5 * (high - low) * slope                             # Eq. (17), gamma'(t) / 2
        loss = weight * bits((eps - net(self.q_sample(x, gamma, eps), gamma)).square())
        twice = 2 * loss.detach()
        for value in (u, slope):
            if value.requires_grad and not T:                               # with a finite T the bound depends on u
                value.register_hook(lambda gradient: gradient * twice)
        return loss

    def times(self, n, device=None):
        """n times, each uniform in [0, 1), together evenly spaced: t_i = (u + i / n) mod 1, App. I.1. (n,) float64."""
        kind = {"dtype": torch.float64, "device": device}
        return (torch.rand((), **kind) + torch.arange(n, **kind) / n).remainder(1)

    def loss(self, net, x0):
        """One draw of Eq. (11), averaged over the batch. x0 (B, C, H, W) -> reconstruction, prior, diffusion.

        Differs from the paper: the reconstruction is that of every eighth image, because 256 logits a pixel would
        cost as much as the network. Its mean is the same.
        """
        x, (_, _, low, high) = self.encode(x0), net(t=torch.zeros(1, dtype=torch.float64, device=x0.device))
        part = x0[::8]
        return (self.reconstruction(part, low, torch.randn_like(part)).mean(), self.prior(x, high).mean(),
                self.diffusion(net, x, self.times(len(x), x.device), torch.randn_like(x)).mean())

    def weighted(self, net, x0):
        """The weighted diffusion loss of Sec. 5.2, averaged over the batch. x0 (B, C, H, W) -> ().

        A plain squared error of eps at times that are even in the cosine clock: Eq. (17) with w = 2 / gamma'(t) of that
        clock before the error. As a function of gamma, w is proportional to alpha sigma; the bound has w = 1.
        """
        x = self.encode(x0)
        gamma, _ = cosine_clock(self.times(len(x), x.device), *self.ends(net))
        eps = torch.randn_like(x)
        return (eps - net(self.q_sample(x, gamma, eps), gamma)).square().mean()

    @torch.no_grad()
    def bound(self, net, x0, draws=16, generator=None):
        """Eq. (11) for images: reconstruction (B,), prior (B,), and `draws` values of the diffusion loss with their
        times, both (B, draws). The draws of an image lie 1 / draws apart; images are independent."""
        x = self.encode(x0)
        _, _, low, high = net(t=torch.zeros(1, dtype=torch.float64, device=x.device))
        u = torch.rand(len(x), dtype=torch.float64, generator=generator).to(x.device)
        times, terms = [], []
        for k in range(draws):
            times.append((u + k / draws).remainder(1))
            terms.append(self.diffusion(net, x, times[-1], noise_like(x, generator)))
        return (self.reconstruction(x0, low, noise_like(x, generator)), self.prior(x, high),
                torch.stack(terms, 1), torch.stack(times, 1))

    # ------------------------------------------------------------------ sampling: Section 3.3, Appendix A.4
    def step(self, net, z, gamma, gamma_s, noise):
        """z_s ~ p(z_s | z_t), Eq. (33), from gamma(t) to gamma(s) below it, (1,) each; and the x expected, Eq. (10)."""
        eps = net(z, gamma.expand(len(z)))
        c = -torch.expm1(gamma_s - gamma)
        alpha, alpha_s = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(-gamma_s).sqrt()
        sigma, sigma_s = torch.sigmoid(gamma).sqrt(), torch.sigmoid(gamma_s).sqrt()
        mean = image(alpha_s / alpha) * (z - image(sigma * c) * eps)
        return mean + image(sigma_s * c.sqrt()) * noise, (z - image(sigma) * eps) / image(alpha)

    def grid(self, net, steps, kind="even"):
        """The steps + 1 values of gamma that a sampling passes, from gamma_1 down to gamma_0 (App. A.4: any s < t).

        kind: "even" in the t of the learned gamma, as in the paper, or in the "cosine" clock between its ends.
        """
        if steps < 1 or kind not in GRIDS:
            raise ValueError(f"steps={steps} must be at least 1 and grid={kind!r} one of {', '.join(GRIDS)}")
        t = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=self.values.device)
        return self.gamma(net, t) if kind == "even" else cosine_clock(t, *self.ends(net))[0]

    @torch.no_grad()
    def reverse(self, net, z1, steps=100, generator=None, grid="even"):
        """Ancestral sampling (Sec. 3.3) along a grid. Yields (gamma(t), z_s, x estimate) from t = 1 down to 0."""
        z, gamma = z1, self.grid(net, steps, grid).split(1)
        for now, after in zip(gamma, gamma[1:]):
            z, x = self.step(net, z, now, after, noise_like(z, generator))
            yield now, z, x

    @torch.no_grad()
    def sample(self, net, n, steps=100, shape=(1, 28, 28), generator=None, grid="even"):
        """n images (Sec. 3.3), (n, C, H, W), in the loader's [-1, 1]: the most likely grey level of every z_0."""
        z1 = noise_like(torch.empty(n, *shape, device=self.values.device), generator)
        for _, z, _ in self.reverse(net, z1, steps, generator, grid):
            pass
        gamma_0, _ = self.ends(net)
        scaled = z / image(torch.sigmoid(-gamma_0).sqrt())
        return torch.stack([self.decode(one, gamma_0).argmax(-1) for one in scaled]) / 127.5 - 1

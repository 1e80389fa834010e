"""Flow Matching for Generative Modeling (Lipman, Chen, Ben-Hamu, Nickel, Le 2022, arXiv 2210.02747).

Convention: x_t = a_t x_0 + s_t eps, on the optimal-transport path t x_0 + (1 - (1 - s_min) t) eps; t runs from noise
(0) to data (1). The paper calls the data x_1 and the noise x_0: here, as in the whole course, x_0 is the data and eps
the noise. Images are (B, C, H, W) in [-1, 1]; t is (B,) in [0, 1].

The network is lesson 05's U-Net, asked as net(x, network_time(t)): what its `forward` calls t is 1000 t, a real number.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torchdiffeq import odeint

# The t of UNet.forward is network_time(t) here: 1000 times the time of this lesson.
from earlier import UNet, image  # lesson 05
from earlier import bits_per_dim, quantise  # lesson 07

SOLVERS = ("dopri5", "euler", "midpoint", "rk4")                            # the first chooses its steps


# ------------------------------------------------------------------ conditional paths: Section 4 of the paper
class OT:
    """The optimal-transport path, Eq. (20): noise is carried to an image in a straight line, at constant speed.

    It is optimal between the noise and ONE image. It does not pair noises with images: that is another method.
    s_min: the deviation that is left at t = 1.
    """
    end = 1.0                                                               # where sampling ends

    def __init__(self, s_min=1e-5):
        if not 0 <= s_min < 1:
            raise ValueError(f"s_min={s_min} must be at least 0 and below 1")
        self.s_min = s_min

    def __call__(self, t):
        """a_t, s_t of p_t(x | x_0) = N(a_t x_0, s_t^2 I) and their derivatives by t. (B,) float64 -> four (B,)."""
        one = torch.ones_like(t)
        return t, 1 - (1 - self.s_min) * t, one, -(1 - self.s_min) * one


# Adapted from lesson_07/model.py: VP -- its marginals and their slopes as functions of the reversed time, no SDE
class VP:
    """The variance-preserving diffusion of lesson 07 as a path: a^2 + s^2 = 1, its time reversed (Sec. 4.1).

    Diffusion time is 1 - t, with the linear beta from beta_min (data) to beta_max (noise).
    Differs from the paper's formula: it ends 1e-5 before the data, because the field is infinite at t = 1.
    """
    end = 1 - 1e-5

    def __init__(self, beta_min=0.1, beta_max=20.0):
        if not 0 < beta_min <= beta_max:
            raise ValueError(f"beta_min={beta_min} must be above 0 and not above beta_max={beta_max}")
        self.beta_min, self.beta_max = beta_min, beta_max

    def __call__(self, t):
        """a_t, s_t of p_t(x | x_0) = N(a_t x_0, s_t^2 I) and their derivatives by t. (B,) float64 -> four (B,)."""
        tau = 1 - t
        beta = self.beta_min + tau * (self.beta_max - self.beta_min)
        integral = self.beta_min * tau + 0.5 * tau ** 2 * (self.beta_max - self.beta_min)          # of beta, 0 to tau
        a, s = torch.exp(-0.5 * integral), torch.sqrt(-torch.expm1(-integral))
        return a, s, 0.5 * beta * a, -0.5 * beta * a ** 2 / s


# ------------------------------------------------------------------ the process: Sections 2 and 3
def network_time(t):
    """What the network receives as the time of v_t (Sec. 3): 1000 t. (B,) -> (B,) float32.

    Differs from the paper, which feeds t: lesson 05's embedding is made for numbers from 0 to 999.
    """
    return (1000 * t).float()


def integrate(field, state, times, solver, tolerance):
    """Eq. (1) solved: the states (S, ...) at `times` (S,) of d state / dt = field(t, state).

    dopri5 must not step beyond the last of the times: there is no field there.
    """
    options = {"step_t": times[-1:]} if solver == "dopri5" else {}
    return odeint(field, state, times, method=solver, rtol=tolerance, atol=tolerance, options=options)


def divergence(v, x, probes):
    """The sum over probes z of z' (dv/dx) z (App. C). v (B, C, H, W) at x, probes (P, B, C, H, W) -> (B,).

    With one z of random signs: the unbiased estimate of the trace by Hutchinson. With all unit vectors: the trace.
    """
    total = 0
    for z in probes:
        product, = torch.autograd.grad((v * z).sum(), x, retain_graph=True)
        total = total + (product * z).flatten(1).sum(1)
    return total


def signs(x, generator=None):
    """One probe of random signs for Hutchinson's estimate (App. C). (B, C, H, W) -> (1, B, C, H, W)."""
    return (torch.randint(2, x.shape, generator=generator) * 2.0 - 1)[None].to(x.device)


# Adapted from lesson_07/model.py: SDE -- a path and the field that makes it, where that has drift, diffusion and score
class FlowMatching(nn.Module):
    """Paths from noise to data, the loss, and the flow: sampling and likelihood (Sec. 2 to 4). Holds no weights.

    path                "ot" or "vp"
    s_min               of the OT path; beta_min, beta_max: of the VP path
    """
    def __init__(self, path="ot", s_min=1e-5, beta_min=0.1, beta_max=20.0):
        super().__init__()
        if path not in ("ot", "vp"):
            raise ValueError(f"path={path!r} is none of ot, vp")
        self.path = OT(s_min) if path == "ot" else VP(beta_min, beta_max)

    def coefficients(self, t):
        """a_t, s_t, a'_t, s'_t of Sec. 4, to multiply images with: four (B, 1, 1, 1)."""
        return tuple(image(value) for value in self.path(t.double()))

    # ------------------------------------------------------------------ conditional path and field
    def q_sample(self, x0, t, eps):
        """The conditional flow psi_t: carries the noise eps to x_t ~ p_t(x | x_0). (B, C, H, W), Eq. (22) for OT."""
        a, s, _, _ = self.coefficients(t)
        return a * x0 + s * eps

    def u(self, x, x0, t):
        """The field u_t(x | x_0) that makes the conditional path, Theorem 3; Eq. (21) for OT. (B, C, H, W)."""
        a, s, da, ds = self.coefficients(t)
        return ds / s * (x - a * x0) + da * x0

    def target(self, x0, t, eps):
        """u_t at x_t: the time derivative of psi_t(eps). Eq. (23) for OT: x_0 - (1 - s_min) eps. (B, C, H, W)."""
        _, _, da, ds = self.coefficients(t)
        return da * x0 + ds * eps

    # ------------------------------------------------------------------ loss
    def loss(self, net, x0):
        """Conditional flow matching (Theorem 2: the gradient of flow matching). x0 (B, C, H, W) -> scalar.

        The noise is drawn without a look at the data.
        """
        t = self.path.end * torch.rand(len(x0), dtype=torch.float64, device=x0.device)
        eps = torch.randn_like(x0)
        v = net(self.q_sample(x0, t, eps), network_time(t))
        return F.mse_loss(v, self.target(x0, t, eps))                       # Eq. (23) for OT

    # ------------------------------------------------------------------ the flow
    def velocity(self, net, x, t):
        """The vector field v_t(x) of the flow, Eq. (1): what the network says. x (B, C, H, W), t (B,) -> like x."""
        return net(x, network_time(t))

    def predict_x0(self, x, v, t):
        """The x_0 with u_t(x | x_0) = v (Theorem 3): the mean of the data behind x, if v is the field. Like x."""
        a, s, da, ds = self.coefficients(t)
        return (s * v - ds * x) / (s * da - a * ds)

    @torch.no_grad()
    def sample(self, net, eps, solver="dopri5", steps=None, tolerance=1e-5, times=None):
        """Carry noise (B, C, H, W) to data along Eq. (1). Returns x and the network calls.

        solver     "dopri5" chooses its steps so that the error of each stays below `tolerance` (rtol = atol), for the
                   batch as one; "euler", "midpoint" and "rk4" take `steps` equal ones (50 if not given)
        times      (S,) float64, first 0: x is wanted at these, (S, B, C, H, W), not only at the end. They are the
                   steps of the last three solvers, so `steps` may not be given with them
        State and time of the solver are float64: in float32, 1 - t = 1e-5 would keep two digits.
        """
        if solver not in SOLVERS:
            raise ValueError(f"solver={solver!r} is none of {', '.join(SOLVERS)}")
        if times is not None and steps is not None:
            raise ValueError(f"steps={steps} says nothing beside times, which are the steps: give one of the two")
        steps = 50 if steps is None else steps
        if steps < 1 or tolerance <= 0:
            raise ValueError(f"steps={steps} must be at least 1 and tolerance={tolerance} above 0")
        calls = 0

        def field(t, x):
            nonlocal calls
            calls += 1
            return self.velocity(net, x.float(), t.expand(len(x))).double()

        grid = torch.linspace(0, self.path.end, 2 if solver == "dopri5" else steps + 1, dtype=torch.float64)
        path = integrate(field, eps.double(), (grid if times is None else times).to(eps.device), solver, tolerance)
        return (path[-1] if times is None else path).float(), calls

    # Adapted from lesson_07/model.py: SDE.log_likelihood -- of any field; time runs the other way; exact or estimated
    def log_likelihood(self, net, x, probes, tolerance=1e-5):
        """log p_1(x), by the flow back to the noise and the change of variables along it (Sec. 2 and App. C).

        x (B, C, H, W); probes (P, B, C, H, W): see `divergence`. Returns (B,) in nats, the noise that x came from
        (B, C, H, W) and the network calls (each with P vector-Jacobian products).
        """
        calls = 0

        def field(t, state):
            nonlocal calls
            calls += 1
            with torch.enable_grad():
                x = state[0].float().requires_grad_()
                v = self.velocity(net, x, t.expand(len(x)))
                return v.detach().double(), divergence(v, x, probes).double()

        times = torch.tensor([self.path.end, 0.0], dtype=torch.float64, device=x.device)
        with torch.no_grad():
            state = x.double(), x.new_zeros(len(x), dtype=torch.float64)
            noise, change = integrate(field, state, times, "dopri5", tolerance)
        log_p0 = -0.5 * (noise[-1] ** 2 + math.log(2 * math.pi)).flatten(1).sum(1)
        return (log_p0 + change[-1]).float(), noise[-1].float(), calls      # change: the integral of div v, 1 to 0


# ------------------------------------------------------------------ 8-bit images as densities: Appendix C
# Adapted from lesson_07/model.py: dequantise -- the grey level is rounded to a whole number first
def dequantise(x0, generator=None):
    """Grey levels k in [-1, 1] become (k + u) / 128 - 1 with u uniform in [0, 1): a density, App. C. (B, C, H, W)."""
    level = ((x0 + 1) * 127.5).round()
    u = torch.rand_like(x0) if generator is None else torch.rand(x0.shape, generator=generator).to(x0.device)
    return (level + u) / 128 - 1

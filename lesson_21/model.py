"""Rectified Flow: Flow Straight and Fast (Liu, Gong, Liu 2022, arXiv 2209.03003).

Convention: z_t = t z_1 + (1 - t) z_0; t runs from the start (0: noise, or another data set) to the data (1), from
t_min = 0.001 on. The paper writes X for the pairs that a flow learns from and Z for the pairs that it makes; both are
z_0, z_1 here, because the second are what the next flow learns from. The course's x_0, the data, is z_1. Images are
(B, C, H, W) in [-1, 1]; t is (B,) in [0, 1].

The network is lesson 05's U-Net, asked as net(z, network_time(t)): what its `forward` calls t is 999 t, a real number.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# The t of UNet.forward is network_time(t) here: 999 times the time of this lesson.
from earlier import UNet, image  # lesson 05
from earlier import integrate  # lesson 39
from earlier import noise_like  # lesson 01

SOLVERS = ("euler", "midpoint", "dopri5")                                   # the last chooses its steps


# Adapted from lesson_39/model.py: network_time -- 999, as in the official code
def network_time(t):
    """What the network receives as the time of v(z, t) in Eq. (1): 999 t. (B,) -> (B,) float32.

    As in the official code; lesson 05's embedding is made for numbers from 0 to 999.
    """
    return (999 * t).float()


# ------------------------------------------------------------------ the process: Section 2 of the paper
# Adapted from lesson_39/model.py: FlowMatching -- the straight path only, between two given ends, where that drew noise
#   in the loss: what the ends are paired with is the method
class RectifiedFlow(nn.Module):
    """Straight lines between pairs, the loss, and the flow (Sec. 2): Euler, other solvers, noise. Holds no weights.

    t_min   the first time the network is asked at, as in the official code
    """
    def __init__(self, t_min=1e-3):
        super().__init__()
        if not 0 <= t_min < 1:
            raise ValueError(f"t_min={t_min} must be at least 0 and below 1")
        self.t_min = t_min

    # ------------------------------------------------------------------ lines and loss
    def interpolate(self, z0, z1, t):
        """The point of the line from z0 to z1 at time t (Sec. 2.1). z0, z1 (B, C, H, W), t (B,) -> (B, C, H, W)."""
        return image(t) * z1 + image(1 - t) * z0

    def clock(self, s):
        """The time that the network is asked at when the share s of the way is done (Sec. 2.1). (B,) float64.

        Differs from the paper: t_min to 1, as in the official code.
        """
        return self.t_min + (1 - self.t_min) * s

    def loss(self, net, z0, z1, distil=False):
        """The squared error of the velocity on lines from z0 to z1, Eq. (1). Both (B, C, H, W) -> scalar.

        The pairs decide what is learned. Drawn independently of each other: 1-rectified flow. (z0, what the 1-rectified
        flow carries z0 to): 2-rectified flow. With distil only the start of each line is shown: the network learns the
        whole way as one step.
        """
        s = torch.rand(len(z0), dtype=torch.float64, device=z0.device)
        t = self.clock(s * (not distil))
        return F.mse_loss(net(self.interpolate(z0, z1, t), network_time(t)), z1 - z0)

    # ------------------------------------------------------------------ the flow
    def velocity(self, net, z, s):
        """dZ/ds = v(Z, t) after the share s of the way (Sec. 2.1). z (B, C, H, W), s a number -> (B, C, H, W)."""
        s = torch.as_tensor(s, dtype=torch.float64, device=z.device)
        return net(z, network_time(self.clock(s)).expand(len(z)))

    # Adapted from lesson_39/model.py: FlowMatching.sample -- fewer solvers, and either way along the flow
    @torch.no_grad()
    def sample(self, net, z, solver="euler", steps=1, tolerance=1e-5, backward=False):
        """Carry z0 to z1 (backward: z1 to z0), the flow of Alg. 1. (B, C, H, W) -> the other end, the network calls.

        "euler" takes `steps` steps of one call, "midpoint" of two; "dopri5" (RK45) chooses its steps so that the error
        of each stays below `tolerance` (rtol = atol), for the batch as one.
        """
        if solver not in SOLVERS:
            raise ValueError(f"solver={solver!r} is none of {', '.join(SOLVERS)}")
        if steps < 1 or tolerance <= 0:
            raise ValueError(f"steps={steps} must be at least 1 and tolerance={tolerance} above 0")
        calls = 0

        def field(s, z):
            nonlocal calls
            calls += 1
            return self.velocity(net, z.float(), s).double()

        times = torch.linspace(0, 1, 2 if solver == "dopri5" else steps + 1, dtype=torch.float64, device=z.device)
        path = integrate(field, z.double(), times.flip(0) if backward else times, solver, tolerance)
        return path[-1].float(), calls

    @torch.no_grad()
    def path(self, net, z0, steps):
        """The whole way of Alg. 1 in Euler steps: z (steps + 1, B, C, H, W), the velocities v (steps, B, C, H, W)."""
        z, v = [z0], []
        for i in range(steps):
            v.append(self.velocity(net, z[-1], i / steps))
            z.append(z[-1] + v[-1] / steps)
        return torch.stack(z), torch.stack(v)

    # ------------------------------------------------------------------ with noise on the way
    def predict_z1(self, z, v, t):
        """Where the line through z with the velocity v ends (Sec. 2.1). (B, C, H, W), t a number -> (B, C, H, W).

        It is E[z_1 | z_t] if v is the exact field.
        """
        return z + (1 - t) * v

    def score(self, z, v, t):
        """grad log p_t(z) of a flow that starts from unit Gaussian noise drawn independently of the data. t < 1.

        It follows from Eq. (1), whose minimum is v = E[z_1 - z_0 | z_t]: the line began at z - t v, and the score is
        minus that, over (1 - t). Not for reflowed pairs: there z_0 is known from z_1, and the formula does not hold.
        """
        return (t * v - z) / (1 - t)

    @torch.no_grad()
    def stochastic(self, net, z0, steps, noise=1.0, generator=None):
        """Like Euler, with new noise in every step but the last, of deviation s = noise (1 - t) a unit of time.

        dZ = (v + s^2 / 2 score) dt + s dW keeps every marginal p_t of the flow: it is to dZ = v dt what an SDE is to
        its probability-flow ODE (Score SDE, Eq. (13)).
        Differs from the official code, whose drift has other factors and does not keep them.
        """
        z = z0
        for i in range(steps):
            t, s = i / steps, noise * (1 - i / steps)
            v = self.velocity(net, z, t)
            z = z + (v + 0.5 * s ** 2 * self.score(z, v, t)) / steps
            if i < steps - 1:
                z = z + s / math.sqrt(steps) * noise_like(z, generator)
        return z


# ------------------------------------------------------------------ what is paired with what: Algorithm 1
class Coupling:
    """Batches of pairs (z0, z1), the input of Alg. 1: independent draws first, later the pairs that a flow made.

    source, target  data sets with batch(step, rank, world) -> images and labels; source None: Gaussian noise
    pairs           None, or {"z0", "z1"}: (N, C, H, W) each, what reflow draws from instead of the two data sets
    """
    def __init__(self, source, target, batch_size, seed=0):
        self.source, self.target, self.batch_size, self.seed, self.pairs = source, target, batch_size, seed, None

    def batch(self, step, rank=0, world=1):
        """This process's slice of the batch of pairs (Alg. 1) of step number `step`. Two (B, C, H, W)."""
        if self.pairs is None:
            z1, _ = self.target.batch(step, rank, world)
            return torch.randn_like(z1) if self.source is None else self.source.batch(step, rank, world)[0], z1
        generator = torch.Generator().manual_seed(self.seed + step)
        index = torch.randint(len(self.pairs["z0"]), (self.batch_size,), generator=generator)[rank::world]
        return self.pairs["z0"][index].float(), self.pairs["z1"][index].float()      # one index: z0 stays with its z1

    def starts(self, n, shape=(1, 28, 28)):
        """n starts z_0 for Alg. 1, the same at every call; at most as many as the source has images. (n, C, H, W)."""
        if self.source is None:
            return torch.randn(n, *shape, generator=torch.Generator().manual_seed(self.seed))
        return self.source.first(min(n, len(self.source)))[0]


# ------------------------------------------------------------------ what reflow improves: Section 2.2
def transport_cost(z0, z1):
    """||z_1 - z_0||^2 of every pair (Sec. 2.2). (B, C, H, W) twice -> (B,).

    Its mean over the pairs must not rise by reflow.
    """
    return (z1 - z0).flatten(1).square().sum(1)


def straightness(z, v):
    """The integral over t of ||(z_1 - z_0) - v_t||^2 of every path: 0 if it is straight at constant speed (Sec. 2.2).

    z (S + 1, B, C, H, W), v (S, B, C, H, W) of `RectifiedFlow.path` -> (B,); its mean is the paper's S.
    """
    return (z[-1] - z[0] - v).flatten(2).square().sum(2).mean(0)

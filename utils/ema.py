"""An exponential moving average of a network's weights."""

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class EMA(AveragedModel):
    """`ema.module` is the averaged network, in evaluation mode; `ema.update(net)` after every step moves it.

    With `share`, it is an average over about the last `share` of all updates so far: the decay of update n is
    1 - 1 / (1 + share n), so that the average grows with the run and ends as long as the run deserves, whatever its
    length (the power-function average of EDM2, Karras et al. 2024, Sec. 3, with gamma = 1 / share - 1).
    With `decay` instead, the decay of update n is min(decay, (1 + n) / (10 + n)). Buffers are copied.
    """

    def __init__(self, net, decay=0.999, share=None):
        net = getattr(net, "module", net)              # the network inside a distributed wrapper
        super().__init__(net)
        self.decay, self.share = decay, share
        self.module.eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, net):
        """Move towards the weights of `net`, one step.

        Like `update_parameters`, which moves the count of updates to the GPU and waits for it, at every step.
        """
        net = getattr(net, "module", net)
        averaged, current = list(self.module.parameters()), list(net.parameters())
        n = int(self.n_averaged)                       # updates so far; this number stays on the CPU
        if n:
            decay = min(self.decay, (1 + n) / (10 + n)) if self.share is None else 1 - 1 / (1 + self.share * n)
            get_ema_multi_avg_fn(decay)(averaged, current, n)
        else:
            torch._foreach_copy_(averaged, current)
        for mine, new in zip(self.module.buffers(), net.buffers(), strict=True):
            mine.copy_(new)
        self.n_averaged += 1

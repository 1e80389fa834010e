"""An exponential moving average of a network's weights."""

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class EMA(AveragedModel):
    """`ema.module` is the averaged network, in evaluation mode; `ema.update(net)` after every step moves it.

    The first update copies the weights. After n updates the decay is min(decay, (1 + n) / (10 + n)), so that a
    short run does not end near its first weights. Buffers are copied.
    """

    def __init__(self, net, decay=0.999):
        net = getattr(net, "module", net)              # the network inside a distributed wrapper
        super().__init__(net)
        self.decay = decay
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
            get_ema_multi_avg_fn(min(self.decay, (1 + n) / (10 + n)))(averaged, current, n)
        else:
            torch._foreach_copy_(averaged, current)
        for mine, new in zip(self.module.buffers(), net.buffers(), strict=True):
            mine.copy_(new)
        self.n_averaged += 1

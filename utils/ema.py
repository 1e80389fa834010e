"""An exponential moving average of a network's weights."""

from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class EMA(AveragedModel):
    """`ema.module` is the averaged network, in evaluation mode; `ema.update(net)` after every step moves it.

    The first update copies the weights. After n updates the decay is min(decay, (1 + n) / (10 + n)), so that a
    short run does not end near its first weights. Buffers are copied.
    """

    def __init__(self, net, decay=0.999):
        net = getattr(net, "module", net)              # the network inside a distributed wrapper
        super().__init__(net, multi_avg_fn=self._average)
        self.decay = decay
        self.module.eval().requires_grad_(False)

    def _average(self, averaged, current, n):
        n = float(n)                                   # updates so far
        get_ema_multi_avg_fn(min(self.decay, (1 + n) / (10 + n)))(averaged, current, n)

    def update(self, net):
        """Move towards the weights of `net`, one step."""
        self.update_parameters(getattr(net, "module", net))

"""The two sets of weights of a schedule-free optimizer: those it trains, and their average, which is the result."""

from torch.optim import Optimizer


class TwoWeights:
    """Puts one or the other into the network; the trained ones come back to the bit.

    The optimizer computes one from the other, which rounds: a run that saves would not be the one that does not.
    """

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.trained = None

    def average(self) -> None:
        """The mean over the steps so far, to be saved and looked at."""
        if self.trained is None:
            self.trained = [parameter.detach().clone() for parameter in self.parameters]
            self.optimizer.eval()

    def train(self) -> None:
        """The weights at which gradients are taken, which go into a state."""
        self.optimizer.train()
        if self.trained is not None:
            for parameter, value in zip(self.parameters, self.trained, strict=True):
                parameter.detach().copy_(value)
            self.trained = None

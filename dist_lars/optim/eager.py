"""torch's base class of optimizers, without its guards against torch.compile."""

from inspect import unwrap

from torch.optim import Optimizer


class EagerOptimizer(Optimizer):
    """`torch.optim.Optimizer` with four methods as they were written.

    torch wraps them so that torch.compile leaves them alone, and the first call of one imports the compiler: 2 s of CPU
    time, 900 modules and 160 MB of every rank that starts, for training that compiles nothing.
    """

    add_param_group = unwrap(Optimizer.add_param_group)
    load_state_dict = unwrap(Optimizer.load_state_dict)
    state_dict = unwrap(Optimizer.state_dict)
    zero_grad = unwrap(Optimizer.zero_grad)

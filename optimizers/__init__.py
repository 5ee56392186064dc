"""The paper's optimizers (sections 4.4, 4.5 and 7.2) as `torch.optim.Optimizer` classes."""

from .by_name import make_optimizer
from .deep_momentum import DeepMomentum
from .delta_gradient_descent import DeltaGradientDescent
from .delta_momentum import DeltaMomentum
from .level_groups import level_groups
from .m3 import M3
from .multi_frequency import MultiFrequency


__all__ = [
    "M3",
    "DeepMomentum",
    "DeltaGradientDescent",
    "DeltaMomentum",
    "MultiFrequency",
    "level_groups",
    "make_optimizer",
]

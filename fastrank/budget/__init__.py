"""Plans that meet a budget: what every layer may become, what that costs and loses, and the best choice of all."""

from fastrank.budget._allocate import SENSITIVITIES, Allocation, Request, allocate
from fastrank.budget._choices import Choice, Place
from fastrank.budget._errors import top1
from fastrank.budget._solve import solve

__all__ = ["SENSITIVITIES", "Allocation", "Choice", "Place", "Request", "allocate", "solve", "top1"]

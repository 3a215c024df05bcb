"""Optimizers for large batches: LARS with its rival laws told apart, LAMB, and torch's own under one `build`."""

from dist_lars.optim.build import NAMES, build
from dist_lars.optim.groups import param_groups
from dist_lars.optim.lamb import LAMB
from dist_lars.optim.lars import LARS
from dist_lars.optim.laws import LAWS, Law

__all__ = ["LAMB", "LARS", "LAWS", "NAMES", "Law", "build", "param_groups"]

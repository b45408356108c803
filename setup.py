"""Packaging. Tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

EXAMPLES = [
    "tensorflow-datasets>=4.9.10",  # the data sets, the embedded digits builder too
    "scikit-learn>=1.4",  # its digits are the data that needs no network
    "matplotlib>=3.8",  # the curves
]
TUNER = [
    "keras-tuner[bayesian]>=1.4.8",
    "tensorboard",  # keras-tuner's trials all fail without it
    "matplotlib>=3.8",  # the heat map
]
EVIDENCE = [
    "mnist1d>=0.0.2",  # makes a task whose best accuracy is published, without a download
]
BENCH = [
    "tf_keras>=2.20",  # Keras 2, a contender
]
RUFF = "ruff==0.17.6"  # exact, so that the gate says the same tomorrow
DOCS = [
    "mkdocs-material>=9.7,<10",  # MkDocs and a theme: pages, search and dark mode without code
    "mkdocstrings[python]>=1.0",  # the API from the docstrings, without importing TensorFlow
    "latex2mathml>=3.77",  # formulas as MathML, so that no page loads a script for them
    RUFF,  # breaks long signatures into lines
]
DEV = [
    RUFF,
    "mypy==2.4.1",  # exact, as ruff is
    "pytest>=9.0",
    "pytest-timeout>=2.4",
    "pytest-xdist>=3.8",  # tracing is one thread's work; two cores halve the wait
    "nbclient>=0.10",  # runs examples/notebook.ipynb as a notebook server would
    "ipykernel>=6.29",  # the kernel it runs in
    "setuptools>=70.1",  # tests/test_package.py builds the wheel with it, without a network
]

PLOT = [
    "matplotlib>=3.8",  # pictures of tfbm-plan and of timelines
]

setup(
    name="tf-blockmomentum",
    version="0.1.0",
    description="Block momentum (M-AVG) for Keras 3: distributed training that communicates "
    "K times less",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["tf_blockmomentum", "tf_blockmomentum.*"]),
    package_data={"tf_blockmomentum": ["py.typed"]},
    # The oldest versions are those the tests pass on (make test-oldest). Keras 4 may move
    # the private methods that _private stands on.
    install_requires=[
        "tensorflow>=2.20",
        "keras>=3.12,<4",
        "numpy",
        "cloudpickle>=3.0",  # tfbm.spawn: functions that a notebook's cell defines
    ],
    extras_require={
        "examples": EXAMPLES,
        "tuner": TUNER,
        "plot": PLOT,
        "evidence": EXAMPLES + EVIDENCE,
        "bench": EXAMPLES + BENCH,
        "docs": DOCS,
        "dev": DEV,
        "all": EXAMPLES + TUNER + EVIDENCE + DOCS + DEV,
    },
    entry_points={
        "console_scripts": [
            "tfbm-launch=tf_blockmomentum.launch:main",
            "tfbm-plan=tf_blockmomentum.plan:main",
        ]
    },
)

"""Installs ``oodprompt``; the folders ``trainers/``, ``datasets/`` and ``configs/`` become its subpackages of these names."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "oodprompt" / "__init__.py").read_text()).group(1)
readme = here / "README.md"
beside = ("trainers", "datasets", "configs")

setup(
    name="oodprompt",
    version=version,
    description="Any prompt learner with any debiaser, on CLIP, with worst-group accuracy reported",
    long_description=readme.read_text(encoding="utf-8") if readme.is_file() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=[*find_packages(include=["oodprompt", "oodprompt.*"]), *(f"oodprompt.{folder}" for folder in beside)],
    package_dir={f"oodprompt.{folder}": folder for folder in beside},
    # Everything in these packages that is no code: templates and styles of pages, lists of words, embedded weights.
    package_data={
        "": ["*.j2", "*.css", "*.js", "*.txt", "*.json", "*.gz", "py.typed"],
        "oodprompt.configs": ["**/*.yaml"],
    },
    install_requires=[
        "accelerate>=1.0",
        "clip-anytorch>=2.6",  # OpenAI's tokenizer and vocabulary
        "filelock>=3",
        "ftfy",
        "jinja2>=3.1",
        "kmedoids>=0.5",  # FasterPAM
        "matplotlib>=3.6",
        "numpy>=1.24",
        "pandas>=2.0",  # tables in and out of the library; small beside torch
        "pillow>=9.4",
        "pyyaml>=6",
        "regex",
        "safetensors>=0.4",
        "scikit-learn>=1.3",
        "scipy>=1.10",
        "tabulate>=0.9",
        "tensorboard>=2.12",
        "torch>=2.3",
        "torchvision>=0.18",
        "tqdm>=4.64",
        "yacs>=0.1.8",
    ],
    entry_points={"console_scripts": ["oodprompt = oodprompt.__main__:main"]},
    extras_require={
        "completion": ["argcomplete>=3"],
        "test": [
            "argcomplete>=3",
            "hypothesis>=6.100",
            "import-linter>=2.10",
            "ipykernel>=6",  # these three execute the notebook
            "mypy>=1.11",
            "nbclient>=0.8",
            "nbformat>=5",
            "onnx>=1.16",
            "onnxruntime>=1.18",
            "onnxscript>=0.2",
            "open_clip_torch>=3",
            "pytest>=7",
            "pytest-timeout",
            "pytest-xdist>=3",
            "ruff>=0.6",
            "setuptools>=64",
            "transformers>=5",
            "types-PyYAML",
            "types-tabulate",
            "types-tqdm",
        ],
        "mlflow": ["mlflow>=2"],
        "onnx": ["onnx>=1.16", "onnxruntime>=1.18", "onnxscript>=0.2"],
        "open_clip": ["open_clip_torch>=3"],
        "slurm": ["submitit>=1.5"],
        "transformers": ["transformers>=5"],
        "wandb": ["wandb>=0.16"],
    },
)

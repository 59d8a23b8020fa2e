"""distlm: one YAML file describes a training run; `distlm submit` trains it on whatever machines there are."""

__version__ = "0.1.0"

"""rlhf-pipeline: text and human preferences in, an aligned LLaMA out."""

__version__ = "0.1.0"

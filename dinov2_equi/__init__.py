"""Self-supervised training of vision transformers: DINOv2 plus an equivariance branch."""

__version__ = "0.1.0"

"""Entry points of `torch.hub`; importable with torch alone."""

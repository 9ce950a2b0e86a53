"""Decoders: equivariant tokens of both views -> images."""

"""Backbones, their registry and the reading of weight files."""

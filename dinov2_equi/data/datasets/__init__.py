"""Data sets and the strings that name them."""

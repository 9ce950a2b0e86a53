"""Entry points: the only places that read the command line."""

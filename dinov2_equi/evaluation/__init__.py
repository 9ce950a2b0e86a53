"""Measuring a trained backbone: features, k-NN, transform probes, pictures and the HTML report of a run."""

"""Images in, batches of crops and masks out. Imports neither the models nor torch.distributed."""

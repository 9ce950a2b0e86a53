"""Training losses of DINOv2: DINO, iBOT and KoLeo."""

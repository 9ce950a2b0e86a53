"""Dense tasks on a backbone: depth, segmentation, detection. `maps.py` and `training.py` are what they share."""

"""Building blocks of the vision transformer and of the projection heads."""

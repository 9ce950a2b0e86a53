"""Transform families: what may happen to the second view."""

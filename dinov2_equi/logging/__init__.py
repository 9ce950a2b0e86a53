"""Console and file logging, metric files and the progress display."""

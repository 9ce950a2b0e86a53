"""Process-group queries and collectives that are the identity in a single process."""

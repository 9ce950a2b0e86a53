"""Configuration: typed schema, loading, rules that span sections, derived values."""

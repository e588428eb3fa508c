"""Many models by one file: read it (file), convert them here (conversions) or on a Ray cluster (cluster)."""

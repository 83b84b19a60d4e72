"""Building blocks without knowledge of datasets, coresets or masks."""

"""The identity of an experiment: its code, settings, data and environment."""

"""The command line: `python -m drophot`, also installed as `drophot`."""

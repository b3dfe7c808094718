"""Commands beside train.py and sample.py: python -m tools.NAME."""

"""The command line: `train.py`, `evaluate.py`, `compare` and the verbs of `repair-lightning`."""

"""Training of the embedded models. Run the stages with `python zoo/train.py --help`."""

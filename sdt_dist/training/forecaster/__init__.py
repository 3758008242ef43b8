"""Training of forecasters on synthetic series, and fine-tuning on a user's own.

May import: models, data and below. To add a kind of series: a generator in `sdt_dist/data/synthetic.py`.
"""

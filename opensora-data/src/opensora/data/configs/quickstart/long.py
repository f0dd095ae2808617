"""The quickstart with more data and more training: better digits.

Hardware: 2 CPU cores, no GPU, under 3 GB of memory; about half an hour.
Command:  opensora-run quickstart/long
"""

_base_ = ["default.py"]

name = "quickstart-long"
stages = dict(
    data=dict(num_clips=4000),
    train=dict(max_steps=20000),
)

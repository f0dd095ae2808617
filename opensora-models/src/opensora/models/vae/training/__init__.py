"""Training of video autoencoders, and what they make of a dataset."""

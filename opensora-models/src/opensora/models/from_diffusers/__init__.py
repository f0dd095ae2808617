"""Transformers and autoencoders of the installed diffusers, as components."""

"""Video autoencoders. Each is imported when it is used, since diffusers takes a while."""

"""Text encoders. Each is imported when it is used, since T5 takes a while."""

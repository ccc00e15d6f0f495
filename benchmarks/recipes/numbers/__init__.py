"""Numbers in words: the shipped model with long outputs."""

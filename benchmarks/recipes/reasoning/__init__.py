"""A thought of SmolLM2 that is asked for its answer at checkpoints."""

"""A cascade: one answer of SmolLM2, the majority of three, and an expert who is always right."""

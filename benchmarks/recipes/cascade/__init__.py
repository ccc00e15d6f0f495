"""A cascade: one answer of SmolLM2, the majority of five, and an expert who is always right."""

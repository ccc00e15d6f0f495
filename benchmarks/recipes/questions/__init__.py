"""Questions whose answers can be checked, and how SmolLM2 is asked them: what the cascade's and the reasoning records share."""

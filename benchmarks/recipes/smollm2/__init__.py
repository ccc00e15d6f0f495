"""Exit heads for SmolLM2-135M-Instruct: prompts, self-generated text, training, and what the heads are worth."""

"""Orders said in prose or written as JSON: a small model for drills of production."""

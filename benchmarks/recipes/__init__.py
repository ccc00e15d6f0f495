"""How the shipped models and records were made."""

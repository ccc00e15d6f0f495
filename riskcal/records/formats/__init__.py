"""Readers of other systems' logs, one file a system, from the names that its own code writes."""

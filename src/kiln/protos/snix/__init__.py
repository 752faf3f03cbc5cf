"""Generated: snix."""

"""Generated: snix/castore."""

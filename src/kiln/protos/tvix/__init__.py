"""Generated: tvix."""

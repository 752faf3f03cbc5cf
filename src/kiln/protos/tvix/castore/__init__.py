"""Generated: tvix/castore."""

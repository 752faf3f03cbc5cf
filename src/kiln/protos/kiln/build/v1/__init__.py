"""Generated: kiln/build/v1."""

"""Generated: kiln/build."""

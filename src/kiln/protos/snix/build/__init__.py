"""Generated: snix/build."""

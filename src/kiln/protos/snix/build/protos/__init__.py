"""Generated: snix/build/protos."""

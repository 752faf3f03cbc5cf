"""Generated: tvix/build/protos."""

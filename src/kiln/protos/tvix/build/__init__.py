"""Generated: tvix/build."""

"""Generated: kiln."""

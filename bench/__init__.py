"""What kiln costs, beside its peers in the same run: `./dev bench`."""

"""The build protocol: what is asked (`model`), what is answered (`events`), and who answers (`service`)."""

"""Getting a machine ready: which packages, for what, and how to install them."""

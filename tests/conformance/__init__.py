"""The public conformance suite: what every layer and every stack of layers must do, derived from what it declares."""

"""fxjacobi."""

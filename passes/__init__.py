"""The compiler's passes. Each is one file, named as the pass."""

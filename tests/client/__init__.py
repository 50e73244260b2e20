"""The Python client's pure parts; what both clients do together is in tests/conformance."""

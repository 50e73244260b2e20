"""The tests: they mirror the package, and add contract/, end_to_end/ and faults/."""

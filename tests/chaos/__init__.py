"""The chaos run: several instances, a Redis and a model under random faults, and readers that miss nothing."""

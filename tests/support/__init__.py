"""Test doubles: a stand-in model server and a TCP proxy that breaks connections on demand."""
